"""Outputs of VASP, Quantum ESPRESSO, CP2K and GPAW, one by one or in a folder, with their level of theory.

Every ionic step is a structure with energy, forces and stress in eV, eV/Å and eV/Å^3 (sign of ASE), `level` from the
input as the output repeats it, `traj_id` (the folder) and `ionic_step`. The energy is the one that ASE calls so: of
VASP and GPAW extrapolated to zero smearing, of Quantum ESPRESSO and CP2K the total (free) energy. Energies of GPAW are
relative to its reference atoms. Steps whose electronic cycle did not converge are left out, counted and told.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from ..errors import InputError
from .cp2k import read_cp2k
from .formats import COMPRESSIONS, LeftOut, check, open_text, plain_name

KINDS = {  # what the beginning of an output has in it
    "vasp-xml": re.compile(rb"<modeling>"),
    "vasp-out": re.compile(rb"\A\s*vasp\.\d"),
    "espresso-out": re.compile(rb"Program PWSCF"),
    "cp2k-output": re.compile(rb"\bCP2K\|"),
    "gpaw-out": re.compile(rb"___ ___ ___ _ _ _"),
    "gpw": re.compile(rb"\A- of UlmGPAW"),
}
VASP_NAMES = (("vasp-xml", re.compile(r"vasprun.*\.xml", re.I)), ("vasp-out", re.compile(r"OUTCAR(\b|_)", re.I)))
ENDINGS = {"", ".xml", ".out", ".log", ".txt", ".pwo", ".gpw", ".output"}
HEAD = 1 << 14  # bytes; some programs are announced by those around them
RESULTS = ("energy", "free_energy", "forces", "stress", "magmom", "magmoms", "dipole")
UNCONVERGED = "ionic steps whose electronic cycle did not converge"


class Calculation(NamedTuple):
    """An output, the program that wrote it, and the name of its trajectory."""

    path: Path
    kind: str
    name: str


class Run(NamedTuple):
    """The ionic steps in an output: None where one did not converge, also at the end, where programs give up."""

    steps: Sequence[Atoms | None]
    level: str | None
    cut: bool = False  # the output ends too early


def kind_of(path: Path) -> str | None:
    """Which program wrote a file, told by its beginning; None when it is no output."""
    name = plain_name(path)
    by_name = next((kind for kind, pattern in VASP_NAMES if pattern.match(name)), None)
    if by_name is None and Path(name).suffix.lower() not in ENDINGS:
        return None
    try:
        with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
            head = file.read(HEAD)
    except (OSError, EOFError, ValueError):
        return by_name
    return next((kind for kind, pattern in KINDS.items() if pattern.search(head)), by_name)


def find(folder: Path, deep: bool = True) -> list[Calculation]:
    """All outputs in a folder and, if `deep`, below it; of VASP vasprun.xml before OUTCAR, of GPAW text before gpw."""
    found: list[Calculation] = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deep else []
        paths = [Path(here) / name for name in sorted(names) if not name.startswith(".")]
        outputs = [(path, kind) for path in paths if (kind := kind_of(path))]
        if any(kind == "vasp-xml" for _, kind in outputs):
            outputs = [(path, kind) for path, kind in outputs if kind != "vasp-out"]
        named = {plain_name(path): (path, kind) for path, kind in reversed(outputs)}  # also compressed, or not
        outputs = list(reversed(named.values()))
        texts = {path.stem for path, kind in outputs if kind == "gpaw-out"}
        outputs = [(path, kind) for path, kind in outputs if kind != "gpw" or path.stem not in texts]

        place = Path(here).relative_to(folder)
        for path, kind in outputs:
            together = kind.startswith("vasp") or len(outputs) == 1  # parts of one relaxation are one trajectory
            name = place.as_posix() if together else (place / plain_name(path)).as_posix()
            found.append(Calculation(path, kind, folder.name if name == "." else name))
    return found


def stream(source: Path, calculations: Iterable[Calculation]) -> Iterator[Atoms]:
    """Yield the converged ionic steps of all calculations, and tell at the end what was left out and why.

    Raises:
        InputError: with the reasons, when nothing is left.
    """
    left_out = LeftOut(source)
    n_steps = 0
    for calculation in calculations:
        path = calculation.path
        where = path.relative_to(source)
        try:
            run = READERS[calculation.kind](path)
            for index, atoms in enumerate(run.steps):
                if atoms is not None:
                    check(atoms, f"{path}: ionic step {index}")
        except Exception as error:  # what a broken output makes of a parser
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            left_out.add("files that cannot be read", f"{where}, {reason.splitlines()[0]}")
            continue

        if not run.steps:
            left_out.add("files without a complete ionic step", where)
        elif run.cut:
            left_out.add("ends of files that are cut short, after their complete ionic steps", where)
        for index, atoms in enumerate(run.steps):
            if atoms is None:
                left_out.add(UNCONVERGED, where)
                continue
            clean = _clean(atoms)
            clean.info = {"traj_id": calculation.name, "ionic_step": index}
            if run.level:
                clean.info["level"] = run.level
            n_steps += 1
            yield clean
    if n_steps == 0:
        reasons = "; ".join(left_out.lines()) or "there are no outputs"
        raise InputError(f"{source}: no converged ionic steps in these calculations: {reasons}")
    left_out.tell()


def _clean(atoms: Atoms) -> Atoms:
    """The structure and what models learn from: no constraints, bands or k-points."""
    clean = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    results = {key: atoms.calc.results.get(key) for key in RESULTS}
    if np.shape(results["stress"]) == (3, 3):
        results["stress"] = full_3x3_to_voigt_6_stress(results["stress"])
    clean.calc = SinglePointCalculator(clean, **{key: value for key, value in results.items() if value is not None})
    return clean


def _images(path: Path, kind: str) -> list[Atoms | None]:
    """The steps that ASE finds up to the last that has an energy, None where one has none."""
    from ase.io import read

    images = read(path, index=":", format=kind)
    known = [atoms.calc is not None and atoms.calc.results.get("energy") is not None for atoms in images]
    last = max((i for i, has in enumerate(known) if has), default=-1)
    return [atoms if has else None for atoms, has in zip(images[: last + 1], known, strict=False)]


# ------------------------------------------------------------------------------------------------------------ VASP


def read_vasprun(path: Path) -> Run:
    """A vasprun.xml; a step is unconverged when NELM electronic steps did not bring the last change below EDIFF."""
    tags: dict[str, str] = {}
    potentials: list[str] = []
    converged: list[bool] = []
    cut = False
    with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
        try:
            for _, element in ElementTree.iterparse(file):
                if element.tag in ("incar", "parameters"):  # in this order: what the user wrote comes first
                    for entry in element.iter():
                        if "name" in entry.attrib and entry.tag in ("i", "v"):
                            tags.setdefault(entry.attrib["name"].upper(), (entry.text or "").strip())
                elif element.tag == "atominfo":
                    potentials = [row[-1].text or "" for row in element.findall("array[@name='atomtypes']/set/rc")]
                elif element.tag == "calculation":
                    converged.append(_reached_ediff(element, tags))
                    element.clear()
        except ElementTree.ParseError:
            cut = True
    images = _images(path, "vasp-xml")
    steps = [atoms if ok else None for atoms, ok in zip(images, converged, strict=False)]
    return Run(steps, vasp_level(tags, potentials), cut)


def _reached_ediff(step: ElementTree.Element, tags: Mapping[str, str]) -> bool:
    energies = [float(entry.text or "nan") for entry in step.findall("scstep/energy/i[@name='e_fr_energy']")]
    if len(energies) < int(tags.get("NELM", 60)):
        return True
    return len(energies) > 1 and abs(energies[-1] - energies[-2]) < float(tags.get("EDIFF", 1e-4))


def read_outcar(path: Path) -> Run:
    """An OUTCAR; a step is converged when VASP says before its energy that EDIFF is reached.

    Tags come from an INCAR beside it, where there is one, and else from the list of parameters in the file.
    """
    tags: dict[str, str] = {}
    potentials: list[str] = []
    converged: list[bool] = []
    incar = path.with_name("INCAR")
    if incar.is_file():
        for line in re.split(r"[\n;]", incar.read_text(errors="replace")):
            name, _, value = re.split(r"[#!]", line)[0].partition("=")
            tags[name.strip().upper()] = value.strip()
    with open_text(path) as lines:
        header, reached, ended = True, False, False
        for line in lines:
            if header:
                potentials += re.findall(r"(?:TITEL\s*=|POTCAR:)\s*(\S.*)", line)
                if found := re.search(r"\bLDAUU\s*=\s*([\d.* ]+)", line):  # one for each species
                    tags.setdefault("LDAUU", found[1])
                for name, value in re.findall(r"\b([A-Z]+)\s*=\s*([^\s;]+)", line):
                    tags.setdefault(name, value)
                if "LDA+U is selected" in line:
                    tags.setdefault("LDAU", "T")
            if "Iteration" in line:
                header = False
            elif "aborting loop because EDIFF is reached" in line:
                reached = True
            elif "FREE ENERGIE OF THE ION-ELECTRON SYSTEM" in line:
                converged.append(reached)
                reached = False
            ended = ended or "General timing and accounting" in line
    images = _images(path, "vasp-out")
    steps = [atoms if ok else None for atoms, ok in zip(images, converged, strict=False)]
    return Run(steps, vasp_level(tags, potentials), cut=not ended)


GGA = {
    "PE": "PBE", "PS": "PBEsol", "91": "PW91", "RP": "RPBE", "RE": "revPBE", "AM": "AM05", "CA": "LDA", "PZ": "LDA",
    "B3": "B3LYP", "B5": "B3LYP", "BF": "BEEF-vdW", "OR": "optPBE-vdW", "BO": "optB88-vdW", "MK": "optB86b-vdW",
    "ML": "vdW-DF2", "CX": "vdW-DF-cx",
}  # fmt: skip
METAGGA = {"SCAN": "SCAN", "RSCAN": "rSCAN", "R2SCAN": "r2SCAN", "RTPSS": "revTPSS"}
DISPERSION = {
    "1": "D2", "10": "D2", "11": "D3", "12": "D3(BJ)", "13": "D4", "2": "TS", "20": "TS", "21": "TS-HI", "202": "MBD",
    "263": "MBD-FI", "3": "ULG", "4": "dDsC",
}  # fmt: skip
NONE = {"", "--", "F", "NONE"}


def vasp_level(tags: Mapping[str, str], potentials: Sequence[str] = ()) -> str | None:
    """Name a level of theory such as "PBE+U", "HSE06" or "r2SCAN-D3(BJ)" from tags of an INCAR and titles of POTCARs.

    Without a GGA tag the potentials decide, as in VASP.
    """
    words = {name: value.split("#")[0].strip().strip(".") for name, value in tags.items()}

    def on(name: str) -> bool:
        return words.get(name, "").upper().startswith("T")

    gga, meta = words.get("GGA", "").upper(), words.get("METAGGA", "").upper()
    if meta not in NONE:
        base: str | None = METAGGA.get(meta, meta)
    elif gga not in NONE:
        base = GGA.get(gga, gga)
    else:
        titles = {title.split()[0] for title in potentials if title.split()}
        made_for = {"PAW_PBE": "PBE", "PAW_GGA": "PW91", "PAW": "LDA", "US": "LDA"}
        base = made_for.get(titles.pop()) if len(titles) == 1 else None
    if base is None:
        return None

    if on("LUSE_VDW") and not base.startswith(("opt", "vdW", "BEEF")):
        base = "vdW-DF" if base == "revPBE" else f"{base}+rVV10"
    if on("LHFCALC"):
        base = _hybrid(base, float(words.get("AEXX") or 0.25), float(words.get("HFSCREEN") or 0))
    if on("LDAU") and any(float(u) for u in re.findall(r"[\d.]+", re.sub(r"\d+\*", "", words.get("LDAUU", "1")))):
        base += "+U"
    dispersion = (words.get("IVDW") or "0").split()[0]
    if dispersion != "0":
        base += f"-{DISPERSION.get(dispersion, f'IVDW{dispersion}')}"
    return f"{base}+SOC" if on("LSORBIT") else base


def _hybrid(base: str, exact: float, screening: float) -> str:
    if exact == 1:
        return "HF"
    names = {("PBE", 0.0): "PBE0", ("PBE", 0.2): "HSE06", ("PBE", 0.3): "HSE03", ("B3LYP", 0.0): "B3LYP"}
    name = names.get((base, round(screening, 1)), f"{base}-hybrid")
    return name if abs(exact - (0.2 if name == "B3LYP" else 0.25)) < 1e-6 else f"{name}({exact:g})"


# ------------------------------------------------------------------------------------------------ Quantum ESPRESSO

QE_NAMES = {
    "SLA PW PBX PBC": "PBE", "SLA PW PBE PBE": "PBE", "SLA PW PSX PSC": "PBEsol", "PBESOL": "PBEsol", "PZ": "LDA",
    "SLA PZ NOGX NOGC": "LDA", "SLA PW NOGX NOGC": "LDA", "PW": "LDA", "REVPBE": "revPBE", "HSE": "HSE06",
    "R2SCAN": "r2SCAN", "RSCAN": "rSCAN",
}  # fmt: skip
QE_DISPERSION = (("DFT-D3 Dispersion", "D3"), ("Grimme-D2", "D2"), ("Tkatchenko-Scheffler", "TS"), ("MBD", "MBD"))


def read_espresso(path: Path) -> Run:
    """An output of pw.x; of steps without convergence it has no energy. The functional is what pw.x says it uses."""
    with open_text(path) as file:
        text = file.read()
    failed = text.count("convergence NOT achieved")
    found = re.search(r"Exchange-correlation\s*=\s*([^(\n]+)", text)
    level = None
    if found:
        name = " ".join(found[1].split())
        level = QE_NAMES.get(name.upper(), name)
        level += "+U" if re.search(r"LDA\+U calculation|Hubbard (parameters|projectors)", text) else ""
        level += next((f"-{short}" for sign, short in QE_DISPERSION if sign in text), "")
    steps = _images(path, "espresso-out")
    steps += repeat(None, failed - steps.count(None))
    return Run(steps, level, cut="JOB DONE" not in text and not failed)


# ------------------------------------------------------------------------------------------------------------ GPAW


def read_gpaw(path: Path) -> Run:
    """A text output of GPAW; the step that does not converge is the last one and has no energy."""
    with open_text(path) as file:
        text = file.read()
    failed = re.search(r"did not converge", text, re.IGNORECASE) is not None
    found = re.search(r"using the (\S+) exchange-correlation functional", text, re.IGNORECASE)
    found = found or re.search(r"^\s*xc: *(?:\{[^}]*?name: *)?([^\s,}]+)", text, re.MULTILINE)
    level = found[1] if found else "LDA"  # which GPAW takes when nothing is asked for
    level += "-TS" if "vdw correction:" in text.lower() else ""
    steps = _images(path, "gpaw-out")
    steps += repeat(None, failed - steps.count(None))
    return Run(steps, level)


def read_gpw(path: Path) -> Run:
    """A restart file of GPAW: one step."""
    from ase.io import ulm

    with ulm.open(path) as file:
        parameters = file.parameters.asdict() if "parameters" in file else {}
        converged = bool(file.scf.asdict().get("converged", True)) if "scf" in file else True
    xc = parameters.get("xc") or "LDA"
    level = str(xc.get("name") if isinstance(xc, dict) else xc)
    return Run([atoms if converged else None for atoms in _images(path, "gpw")], level)


READERS: dict[str, Callable[[Path], Run]] = {
    "vasp-xml": read_vasprun,
    "vasp-out": read_outcar,
    "espresso-out": read_espresso,
    "cp2k-output": lambda path: Run(*read_cp2k(path)),
    "gpaw-out": read_gpaw,
    "gpw": read_gpw,
}
