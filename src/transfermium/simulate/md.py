"""Molecular dynamics with a model, and what it says about a substance."""

from __future__ import annotations

import csv
import json
import time as clock
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ase
import numpy as np
from ase import units

from .. import observables
from ..calculator import Calculator
from ..console import bar, console
from ..data.read import Source, read
from ..errors import InputError
from ..model import Model
from ..run import claim, fingerprint, leaving_nothing
from ..transfer.learn import weights_fingerprint
from .dynamics import (
    COLUMNS,
    Settings,
    Simulation,
    check_fit,
    check_forces,
    check_unseen,
    fixed,
    forces_are_derivatives,
    has_momenta,
    held_atoms,
    hold_still,
    is_held,
    is_periodic,
    moves_as_a_whole,
    settings_of,
    steps_of,
    told_of_constraints,
)

RDF_RADIUS = (6.0, 10.0)  # Å: half the width of the cell within these
CELL = {"a": "Å", "b": "Å", "c": "Å", "alpha": "°", "beta": "°", "gamma": "°"}
FEW_ATOMS = 16  # of an element, in whose RDF it matters that an atom and its images are no pair
VELOCITIES = {"velocities", "velocity", "velo", "vel", "v"}  # columns that others write, in units that nobody knows
MOST_FRAMES = 400  # that radial distribution functions are averaged over

Ensemble = Literal["nve", "nvt", "npt"]
Thermostat = Literal["langevin", "bussi", "nose-hoover"]


@leaving_nothing
def md(
    model: str | Path | Model,
    structure: ase.Atoms | str | Path,
    out: str | Path,
    *,
    ensemble: Ensemble = "nvt",
    thermostat: Thermostat | None = None,
    temperature: float = 300.0,
    pressure: str | None = None,
    timestep: str = "0.5fs",
    time: str = "2ps",
    every: str = "10fs",
    tau: str | None = None,
    tau_pressure: str | None = None,
    shape: bool = False,
    seed: int = 0,
    skip: str = "0ps",
    reference: Source | None = None,
    pairs: Sequence[str] | None = None,
    most_force: float = 50.0,
    index: int | None = None,
    part: str | None = None,
    device: str = "auto",
    allow_unseen: bool = False,
    verbose: bool = True,
) -> dict[str, Any]:
    """Simulate a structure; returns what `simulation.json` holds, and writes a page about it.

    The folder gets log.csv, trajectory.extxyz (positions not wrapped, with momenta), final.extxyz, and simulation.html.
    The same command goes on after a kill, on a CPU as if nothing had happened; with a longer time it goes on from the
    end. A simulation that explodes stops: result["stopped"] says at which step and atom, and last_good.extxyz is the
    last frame before.

    Args:
        structure: structures with momenta go on with them, as far as constraints let them, others get random ones. A
            thermostat other than Langevin first takes the momentum of the whole away, and its turning where nothing is
            periodic.
        ensemble: "nve" is velocity Verlet, "npt" lets the volume of the cell change (Martyna-Tobias-Klein).
        thermostat: of "nvt", "langevin" by default; "bussi" (stochastic velocity rescaling) disturbs diffusion least,
            and "nose-hoover" (a chain of three) is deterministic.
        temperature: in K; of "nve" that of random momenta only.
        pressure: of "npt", such as "1bar" or "0.1GPa".
        timestep, time, every: such as "0.5fs", "2ps", or "100steps"; log and trajectory get a row `every` so often.
        tau, tau_pressure: times in which thermostat and barostat act, 100 fs and 1 ps by default; the friction of
            Langevin is 1 / tau.
        shape: of "npt", the shape of the cell changes too: for solids.
        skip: what is left out of averages at the beginning.
        reference: frames of the same substance, with whose radial distribution functions those found are compared.
        pairs: of elements that are compared, such as "O-O"; all by default.
        most_force: in eV/Å, beyond which a simulation counts as exploded.
        index: which structure of a file that has several.
        part: which part of a model that learned several objectives, each with its own energy.

    Raises:
        InputError: for settings that do not fit each other, the structure or the folder, for a model without forces,
            and for elements that it never saw.
    """
    settings = settings_of(ensemble, thermostat, temperature, pressure, timestep, tau, tau_pressure, shape)
    steps, row_every, skipped = (steps_of(name, text, settings.timestep) for name, text in
                                 (("time", time), ("every", every), ("skip", skip)))  # fmt: skip
    if not steps:
        raise InputError(f"time is {time}, but must be a step of {settings.timestep:g} fs at least")
    if skipped >= steps:
        raise InputError(f"skip is {skip} of {time}: leave something to average over")
    if row_every < 1:
        raise InputError(f"every is {every}, less than one step: write 10fs or 20steps")
    if seed < 0:
        raise InputError(f"seed is {seed}, but must not be negative")
    if not most_force > 0:
        raise InputError(f"most_force is {most_force}, but must be above zero")
    if pairs is not None and reference is None:
        raise InputError("pairs are those compared with a reference: give one (--reference), or leave pairs out")
    calculator = Calculator(model, device, allow_unseen, part=part)
    atoms = _one(structure, index)
    check_forces(calculator.model, "simulate")
    check_unseen(calculator, [atoms])
    check_fit(settings, atoms, calculator.model)
    pictured = None if reference is None else _reference(read(reference), atoms, pairs, verbose)
    identity = {
        "verb": "md",
        "model": weights_fingerprint(calculator.model),
        "structure": fingerprint([atoms]),
        **settings._asdict(),
        "every": row_every,
        "seed": seed,
        "most_force": most_force,
        **held_atoms([atoms]),
    }
    folder = claim(out, identity)
    assert folder is not None
    if verbose and ensemble == "nve" and not forces_are_derivatives(calculator.model):
        console.print("Forces of this model are no derivatives of its energy: watch the drift, it may heat up.")

    if verbose and (told := told_of_constraints([atoms])):
        console.print(f"[yellow]{told}[/yellow]")
    if has_momenta(atoms):
        atoms.set_momenta(atoms.get_momenta())  # less what constraints take: it would be counted, and gone after a step
    if verbose and not has_momenta(atoms):
        console.print(_told_of_drawing(atoms, settings.temperature), markup=False)
    if settings.engine not in ("verlet", "langevin") and not is_held(atoms) and moves_as_a_whole(atoms):
        hold_still(atoms)
        if verbose:
            turns = "" if atoms.pbc.any() else " or turned"
            console.print(f"The whole moved{turns}, as after Langevin: that motion, which is no heat, is taken away.")

    atoms.calc = calculator
    simulation = Simulation(atoms, settings, seed, folder, row_every, most_force)
    if simulation.step > steps:
        done = simulation.step * settings.timestep / 1000
        raise InputError(f"{folder} already holds {done:g} ps: ask for at least as much, or choose another folder")
    begun, first = clock.perf_counter(), simulation.step
    with bar(not verbose) as progress:
        task = progress.add_task("simulating", total=steps, completed=first, note="")
        for step in simulation.run(steps):
            progress.update(task, completed=step, note=f"{simulation.temperature():.0f} K")
    took = (clock.perf_counter() - begun) / max(simulation.step - first, 1)

    result = {
        "formula": atoms.get_chemical_formula(),
        "n_atoms": len(atoms),
        "forces": "derivatives" if forces_are_derivatives(calculator.model) else "direct",
        "settings": {**settings._asdict(), "time": time, "every": every, "skip": skip, "seed": seed},
        "steps": simulation.step,
        "seconds per step": round(took, 4) if simulation.step > first else None,
        "stopped": simulation.trouble,
        **_observed(folder, settings, atoms, simulation.freedoms, skipped, pictured),
    }
    from ..report.simulation import held_together, page, verdict  # matplotlib takes a second

    report = page(result).write(folder / "simulation.html")
    if verbose:
        style = None if held_together(result) else "bold red"
        console.print(verdict(result), style=style, markup=False, soft_wrap=True)
        console.print(f"Report: {report}", markup=False, soft_wrap=True)
    found: dict[str, Any] = json.loads(report.with_suffix(".json").read_text())
    return found


def _one(structure: ase.Atoms | str | Path, index: int | None) -> ase.Atoms:
    """A copy of the structure, without a calculator."""
    found = [structure] if isinstance(structure, ase.Atoms) else read(structure)
    if index is None and len(found) != 1:
        raise InputError(f"{structure} has {len(found)} structures: choose one with index, where -1 is the last")
    try:
        return found[index or 0].copy()
    except IndexError:
        raise InputError(f"there is no structure {index}: {structure} has {len(found)}") from None


def _told_of_drawing(atoms: ase.Atoms, temperature: float) -> str:
    """That momenta are random, and which array is not taken for them."""
    told = f"The structure has no momenta: it begins with random ones of {temperature:g} K."
    if names := sorted(name for name in atoms.arrays if name.lower() in VELOCITIES):
        told += (
            f" Its {names[0]!r} are not used: give them to atoms.set_velocities of ASE, times {1 / units.fs:.4g} where "
            "they are in Å/fs, and write the file anew."
        )
    return told


def _observed(
    folder: Path, settings: Settings, atoms: ase.Atoms, freedoms: int, skipped: int, reference: _Reference | None
) -> dict[str, Any]:
    """What log and trajectory say, beyond the steps that are skipped."""
    from ase.io import read as ase_read

    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    log = {name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS}
    used = log["step"] >= skipped
    series = {name: log[name] for name in COLUMNS if np.isfinite(log[name]).all()}
    averaged = float(log["time_ps"][-1] - log["time_ps"][used][0]) if used.any() else 0.0
    found: dict[str, Any] = {"log": series, "degrees of freedom": freedoms, "averaged_ps": averaged}
    if not used.any():
        return found
    averages = {"temperature": "temperature_K", "pressure": "pressure_GPa"}
    for name, column in averages.items():
        if column in series:
            found[name] = _as_dict(observables.average(log[column][used]), column.rpartition("_")[2])
    if "conserved_eV" in series:
        slope = observables.drift(log["time_ps"][used], log["conserved_eV"][used], len(atoms))
        found["drift"] = _as_dict(slope, "meV/atom/ps")
    if is_periodic(atoms):
        densities = observables.density(atoms.get_masses(), log["volume_A3"][used])
        only = observables.Estimate(float(densities[0]), np.nan, np.nan)
        found["density"] = _as_dict(observables.average(densities) if settings.ensemble == "npt" else only, "g/cm³")

    frames = [
        one for one in ase_read(folder / "trajectory.extxyz", ":", format="extxyz") if one.info["step"] >= skipped
    ]
    if len(frames) > 3 and settings.ensemble == "npt":
        cells = np.array([one.cell.cellpar() for one in frames])
        shown = CELL if settings.engine == "mtk-shape" else dict(list(CELL.items())[:3])
        found["cell"] = {
            name: _as_dict(observables.average(cells[:, k]), unit) for k, (name, unit) in enumerate(shown.items())
        }
    if len(frames) > 3 and settings.ensemble != "npt":  # there the cell moves the atoms too
        times = log["time_ps"][used] - log["time_ps"][used][0]
        positions, hold = np.array([one.positions for one in frames]), not is_held(atoms)
        displacements = observables.msd(positions, atoms.get_masses(), hold)
        moving = ~fixed(atoms).all(axis=1)
        symbols = np.array(atoms.symbols)
        kinds = {element: moving & (symbols == element) for element in sorted(set(symbols[moving]))}
        if is_periodic(atoms):
            found["diffusion"] = {
                element: _as_dict(observables.diffusion(times, displacements[:, own]), "Å²/ps")
                for element, own in kinds.items()
            }
        means = {element: displacements[:, own].mean(axis=1) for element, own in kinds.items()}
        found["msd"] = {"lag": times, **means}
    if is_periodic(atoms):
        radius = _radius(atoms.cell.array) if reference is None else reference.radius
        chosen = [frames[int(i)] for i in _some(len(frames))]
        rdf = _rdf_of(chosen, radius)
        found["rdf"] = {"r": rdf.r, **rdf.mean()}
        if reference is not None:
            times = np.array([one.info["time_ps"] for one in chosen])
            a_window = max(len(chosen) / max(times[-1] - times[0], 1.0), 1.0)  # has so many frames
            noisy = reference.noisy(a_window)
            scored = {pair: reference.g[pair] for pair in reference.scored if pair not in noisy}
            starts, errors = observables.rdf_errors(times, rdf, scored)
            over = np.flatnonzero(errors > observables.COLLAPSED)
            width = rdf.r[1] - rdf.r[0]
            found["reference"] = {
                "frames": reference.frames,
                "rdf": {pair: reference.g[pair] for pair in rdf.g if pair in reference.g},
                "scored": list(scored),
                "noisy": noisy,
                "uneven": [pair for pair in reference.uneven if pair in scored],
                "errors": {p: float(np.abs(rdf.mean()[p] - g).sum() * width) for p, g in scored.items()},
                "windows": {"begin": starts, "error": errors},
                "collapsed": float(starts[over[0]]) if len(over) else None,
            }
    return found


def _as_dict(estimate: observables.Estimate, unit: str) -> dict[str, Any]:
    return {**estimate._asdict(), "unit": unit}


class _Reference(NamedTuple):
    g: dict[str, np.ndarray]  # pair to (n_bins,)
    radius: float
    frames: int
    scored: list[str]  # pairs
    named: bool  # whether they were asked for
    uneven: list[str]  # those of them that few atoms make, in cells of other sizes
    noise: dict[str, float]  # pair to the area between the function of one frame and that of all, in Å

    def noisy(self, frames: float) -> list[str]:
        """Pairs that nobody asked for, and of which so many frames, even of the reference, would look collapsed."""
        if self.named:
            return []
        return [pair for pair in self.scored if self.noise[pair] / frames**0.5 > observables.COLLAPSED / 2]


def _reference(frames: Sequence[ase.Atoms], atoms: ase.Atoms, pairs: Sequence[str] | None, verbose: bool) -> _Reference:
    """Radial distribution functions of frames, as far as they and the simulated cell go."""
    usable = [frames[i] for i in range(len(frames)) if is_periodic(frames[i])]
    if not (is_periodic(atoms) and usable):
        raise InputError("radial distribution functions need cells: give a reference and a structure that are periodic")
    if verbose and (lone := len(frames) - len(usable)):
        console.print(f"{lone} of {len(frames)} frames of the reference are not periodic, and are left out")
    radius = min(_radius(one.cell.array) for one in [atoms, *usable])
    chosen = _some(len(usable))
    each = [_rdf_of([usable[i]], radius).mean() for i in chosen]
    g = {
        pair: np.mean([one[pair] for one in each if pair in one], axis=0)
        for pair in {p: 0 for one in each for p in one}
    }
    empty = _rdf_of([atoms], radius)
    own, width = set(empty.g) & set(g), empty.r[1] - empty.r[0]
    if not own:
        raise InputError(
            "structure and reference have no pair of elements in common, which takes two atoms in each: repeat cells "
            "of one atom, or leave the reference out"
        )
    scored = sorted(own) if pairs is None else [observables.pair_name(*_elements(pair)) for pair in pairs]
    if missing := [pair for pair in scored if pair not in own]:
        raise InputError(f"structure and reference do not both have {missing[0]}: choose pairs among {sorted(own)}")
    amounts = [Counter(one.symbols) for one in [atoms, *(usable[i] for i in chosen)]]
    alike = {
        pair: {each[pair.partition("-")[0]] for each in amounts} for pair in scored if len(set(pair.split("-"))) == 1
    }
    uneven = [pair for pair, counts in alike.items() if len(counts) > 1 and min(counts) < FEW_ATOMS]
    noise = {
        pair: float(np.mean([np.abs(one[pair] - g[pair]).sum() * width for one in each if pair in one]))
        for pair in scored
    }
    return _Reference(g, radius, len(chosen), scored, pairs is not None, uneven, noise)


def _elements(pair: str) -> tuple[str, str]:
    a, dash, b = pair.partition("-")
    if not (a and dash and b):
        raise InputError(f"'{pair}' is no pair of elements: write O-O or O-H")
    return a, b


def _radius(cell: np.ndarray) -> float:
    return float(np.clip(observables.widths(cell).min() / 2, *RDF_RADIUS))


def _some(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, MOST_FRAMES)).astype(int))


def _rdf_of(frames: Sequence[ase.Atoms], radius: float) -> observables.Rdf:
    positions, cells = np.array([one.positions for one in frames]), np.array([one.cell.array for one in frames])
    return observables.rdf(positions, cells, frames[0].numbers, radius)
