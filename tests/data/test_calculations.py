"""Outputs of calculations: converged ionic steps in our units and signs, with their level of theory."""

import gzip
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.units import Bohr, GPa, Hartree, Ry

from transfermium.data import pack, read, stream
from transfermium.data.calculations import find, kind_of, vasp_level
from transfermium.data.cp2k import cp2k_level
from transfermium.errors import InputError

KBAR = 0.1 * GPa
FORCES = [[0.1, 0.0, -0.2], [-0.1, 0.0, 0.2]]
STRESS = [[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]]  # kbar, compressed: positive in VASP, QE and CP2K
VOIGT = -KBAR * np.array([10.0, 20.0, 30.0, 3.0, 2.0, 1.0])
LEFT_OUT = "ionic steps whose electronic cycle did not converge"


def silicon(strain: float = 0.0) -> Atoms:
    return bulk("Si", a=5.43 * (1 + strain))


def rows(values: Any, form: str) -> str:
    return "\n".join(form.format(*row) for row in values)


def assert_labelled(atoms: Atoms, energy: float, forces: bool = True, stress: bool = True) -> None:
    results = atoms.calc.results
    assert results["energy"] == pytest.approx(energy, rel=1e-6)
    if forces:
        np.testing.assert_allclose(results["forces"], FORCES, atol=1e-6)
    if stress:
        np.testing.assert_allclose(results["stress"], VOIGT, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------------- VASP


def vasprun(
    path: Path,
    cycles: Sequence[Sequence[float]] = ((-10.0, -10.8, -10.80001),),
    incar: str = '<i type="string" name="GGA"> PE</i>',
    potential: str = "PAW_PBE Si 05Jan2001",
    nelm: int = 4,
) -> Path:
    """A vasprun.xml whose ionic steps have these energies (e_fr) in their electronic cycles; e_0 is 0.02 eV more."""
    atoms = silicon()
    vectors = "<v>{:16.8f}{:16.8f}{:16.8f}</v>"
    structure = (
        f'<crystal><varray name="basis">{rows(atoms.cell, vectors)}</varray></crystal>'
        f'<varray name="positions">{rows(atoms.get_scaled_positions(), vectors)}</varray>'
    )

    def energies(energy: float) -> str:
        return (
            f'<energy><i name="e_fr_energy">{energy:.8f}</i><i name="e_wo_entrp">{energy + 0.04:.8f}</i>'
            f'<i name="e_0_energy">{energy + 0.02:.8f}</i></energy>'
        )

    steps = "\n".join(
        "<calculation>\n"
        + "\n".join(f"<scstep>{energies(energy)}</scstep>" for energy in cycle)
        + f"\n<structure>{structure}</structure>"
        + f'<varray name="forces">{rows(FORCES, vectors)}</varray>'
        + f'<varray name="stress">{rows(STRESS, vectors)}</varray>'
        + f"{energies(cycle[-1])}\n</calculation>"
        for cycle in cycles
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">vasp </i><i name="version" type="string">6.3.2  </i></generator>
 <incar>{incar}</incar>
 <kpoints>
  <generation param="Monkhorst-Pack"><v type="int" name="divisions">1 1 1</v></generation>
  <varray name="kpointlist"><v>0.0 0.0 0.0</v></varray><varray name="weights"><v>1.0</v></varray>
 </kpoints>
 <parameters>
  <separator name="electronic">
   <i type="int" name="NELM">{nelm:6d}</i><i name="EDIFF">      0.00010000</i>
   <separator name="electronic exchange-correlation"><i type="string" name="GGA">--</i></separator>
   <i type="logical" name="LHFCALC"> F  </i><i name="HFSCREEN">      0.00000000</i>
  </separator>
 </parameters>
 <atominfo>
  <atoms>       2 </atoms>
  <types>       1 </types>
  <array name="atoms"><dimension dim="1">ion</dimension><field type="string">element</field>
   <set><rc><c>Si</c><c>   1</c></rc><rc><c>Si</c><c>   1</c></rc></set></array>
  <array name="atomtypes"><dimension dim="1">type</dimension>
   <set><rc><c>   2</c><c>Si</c><c>     28.08500000</c><c>      4.00000000</c>
    <c>  {potential}             </c></rc></set></array>
 </atominfo>
 <structure name="initialpos">{structure}</structure>
{steps}
 <structure name="finalpos">{structure}</structure>
</modeling>
"""
    )
    return path


def test_a_vasprun_gives_its_ionic_steps(tmp_path: Path) -> None:
    run = vasprun(tmp_path / "relax" / "Si" / "vasprun.xml", [(-10.0, -10.8, -10.80001), (-10.85, -10.85001)])
    first, second = read(tmp_path)

    assert_labelled(first, -10.80001 + 0.02)  # extrapolated to zero smearing
    assert_labelled(second, -10.85001 + 0.02)
    assert first.calc.results["free_energy"] == pytest.approx(-10.80001)
    assert first.info == {"traj_id": "relax/Si", "ionic_step": 0, "level": "PBE"}
    assert second.info["ionic_step"] == 1
    np.testing.assert_allclose(first.positions, silicon().positions, atol=1e-7)
    assert kind_of(run) == "vasp-xml"


def test_steps_that_reach_nelm_without_ediff_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandering, just = (-10.0, -11.0, -10.2, -10.9), (-10.0, -10.8, -10.81, -10.81001)
    vasprun(tmp_path / "a" / "vasprun.xml", [just, wandering, wandering, (-10.8, -10.8)])
    vasprun(tmp_path / "b" / "vasprun.xml", [wandering, just])
    structures = read(tmp_path)

    assert [(a.info["traj_id"], a.info["ionic_step"]) for a in structures] == [("a", 0), ("a", 3), ("b", 1)]
    assert caplog.messages == [f"{tmp_path}: left out 3 {LEFT_OUT} (first: a/vasprun.xml)"]


def test_a_killed_run_gives_its_complete_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = vasprun(tmp_path / "a" / "vasprun.xml", [(-10.0, -10.0)] * 3)
    text = path.read_text()
    path.write_text(text[: text.rindex("<scstep>") + 20])
    assert len(read(tmp_path)) == 2
    assert "left out 1 ends of files that are cut short, after their complete ionic steps (first: a/vasp" in caplog.text


def test_a_broken_file_is_told_and_the_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vasprun(tmp_path / "a" / "vasprun.xml")
    for name, text in (("b", ""), ("c", "<?xml version='1.0'?><modeling><incar>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vasprun.xml").write_text(text)
    assert len(read(tmp_path)) == 1
    assert "left out 2 files that cannot be read (first: b/vasprun.xml, ParseError: no element found" in caplog.text


def test_when_nothing_is_left_the_error_says_why(tmp_path: Path) -> None:
    vasprun(tmp_path / "a" / "vasprun.xml", [(-10.0, -11.0, -10.2, -10.9)])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "OUTCAR").write_text(" vasp.6.3.2 27Jun22\n")
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert "no converged ionic steps in these calculations: 1 " + LEFT_OUT in str(error.value)
    assert "1 files that cannot be read (first: b/OUTCAR, ParseError: Incomplete OUTCAR)" in str(error.value)


def test_one_output_alone_is_read_in_the_same_way(tmp_path: Path) -> None:
    path = vasprun(tmp_path / "vasprun.xml", [(-10.0, -11.0, -10.2, -10.9), (-10.8, -10.8)])
    (atoms,) = read(path)
    assert (atoms.info["level"], atoms.info["ionic_step"]) == ("PBE", 1)
    packed = tmp_path / "vasprun.xml.relax1.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert_labelled(next(stream(packed)), -10.78)


@pytest.mark.parametrize(
    ("tags", "potential", "level"),
    [
        ({}, "PAW_PBE Fe_pv 06Sep2000", "PBE"),
        ({}, "PAW Fe 03Mar1998", "LDA"),
        ({"GGA": "PS"}, "PAW_PBE Fe 06Sep2000", "PBEsol"),
        ({"GGA": "Pe", "LDAU": ".TRUE.", "LDAUU": "5.3 0.0"}, "PAW_PBE Fe 06Sep2000", "PBE+U"),
        ({"LDAU": "T", "LDAUU": "0.0 0.0"}, "PAW_PBE Fe 06Sep2000", "PBE"),
        ({"METAGGA": "R2SCAN", "GGA": "--"}, "PAW_PBE Fe 06Sep2000", "r2SCAN"),
        ({"METAGGA": "SCAN", "LUSE_VDW": ".T."}, "PAW_PBE Fe 06Sep2000", "SCAN+rVV10"),
        ({"METAGGA": "F", "IVDW": "12"}, "PAW_PBE Fe 06Sep2000", "PBE-D3(BJ)"),
        ({"LHFCALC": ".TRUE.", "HFSCREEN": "0.2"}, "PAW_PBE Si 05Jan2001", "HSE06"),
        ({"LHFCALC": "T", "HFSCREEN": "0.207", "AEXX": "0.3"}, "PAW_PBE Si 05Jan2001", "HSE06(0.3)"),
        ({"LHFCALC": "T"}, "PAW_PBE Si 05Jan2001", "PBE0"),
        ({"GGA": "RE", "LUSE_VDW": "T", "LSORBIT": "T"}, "PAW_PBE Si 05Jan2001", "vdW-DF+SOC"),
        ({"GGA": "RP", "IVDW": "11"}, "PAW_PBE Si 05Jan2001", "RPBE-D3"),
        ({}, "unknown Si", None),
    ],
)
def test_the_level_of_vasp_follows_from_its_tags(tags: dict[str, str], potential: str, level: str | None) -> None:
    assert vasp_level(tags, [potential]) == level


def test_tags_of_the_incar_count_more_than_defaults(tmp_path: Path) -> None:
    incar = '<i type="logical" name="LDAU"> T  </i><v name="LDAUU">  5.30000000</v><i type="int" name="IVDW">    12</i>'
    vasprun(tmp_path / "vasprun.xml", incar=incar)
    assert read(tmp_path)[0].info == {"traj_id": tmp_path.name, "ionic_step": 0, "level": "PBE+U-D3(BJ)"}


def outcar(path: Path, reached: Sequence[bool] = (True,), parameters: str = "", done: bool = True) -> Path:
    """An OUTCAR with one ionic step per flag, which says whether EDIFF was reached; the energy goes down by 0.1 eV."""
    atoms = silicon()
    header = f""" vasp.6.3.2 27Jun22 (build Jul 11 2022) complex
 executed on             LinuxIFC date 2024.01.01  10:00:00
 POTCAR:    PAW_PBE Si 05Jan2001
 POTCAR:    PAW_PBE Si 05Jan2001
   TITEL  = PAW_PBE Si 05Jan2001
   ions per type =               2
   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      8
   NELM   =      4;   NELMIN=  2; NELMDL= -5     # of ELM steps
   EDIFF  = 0.1E-03   stopping-criterion for ELM
   ISPIN  =      1    spin polarized calculation?
   GGA     =    --    GGA type
{parameters}
 k-points in reciprocal lattice and weights: Gamma
   0.00000000  0.00000000  0.00000000       1.000
"""
    steps = []
    for i, ok in enumerate(reached):
        energy = -10.8 - 0.1 * i
        loop = "because EDIFF is reached" if ok else "EDIFF was not reached (unconverged)"
        table = [[*position, *force] for position, force in zip(atoms.positions, FORCES, strict=True)]
        steps.append(f"""
--------------------------------------- Iteration {i + 1:6d}(   1)  ---------------------------------------
------------------------ aborting loop {loop} ----------------------------------------
  in kB      10.00000    20.00000    30.00000     1.00000     3.00000     2.00000
 external pressure =       20.00 kB  Pullay stress =        0.00 kB
      direct lattice vectors                 reciprocal lattice vectors
{rows(np.hstack([atoms.cell, atoms.cell.reciprocal()]), "  " + "{:13.9f}" * 6)}

 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
{rows(table, "{:13.5f}" * 3 + "{:14.6f}" * 3)}
 -----------------------------------------------------------------------------------
  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  =  {energy:18.8f} eV

  energy  without entropy=  {energy + 0.04:18.8f}  energy(sigma->0) =  {energy + 0.02:18.8f}
""")
    end = " General timing and accounting informations for this job:\n" if done else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join(steps) + end)
    return path


def test_an_outcar_gives_its_converged_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcar(tmp_path / "a" / "OUTCAR", [True, False, True], " LDA+U is selected, type is set to LDAUTYPE =  2")
    first, third = read(tmp_path)

    assert_labelled(first, -10.78)
    assert_labelled(third, -10.98)
    assert [a.info["ionic_step"] for a in (first, third)] == [0, 2]
    assert first.info["level"] == "PBE+U"
    assert caplog.messages == [f"{tmp_path}: left out 1 {LEFT_OUT} (first: a/OUTCAR)"]


def test_an_incar_beside_an_outcar_says_the_level(tmp_path: Path) -> None:
    outcar(tmp_path / "OUTCAR.gz").write_bytes(gzip.compress(outcar(tmp_path / "OUTCAR.gz").read_bytes()))
    (tmp_path / "INCAR").write_text("SYSTEM = Si\nALGO = Fast; METAGGA = R2scan  ! the functional\n# GGA = PS\n")
    assert read(tmp_path)[0].info["level"] == "r2SCAN"


@pytest.mark.parametrize(
    ("us", "incar", "level"),
    [
        ("0.0  5.3  0.0", "", "PBE+U"),
        ("5.3  0.0", "", "PBE+U"),
        ("0.0  0.0", "", "PBE"),
        ("0.0", "LDAU = T\nLDAUU = 2*0.0\n", "PBE"),
        ("0.0", "LDAU = T\nLDAUU = 2*0.0 4.0\n", "PBE+U"),
    ],
)
def test_a_hubbard_u_of_any_species_counts(tmp_path: Path, us: str, incar: str, level: str) -> None:
    said = f" LDA+U is selected, type is set to LDAUTYPE =  2\n   U (eV)           for each species LDAUU =   {us}"
    outcar(tmp_path / "OUTCAR", parameters=said)
    if incar:
        (tmp_path / "INCAR").write_text(incar)
    assert read(tmp_path)[0].info["level"] == level


def test_an_outcar_that_ends_early_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = outcar(tmp_path / "OUTCAR", [True, True], done=False)
    path.write_text(path.read_text()[:-300])
    assert len(read(tmp_path)) == 1
    assert "left out 1 ends of files that are cut short" in caplog.text


def test_an_output_and_its_compressed_copy_are_one(tmp_path: Path) -> None:
    path = vasprun(tmp_path / "vasprun.xml")
    (tmp_path / "vasprun.xml.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(read(tmp_path)) == 1


def test_of_vasprun_and_outcar_only_one_is_read(tmp_path: Path) -> None:
    vasprun(tmp_path / "a" / "vasprun.xml")
    outcar(tmp_path / "a" / "OUTCAR", [True, True])
    outcar(tmp_path / "b" / "OUTCAR")
    ase.io.write(tmp_path / "a" / "POSCAR", silicon(), format="vasp")
    assert [a.info["traj_id"] for a in read(tmp_path)] == ["a", "b"]
    assert len(read(tmp_path / "a")) == 1  # the structure beside it goes with it


# ------------------------------------------------------------------------------------------------- Quantum ESPRESSO


def espresso(path: Path, energies: Sequence[float | None] = (-15.8,), xc: str = "PBE", more: str = "") -> Path:
    """An output of pw.x for a relaxation with these energies (Ry); None where the cycle does not converge."""
    atoms = silicon()
    alat = 10.2612  # bohr
    units = atoms.cell.array / (alat * Bohr)
    positions = atoms.positions / (alat * Bohr)
    table = "\n".join(
        f"         {i + 1}           Si  tau({i + 1:4d}) = ({p[0]:12.7f}{p[1]:12.7f}{p[2]:12.7f}  )"
        for i, p in enumerate(positions)
    )
    axes = "\n".join(
        f"               a({i + 1}) = ({v[0]:10.6f}{v[1]:10.6f}{v[2]:10.6f} )  " for i, v in enumerate(units)
    )
    text = f"""
     Program PWSCF v.7.2 starts on  1Jan2024 at 10: 0: 0

     bravais-lattice index     =            0
     lattice parameter (alat)  =      {alat:.4f}  a.u.
     number of atoms/cell      =            2
     number of atomic types    =            1
     Exchange-correlation= {xc}
                           (   1   4   3   4   0   0   0)
{more}
     celldm(1)=  {alat:.6f}  celldm(2)=   0.000000  celldm(3)=   0.000000

     crystal axes: (cart. coord. in units of alat)
{axes}

   Cartesian axes

     site n.     atom                  positions (alat units)
{table}

     number of k points=     1
                       cart. coord. in units 2pi/alat
        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000
"""
    for i, energy in enumerate(energies):
        if i:
            text += f"\nATOMIC_POSITIONS (angstrom)\n{rows(atoms.positions, 'Si {:16.9f}{:16.9f}{:16.9f}')}\n\n"
        if energy is None:
            text += "\n     convergence NOT achieved after 100 iterations: stopping\n"
            continue
        stress = np.array(STRESS) * KBAR / (Ry / Bohr**3)
        forces = np.array(FORCES) / (Ry / Bohr)
        both = "\n".join(
            "".join(f"{x:15.10f}" for x in s) + "".join(f"{x:12.2f}" for x in k)
            for s, k in zip(stress, STRESS, strict=True)
        )
        each = "\n".join(
            f"     atom {n + 1:4d} type  1   force = " + "".join(f"{x:14.8f}" for x in f) for n, f in enumerate(forces)
        )
        text += f"""
     End of self-consistent calculation

          k = 0.0000 0.0000 0.0000 (   113 PWs)   bands (ev):

    -5.8096   6.2549   6.2549   6.2549

     highest occupied level (ev):     6.2549

!    total energy              = {energy:17.8f} Ry

     convergence has been achieved in   6 iterations

     Forces acting on atoms (cartesian axes, Ry/au):

{each}

     Total force =     0.012345     Total SCF correction =     0.000001

     Computing stress (Cartesian axis) and pressure

          total   stress  (Ry/bohr**3)                   (kbar)     P=       20.00
{both}

"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n   JOB DONE.\n")
    return path


def test_quantum_espresso_gives_its_steps(tmp_path: Path) -> None:
    espresso(tmp_path / "Si" / "relax.out", [-15.8, -15.9])
    first, second = read(tmp_path)
    assert_labelled(first, -15.8 * Ry)
    assert_labelled(second, -15.9 * Ry)
    np.testing.assert_allclose(first.positions, silicon().positions, atol=1e-5)
    assert second.info == {"traj_id": "Si", "ionic_step": 1, "level": "PBE"}


def test_quantum_espresso_gives_up_without_convergence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    espresso(tmp_path / "a" / "pw.out", [-15.8, None])
    espresso(tmp_path / "b" / "pw.out", [None])
    assert len(read(tmp_path)) == 1
    assert f"left out 2 {LEFT_OUT} (first: a/pw.out)" in caplog.text


@pytest.mark.parametrize(
    ("xc", "more", "level"),
    [
        ("SLA  PW   PBX  PBC ( 1  4  3  4 0 0)", "", "PBE"),
        ("PBESOL", "", "PBEsol"),
        ("PBE", "     Hubbard projectors: atomic", "PBE+U"),
        ("SLA  PW   PBX  PBC ( 1  4  3  4 0 0)", "     DFT-D3 Dispersion Correction (no 3-body terms):", "PBE-D3"),
        ("HSE", "", "HSE06"),
    ],
)
def test_the_level_of_quantum_espresso_is_what_it_says(tmp_path: Path, xc: str, more: str, level: str) -> None:
    assert read(espresso(tmp_path / "pw.out", xc=xc, more=more))[0].info["level"] == level


def test_several_outputs_in_a_folder_are_several_trajectories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        espresso(tmp_path / "runs" / f"{name}.out")
    (tmp_path / "runs" / "README.txt").write_text("two runs\n")
    assert [a.info["traj_id"] for a in read(tmp_path)] == ["runs/a.out", "runs/b.out"]


# ------------------------------------------------------------------------------------------------------------- GPAW


def gpaw(path: Path, energies: Sequence[float | None] = (-10.8,), xc: str = "PBE") -> Path:
    """A text output of GPAW with these energies (eV, extrapolated); None where the cycle does not converge."""
    atoms = silicon()
    text = f"""
  ___ ___ ___ _ _ _
 |   |   |_  | | | |
 | | | | | . | | | |
 |__ |  _|___|_____|  22.8.0
 |___|_|

User:   someone@machine
Input parameters:
  kpts: {{density: 3.0}}
  mode: pw
  xc: {xc}

Total Charge: 0.000000
"""
    moment = "    ( 0.0000,  0.0000,  0.0000)"
    positions = rows(
        [(i, "Si", *p, moment) for i, p in enumerate(atoms.positions)], "{:4d} {} " + "{:14.6f} " * 3 + "{}"
    )
    axes = rows(
        [(i + 1, *v) for i, v in enumerate(atoms.cell)], "  {}. axis:    yes  " + "{:10.6f}  " * 3 + "  16     0.2"
    )
    for energy in energies:
        text += f"""
Positions:
{positions}

Unit cell:
           periodic     x           y           z      points  spacing
{axes}

"""
        if energy is None:
            text += "Did not converge!\n"
            continue
        text += f"""Converged after 14 iterations.

Dipole moment: (0.000000, 0.000000, 0.000000) |e|*Ang

Energy contributions relative to reference atoms: (reference = -15773.2)

Kinetic:        +12.0
Potential:      -12.0
--------------------------
Free energy:   {energy - 0.02:13.6f}
Extrapolated:  {energy:13.6f}

Forces in eV/Ang:
{rows([(i, "Si", *f) for i, f in enumerate(FORCES)], "{:3d} {} {:10.5f} {:10.5f} {:10.5f}")}

Stress tensor:
{rows(-KBAR * np.array(STRESS), "{:15.10f} {:15.10f} {:15.10f}")}
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_gpaw_gives_its_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpaw(tmp_path / "Si" / "gs.txt", [-10.8, -10.9, None], xc="RPBE")
    first, second = read(tmp_path)
    assert_labelled(first, -10.8, stress=False)
    assert_labelled(second, -10.9, stress=False)
    np.testing.assert_allclose(first.calc.results["stress"], VOIGT, rtol=1e-5)
    assert (first.info["level"], first.info["traj_id"]) == ("RPBE", "Si")
    assert f"left out 1 {LEFT_OUT} (first: Si/gs.txt)" in caplog.text


@pytest.mark.parametrize(
    ("xc", "level"), [("{backend: libvdwxc,\n       name: BEEF-vdW}", "BEEF-vdW"), ("r2SCAN", "r2SCAN")]
)
def test_the_level_of_gpaw_is_its_functional(tmp_path: Path, xc: str, level: str) -> None:
    assert read(gpaw(tmp_path / "gs.txt", xc=xc))[0].info["level"] == level
    without = gpaw(tmp_path / "gs.txt")
    without.write_text(without.read_text().replace("  xc: PBE\n", ""))
    assert read(without)[0].info["level"] == "LDA"


def write_gpw(path: Path, converged: bool = True, **parameters: Any) -> Path:
    from ase.io import ulm
    from ase.io.trajectory import write_atoms

    atoms = silicon()
    with ulm.open(path, "w", tag="GPAW") as writer:
        writer.write(version=3)
        write_atoms(writer.child("atoms"), atoms)
        writer.child("results").write(energy=-10.8, forces=np.array(FORCES), stress=VOIGT)
        writer.child("parameters").write(**parameters)
        writer.child("scf").write(converged=converged)
        waves = writer.child("wave_functions")
        waves.write(fermi_levels=np.array([0.1]))
    return path


def test_gpw_files_are_one_step_and_yield_to_the_text(tmp_path: Path) -> None:
    write_gpw(tmp_path / "gs.gpw", xc="PBE")
    (atoms,) = read(tmp_path)
    assert_labelled(atoms, -10.8)
    assert atoms.info["level"] == "PBE"
    gpaw(tmp_path / "gs.txt", [-10.8, -10.9])
    assert [calculation.kind for calculation in find(tmp_path)] == ["gpaw-out"]
    with pytest.raises(InputError, match="no converged ionic steps"):
        read(write_gpw(tmp_path / "other.gpw", converged=False))


# ------------------------------------------------------------------------------------------------------------- CP2K


def cp2k(
    path: Path,
    energies: Sequence[float | None] = (-7.9,),
    failed: Sequence[int] = (),
    new: bool = False,
    done: bool = True,
) -> Path:
    """An output of CP2K with these energies (hartree), in the layout of 2023 or, if `new`, of 2025.

    None is where CP2K gives up; `failed` are cycles that did not converge and were used all the same.
    """
    atoms = silicon()
    forces = np.array(FORCES) / (Hartree / Bohr)
    axes = [(axis, *v, axis) for axis, v in zip("abc", atoms.cell, strict=True)]
    cell = rows(axes, " CELL| Vector {} [angstrom]: {:12.6f}{:12.6f}{:12.6f}   |{}| =     3.839590")
    table = "\n".join(
        f"{i + 1:7d}{1:6d} Si   14{p[0]:12.6f}{p[1]:12.6f}{p[2]:12.6f}      4.0000     28.0855"
        for i, p in enumerate(atoms.positions)
    )
    text = f"""
  **** **** ******  **  PROGRAM STARTED AT               2024-01-01 10:00:00.000
 CP2K| version string:                                       CP2K version {"2025.1" if new else "2023.1"}
 CP2K| Input file name                                                   si.inp
 GLOBAL| Project name                                                        si
 CELL_TOP| Vector a [angstrom]:       9.000     9.000     9.000   |a| =     9.000000
 CELL| Volume [angstrom^3]:                                           40.025
{cell}
 FUNCTIONAL| PBE:
 FUNCTIONAL| J.P.Perdew, K.Burke, M.Ernzerhof, Phys. Rev. Letter, vol. 77, n 18,
 FUNCTIONAL| pp. 3865-3868, (1996)[PBE]{{spin unpolarized}}
 POISSON| Periodicity                                                       XYZ
 MODULE QUICKSTEP: ATOMIC COORDINATES IN ANGSTROM

   Atom Kind Element         X             Y             Z       Z(eff)     Mass
{table}

"""
    for i, energy in enumerate(energies):
        ok = energy is not None and i not in failed
        text += "  *** SCF run converged in    12 steps ***\n" if ok else "  *** SCF run NOT converged ***\n"
        if energy is None:
            break
        if new:
            text += f" ENERGY| Total FORCE_EVAL ( QS ) energy [hartree]      {energy:25.15f}\n\n"
            text += " FORCES| Atomic forces [hartree/bohr]\n"
            text += " FORCES|   Atom     x               y               z               |f|\n"
            text += rows(
                [(n + 1, *f, 0.004) for n, f in enumerate(forces)],
                " FORCES|{:7d} {:15.8E} {:15.8E} {:15.8E}   {:15.8E}",
            )
            text += "\n FORCES| Sum     0.0 0.0 0.0   0.0\n\n STRESS| Analytical stress tensor [bar]\n"
            scale = 1000.0
        else:
            text += f" ENERGY| Total FORCE_EVAL ( QS ) energy [a.u.]:         {energy:25.15f}\n\n"
            text += " ATOMIC FORCES in [a.u.]\n\n # Atom   Kind   Element          X              Y              Z\n"
            text += rows(
                [(n + 1, 1, "Si", *f) for n, f in enumerate(forces)], "{:7d}{:7d}      {}    {:15.8f}{:15.8f}{:15.8f}"
            )
            text += "\n SUM OF ATOMIC FORCES    0.0  0.0  0.0  0.0\n\n STRESS| Analytical stress tensor [GPa]\n"
            scale = 0.1
        text += " STRESS|                        x                   y                   z\n"
        text += rows(
            [(a, *(scale * x for x in s)) for a, s in zip("xyz", STRESS, strict=True)],
            " STRESS|      {} {:19.11E} {:19.11E} {:19.11E}",
        )
        text += "\n STRESS| 1/3 Trace                                            2.0E+00\n\n"
    end = "  **** **** ******  **  PROGRAM ENDED AT                 2024-01-01 10:01:00.000\n" if done else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + end)
    return path


def cp2k_trajectory(folder: Path, energies: Sequence[float], scale: float = 1.0, cells: bool = False) -> None:
    atoms = silicon()
    forces = np.array(FORCES) / (Hartree / Bohr)
    for name, values in (("pos", atoms.positions), ("frc", forces)):
        with (folder / f"si-{name}-1.xyz").open("w") as file:
            for i, energy in enumerate(energies):
                file.write(f"       2\n i = {i:8d}, time = {0.5 * i:12.3f}, E = {energy:20.10f}\n")
                moved = values + (0.01 * i if name == "pos" else 0.0)
                file.write(rows([("Si", *v) for v in moved], "  {} {:19.10f} {:19.10f} {:19.10f}") + "\n")
    if cells:
        lines = [
            f"{i:8d} {0.5 * i:12.3f} "
            + " ".join(f"{x:.8f}" for x in (atoms.cell.array * (1 + 0.01 * i)).ravel())
            + " 40.0"
            for i in range(len(energies))
        ]
        (folder / "si-1.cell").write_text("#   Step   Time [fs]       Ax [Angstrom] ...\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("new", [False, True])
def test_cp2k_gives_energy_forces_and_stress(tmp_path: Path, new: bool) -> None:
    (atoms,) = read(cp2k(tmp_path / "si.out", new=new))
    assert_labelled(atoms, -7.9 * Hartree)
    np.testing.assert_allclose(atoms.positions, silicon().positions, atol=1e-6)
    np.testing.assert_allclose(atoms.cell.array, silicon().cell.array, atol=1e-6)
    assert atoms.pbc.all()
    assert atoms.info["level"] == "PBE"


def test_the_trajectory_beside_an_output_of_cp2k_has_the_later_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    energies = [-7.9, -7.91, -7.92]
    cp2k(tmp_path / "md" / "si.out", energies, failed=[1])
    cp2k_trajectory(tmp_path / "md", energies, cells=True)
    first, third = read(tmp_path)

    assert_labelled(first, -7.9 * Hartree)
    assert_labelled(third, -7.92 * Hartree)
    assert [a.info["ionic_step"] for a in (first, third)] == [0, 2]
    np.testing.assert_allclose(third.positions, silicon().positions + 0.02, atol=1e-6)
    np.testing.assert_allclose(third.cell.array, silicon().cell.array * 1.02, atol=1e-6)
    assert caplog.messages == [f"{tmp_path}: left out 1 {LEFT_OUT} (first: md/si.out)"]


def test_steps_of_cp2k_with_nearly_one_energy_have_each_their_own_forces(tmp_path: Path) -> None:
    """As at the end of a relaxation."""
    energies = [-7.9, -7.90000004, -7.90000008]
    path = cp2k(tmp_path / "si.out", energies)
    first, *others = path.read_text().split(" ENERGY|")
    for step, text in enumerate(others):
        others[step] = re.sub(
            r"(STRESS\| +x +)[-+.\dE]+", lambda found, step=step: f"{found[1]}{step + 1.0:.8E}", text, count=1
        )
        others[step] = re.sub(
            r"(\n +1 +1 +Si +)\S+", lambda found, step=step: f"{found[1]}{0.01 * (step + 1):.8f}", others[step], count=1
        )
    path.write_text(" ENERGY|".join([first, *others]))
    cp2k_trajectory(tmp_path, energies)
    (tmp_path / "si-frc-1.xyz").unlink()
    steps = read(tmp_path)
    forces = [atoms.get_forces()[0, 0] / (0.01 * Hartree / Bohr) for atoms in steps]
    np.testing.assert_allclose(forces, [1, 2, 3], rtol=1e-4)
    np.testing.assert_allclose([-atoms.get_stress()[0] / GPa for atoms in steps], [1, 2, 3], rtol=1e-4)


def test_of_steps_of_cp2k_with_the_same_energy_only_those_that_failed_are_left_out(tmp_path: Path) -> None:
    cp2k(tmp_path / "si.out", [-7.9] * 3, failed=[0])
    cp2k_trajectory(tmp_path, [-7.9] * 3)
    assert [atoms.info["ionic_step"] for atoms in read(tmp_path)] == [1, 2]


def test_without_a_trajectory_the_first_step_of_cp2k_is_read_and_the_others_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cp2k(tmp_path / "a" / "si.out", [-7.9, -7.91])
    cp2k(tmp_path / "b" / "si.out", [None], done=False)
    assert len(read(tmp_path)) == 1
    assert f"left out 1 {LEFT_OUT} (first: b/si.out)" in caplog.text
    assert "ends of files that are cut short, after their complete ionic steps (first: a/si.out)" in caplog.text


@pytest.mark.parametrize(
    ("text", "said", "level"),
    [
        ("&XC_FUNCTIONAL PBE\n&END\n&VDW_POTENTIAL\n TYPE DFTD3(BJ)\n", "", "PBE-D3(BJ)"),
        ("&XC_FUNCTIONAL BLYP\n&END\n TYPE DFTD3\n", "", "BLYP-D3"),
        ("&XC_FUNCTIONAL\n &PBE\n &END\n&END\n", " FUNCTIONAL| PBE:\n FUNCTIONAL| revPBE, Yingkay Zhang", "revPBE"),
        ("", " FUNCTIONAL| PBE:\n FUNCTIONAL| J.P.Perdew\n HFX_INFO| FRACTION:      0.2500000000", "PBE0"),
        (
            "",
            " FUNCTIONAL| MGGA_X_R2SCAN (LIBXC version 6.2.2):\n FUNCTIONAL| MGGA_C_R2SCAN (LIBXC version 6.2.2):",
            "r2SCAN",
        ),
        ("", " FUNCTIONAL| BECKE88:\n FUNCTIONAL| LYP:\n", "BLYP"),
        ("", "", None),
    ],
)
def test_the_level_of_cp2k_follows_from_input_or_output(text: str, said: str, level: str | None) -> None:
    assert cp2k_level(said.splitlines(), text) == level


def test_the_input_beside_an_output_of_cp2k_is_read(tmp_path: Path) -> None:
    (tmp_path / "si.inp").write_text("&XC\n &XC_FUNCTIONAL PBE\n &END XC_FUNCTIONAL\n &VDW_POTENTIAL\n TYPE DFTD3\n")
    assert read(cp2k(tmp_path / "si.out"))[0].info["level"] == "PBE-D3"


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_tree_of_all_programs_is_one_source(tmp_path: Path) -> None:
    vasprun(tmp_path / "vasp" / "vasprun.xml")
    espresso(tmp_path / "qe" / "pw.out")
    cp2k(tmp_path / "cp2k" / "si.out")
    gpaw(tmp_path / "gpaw" / "gs.txt")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "log.txt").write_text("nothing to see\n")
    assert [a.info["traj_id"] for a in read(tmp_path)] == ["cp2k", "gpaw", "qe", "vasp"]
    packed = pack(tmp_path, tmp_path.parent / "packed", progress=False)
    assert packed.levels == {"PBE": 4}


def test_sets_and_tables_beside_outputs_are_read_as_before(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "set.extxyz", [silicon(), silicon()])
    espresso(tmp_path / "pw.out")
    assert len(read(tmp_path)) == 2
    (tmp_path / "set.extxyz").unlink()
    ase.io.write(tmp_path / "a.cif", silicon())
    (tmp_path / "id_prop.csv").write_text("a,1.5\n")
    assert read(tmp_path)[0].info["target"] == 1.5


def test_structures_above_calculations_are_read_as_before(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.cif", silicon())
    vasprun(tmp_path / "runs" / "vasprun.xml")
    (atoms,) = read(tmp_path)
    assert atoms.calc is None


def test_calculations_are_read_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    vasprun(tmp_path / "a" / "vasprun.xml")
    vasprun(tmp_path / "b" / "vasprun.xml").write_text("<modeling>")
    structures = stream(tmp_path)
    assert next(structures).info["traj_id"] == "a"
    assert "cannot be read" not in caplog.text  # so far
    assert list(structures) == []
    assert "cannot be read" in caplog.text
