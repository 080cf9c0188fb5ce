"""Atoms in time: the integrators of ASE, watched at every step, with a state that can be resumed."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import safetensors.numpy
from ase import units
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from .. import observables
from ..calculator import Calculator
from ..data.labels import KEYS
from ..errors import InputError
from ..evaluate import unseen_elements
from ..model import Gradient, Model, read_tensors, write_whole
from ..run import plain

FINAL, LAST_GOOD = "final.extxyz", "last_good.extxyz"  # there is one of them in the end
SAVED = 100  # steps between states that can be resumed
FASTEST = 0.5  # Å that an atom may move in a step
HOTTEST = (10.0, 1000.0)  # times the temperature asked for, plus K
KEPT = {"FixAtoms", "FixCartesian"}  # constraints that extended XYZ holds
LABELS = {*all_properties, *(name for names in KEYS.values() for name in names)}
INNER = {"FixCom", "FixBondLengths", "FixLinearTriatomic", "FixInternals", "ExternalForce"}  # tie no atom to a place
STRETCHED = 8.0  # times the first volume, or a fraction of it

TAU, TAU_PRESSURE = "100fs", "1ps"  # where none is given
TIMES = {"fs": 1.0, "ps": 1e3, "ns": 1e6}  # in fs
PRESSURES = {"GPa": units.GPa, "kbar": 0.1 * units.GPa, "bar": 1e-4 * units.GPa, "atm": 101325 * units.Pascal}

COLUMNS = (
    "step", "time_ps", "temperature_K", "potential_eV", "kinetic_eV", "total_eV", "conserved_eV", "pressure_GPa",
    "volume_A3",
)  # fmt: skip


class Settings(NamedTuple):
    """A simulation in numbers: fs, K and eV/Å³."""

    ensemble: str
    engine: str
    temperature: float
    timestep: float
    pressure: float | None
    tau: float | None
    tau_pressure: float | None


class Simulation:
    """Atoms in time, with everything that a resumed run needs in one file."""

    def __init__(
        self, atoms: ase.Atoms, settings: Settings, seed: int, folder: Path, row_every: int, most_force: float
    ):
        self.atoms = atoms
        self.settings = settings
        self.folder = folder
        self.row_every = row_every
        self.most_force = most_force
        self.rng = np.random.default_rng(seed)
        self.freedoms = freedoms_of(atoms, settings.engine)
        self.step = 0
        self.trouble: str | None = None
        self.log, self.trajectory = folder / "log.csv", folder / "trajectory.extxyz"
        self.first_volume = atoms.get_volume() if atoms.cell.rank == 3 else 0.0
        self.bonded = np.zeros(len(atoms), bool)
        self.bonded[atoms.calc.edges.neighbors(atoms).receivers] = True
        if not has_momenta(atoms):
            _draw_momenta(atoms, settings.temperature, self.freedoms, self.rng)
        self.hottest = HOTTEST[0] * max(settings.temperature, self.temperature()) + HOTTEST[1]

        saved = folder / "state.safetensors"
        if saved.exists():
            self._restore(saved)
        else:
            self._begin()

    def run(self, steps: int) -> Iterator[int]:
        """Go on to this step, which comes out at every row of the log; ends earlier where something is wrong."""
        while self.step < steps:
            good = self.atoms.get_positions(), self.atoms.get_momenta(), self.atoms.cell.array.copy()
            try:
                with np.errstate(all="ignore"):  # what is no number any more is found below
                    self.engine.step()
                    wrong = self._what_is_wrong()
            except InputError as error:
                wrong = self._why_it_cannot_go_on(str(error), good[0])
            self.step += 1
            if wrong:
                self._stop(wrong, *good)
                return
            due = self.step % self.row_every == 0
            if due:
                self._record()
            if self.step % SAVED == 0 or self.step == steps:
                self._save()
            if due or self.step == steps:
                yield self.step
        write_frame(self.folder / FINAL, self._frame())
        (self.folder / LAST_GOOD).unlink(missing_ok=True)

    def temperature(self) -> float:
        return float(observables.temperature(self.atoms.get_kinetic_energy(), self.freedoms))

    def _begin(self) -> None:
        force, who = self._largest_force()
        if not force < self.most_force:
            raise InputError(
                f"the structure begins with a force of {force:.3g} eV/Å on {self._name(who)}, more than "
                f"{self.most_force:g}: relax it first, or raise most_force"
            )
        self.engine = _engine(self.atoms, self.settings, self.rng, self.freedoms)
        self.log.write_text(",".join(COLUMNS) + "\n")
        self.trajectory.write_bytes(b"")
        self._record()
        self._save()

    def _save(self) -> None:
        """Write the state at once or not at all, and go on from it as a resumed run would: with a new search for
        neighbours, which may find them in another order."""
        sizes = {}
        for file in (self.log, self.trajectory):
            with file.open("rb+") as open_file:
                os.fsync(open_file.fileno())
                sizes[file.name] = open_file.seek(0, os.SEEK_END)
        atoms = self.atoms
        arrays = {"positions": atoms.get_positions(), "momenta": atoms.get_momenta(), "cell": atoms.cell.array}
        arrays |= {name: np.array(attrgetter(name)(self.engine), float) for name in STATE[self.settings.engine]}
        told = {"step": self.step, "rng": self.rng.bit_generator.state, "sizes": sizes}
        content = safetensors.numpy.save(arrays, {"state": json.dumps(told)})
        write_whole(self.folder / "state.safetensors", content)
        _begin_anew(atoms)

    def _restore(self, file: Path) -> None:
        tensors, about = read_tensors(file)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        told = json.loads(about["state"])
        self.step, sizes = told["step"], told["sizes"]
        self.atoms.set_cell(arrays["cell"])
        self.atoms.set_positions(arrays["positions"], apply_constraint=False)
        self.atoms.set_momenta(arrays["momenta"], apply_constraint=False)
        self.engine = _engine(self.atoms, self.settings, self.rng, self.freedoms)
        for name in STATE[self.settings.engine]:
            owner, _, leaf = name.rpartition(".")
            value = arrays[name]
            setattr(
                attrgetter(owner)(self.engine) if owner else self.engine, leaf, value if value.ndim else float(value)
            )
        self.rng.bit_generator.state = told["rng"]
        for path in (self.log, self.trajectory):
            if not path.exists() or path.stat().st_size < sizes[path.name]:
                raise InputError(f"{path} is shorter than it was: delete {self.folder} and give the command again")
            os.truncate(path, sizes[path.name])

    def _record(self) -> None:
        atoms = self.atoms
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        conserved, pressure = CONSERVED[self.settings.engine](self.engine, potential + kinetic), None
        if has_stress(atoms):
            stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
            pressure = -np.trace(stress) / 3 / units.GPa
        volume = atoms.get_volume() if atoms.cell.rank == 3 else None
        time = self.step * self.settings.timestep / 1000
        values = (time, self.temperature(), potential, kinetic, potential + kinetic, conserved, pressure, volume)
        cells = [str(self.step), *("" if value is None else f"{value:.12g}" for value in values)]
        with self.log.open("a") as file:
            file.write(",".join(cells) + "\n")
        with self.trajectory.open("a") as file:
            file.write(as_text(self._frame()))

    def _frame(self) -> ase.Atoms:
        frame = self.atoms.copy()
        frame.info = {"step": self.step, "time_ps": self.step * self.settings.timestep / 1000}
        kept = ("numbers", "positions", "momenta", "masses")
        frame.arrays = {name: values for name, values in frame.arrays.items() if name in kept}
        return frame

    def _what_is_wrong(self) -> str | None:
        """With the atoms after a step, in words that follow the step."""
        force, who = self._largest_force()
        if not force < self.most_force:
            return f"the force on {self._name(who)} is {force:.3g} eV/Å, more than {self.most_force:g}"
        moved = np.linalg.norm(self.atoms.get_velocities(), axis=1) * self.settings.timestep * units.fs
        if not (fastest := moved.max()) < FASTEST:
            return f"{self._name(int(moved.argmax()))} moved by {fastest:.3g} Å in one step"
        if not (temperature := self.temperature()) < self.hottest:
            return f"the temperature is {temperature:.0f} K, with the largest force on {self._name(who)}"
        stretched = self.atoms.get_volume() / self.first_volume if self.first_volume else 1.0
        if not 1 / STRETCHED < stretched < STRETCHED:
            return f"the volume is {stretched:.3g} times what it was, with the largest force on {self._name(who)}"
        if (self.step + 1) % self.row_every == 0:
            alone = self.bonded.copy()
            alone[self.atoms.calc.edges.neighbors(self.atoms).receivers] = False
            if alone.any():
                radius = self.atoms.calc.edges.radius
                return f"{self._name(int(alone.argmax()))} has left all others: none is within {radius:g} Å"
        return None

    def _why_it_cannot_go_on(self, error: str, before: np.ndarray) -> str:
        """With atoms that no graph can be made of; what the error advises for files is no use here."""
        moved = np.linalg.norm(self.atoms.get_positions() - before, axis=1)
        who = int(np.argmax(np.where(np.isfinite(moved), moved, np.inf)))
        return f"{self._name(who)} moved by {moved[who]:.3g} Å in one step, and {error.partition(': ')[0]}"

    def _stop(self, wrong: str, positions: np.ndarray, momenta: np.ndarray, cell: np.ndarray) -> None:
        at = f"step {self.step} ({self.step * self.settings.timestep / 1000:g} ps)"
        self.step -= 1
        self.atoms.set_cell(cell)
        self.atoms.set_positions(positions, apply_constraint=False)
        self.atoms.set_momenta(momenta, apply_constraint=False)
        file = self.folder / LAST_GOOD
        write_frame(file, self._frame())
        (self.folder / FINAL).unlink(missing_ok=True)  # of a shorter time
        self.trouble = f"the simulation exploded at {at}: {wrong}; the frame before is in {file}"

    def _largest_force(self) -> tuple[float, int]:
        forces = np.linalg.norm(self.atoms.get_forces(apply_constraint=False), axis=1)
        who = int(np.argmax(np.where(np.isfinite(forces), forces, np.inf)))
        return float(forces[who]), who

    def _name(self, atom: int) -> str:
        return f"atom {atom} ({self.atoms.symbols[atom]})"


STATE: dict[str, tuple[str, ...]] = {  # what engines know beside positions and momenta
    "verlet": (),
    "langevin": (),
    "bussi": ("transferred_energy",),
    "nose-hoover": ("_thermostat._eta", "_thermostat._p_eta"),
    "mtk": (
        "_thermostat._eta", "_thermostat._p_eta", "_barostat._xi", "_barostat._p_xi", "_eps", "_p_eps", "_cell0",
        "_volume0",
    ),
    "mtk-shape": ("_thermostat._eta", "_thermostat._p_eta", "_barostat._xi", "_barostat._p_xi", "_p_g"),
}  # fmt: skip

CONSERVED: dict[str, Callable[[Any, float], float | None]] = {
    "verlet": lambda engine, total: total,
    "langevin": lambda engine, total: None,
    "bussi": lambda engine, total: total - engine.transferred_energy,
    "nose-hoover": lambda engine, total: engine.get_conserved_energy(),
    "mtk": lambda engine, total: engine.get_conserved_energy(),
    "mtk-shape": lambda engine, total: engine.get_conserved_energy(),
}


def settings_of(
    ensemble: str,
    thermostat: str | None,
    temperature: float,
    pressure: str | None,
    timestep: str,
    tau: str | None = None,
    slow: str | None = None,
    shape: bool = False,
) -> Settings:
    if ensemble not in ("nve", "nvt", "npt"):
        raise InputError(f"there is no ensemble '{ensemble}': choose nve, nvt or npt")
    if thermostat not in (None, "langevin", "bussi", "nose-hoover"):
        raise InputError(f"there is no thermostat '{thermostat}': choose langevin, bussi or nose-hoover")
    if thermostat is not None and ensemble != "nvt":
        raise InputError(f"{ensemble} has no choice of thermostats: leave out {thermostat}, or choose nvt")
    if (pressure is not None) != (ensemble == "npt"):
        raise InputError("a pressure, such as 1bar, goes with npt and only with it: change one of them")
    if tau is not None and ensemble == "nve":
        raise InputError("nve has no thermostat that acts in a time tau: leave tau out, or choose nvt")
    if slow is not None and ensemble != "npt":
        raise InputError(f"{ensemble} has no barostat: leave tau_pressure (--tau-pressure) out, or choose npt")
    if shape and ensemble != "npt":
        raise InputError(
            f"the shape of a cell changes under a pressure, not in {ensemble}: leave shape out, or choose npt"
        )
    if not 0 <= temperature < 1e5 or (temperature == 0 and ensemble != "nve"):
        raise InputError(f"a temperature of {temperature} K makes no sense: choose one above zero and below 100,000")
    step = _femtoseconds("timestep", timestep)
    tau_fs = _femtoseconds("tau", TAU if tau is None else tau)
    slow_fs = _femtoseconds("tau_pressure", TAU_PRESSURE if slow is None else slow)
    if not 0 < step <= 20:
        raise InputError(f"a timestep of {timestep} makes no sense: 0.5fs suits hydrogen, 2fs heavy atoms")
    if min(tau_fs, slow_fs) < 5 * step:
        raise InputError(f"tau is less than five timesteps of {timestep}: 100fs and 1ps (of a pressure) are usual")
    engine = {"nve": "verlet", "npt": "mtk-shape" if shape else "mtk"}.get(ensemble) or thermostat or "langevin"
    return Settings(
        ensemble, engine, float(temperature), step,
        None if pressure is None else _pressure(pressure),
        None if ensemble == "nve" else tau_fs, slow_fs if ensemble == "npt" else None,
    )  # fmt: skip


def steps_of(name: str, text: str, timestep: float) -> int:
    if str(text).strip().endswith("steps"):
        with suppress(ValueError):
            if (count := int(str(text).strip().removesuffix("steps"))) >= 0:
                return count
        raise InputError(f"{name} is '{text}', which is no number of steps: write 100steps")
    steps = _femtoseconds(name, text) / timestep
    if steps < 0 or abs(steps - round(steps)) > 1e-6 * max(steps, 1):
        raise InputError(f"{name} is {text}, which is no whole number of steps of {timestep:g} fs: change one of them")
    return round(steps)


def _femtoseconds(name: str, text: str) -> float:
    for unit, size in TIMES.items():
        if str(text).strip().endswith(unit):
            with suppress(ValueError):
                if math.isfinite(found := float(str(text).strip().removesuffix(unit)) * size):
                    return found
    raise InputError(f"{name} is '{text}', which is no time: write 0.5fs, 2ps or 1ns")


def _pressure(text: str) -> float:
    for unit in ("GPa", "kbar", "bar", "atm"):
        if text.strip().endswith(unit):
            with suppress(ValueError):
                if math.isfinite(found := float(text.strip().removesuffix(unit)) * PRESSURES[unit]):
                    return found
    raise InputError(f"'{text}' is no pressure: write 1bar, 1atm or 0.1GPa")


def check_fit(settings: Settings, atoms: ase.Atoms, model: Model) -> None:
    if settings.ensemble == "npt" and not is_periodic(atoms):
        raise InputError("npt needs a structure that is periodic in three directions: choose nvt")
    if settings.ensemble == "npt" and "stress" not in model.outputs:
        raise InputError("npt needs a model with stress: train it on stresses, or choose nvt")
    if settings.engine in ("nose-hoover", "mtk", "mtk-shape") and atoms.constraints:
        raise InputError("nose-hoover and npt keep no constraints: choose langevin, or remove them from the structure")
    if freedoms_of(atoms, settings.engine) < 1:
        raise InputError("nothing in this structure can move: simulate one with more atoms or fewer constraints")


def check_forces(model: Model, doing: str) -> None:
    meaning = model.card.get("quantities", {}).get("forces", ["forces"])[0]
    if "forces" not in model.outputs or meaning != "forces":
        raise InputError(f"this model has no forces to {doing} with: train it with the Potential objective")


def check_unseen(calculator: Calculator, structures: Sequence[ase.Atoms]) -> None:
    """Refuse what the calculator would, before any work."""
    for index in range(0 if calculator.allow_unseen else len(structures)):
        if unseen := unseen_elements(calculator.model, structures[index].numbers):
            raise InputError(
                f"structure {index} has {', '.join(unseen)}, which the model never saw: train on structures with these "
                "elements, or pass allow_unseen=True (--allow-unseen)"
            )


def forces_are_derivatives(model: Model) -> bool:
    return isinstance(model.outputs["forces"], Gradient)


def held_atoms(structures: Sequence[ase.Atoms]) -> dict[str, Any]:
    """Constraints, as far as there are any: they make a run another one."""
    told = {str(i): [_told_of(one) for one in structures[i].constraints] for i in range(len(structures))}
    return {"constraints": found} if (found := {i: each for i, each in told.items() if each}) else {}


def _told_of(constraint: Any) -> Any:
    return plain(constraint.todict()) if hasattr(constraint, "todict") else type(constraint).__name__


def told_of_constraints(structures: Sequence[ase.Atoms]) -> str:
    """Those that files of structures cannot hold, in a sentence; nothing where there are none."""
    kinds = {type(one).__name__ for i in range(len(structures)) for one in structures[i].constraints}
    if not (lost := sorted(kinds - KEPT)):
        return ""
    return (
        f"{', '.join(lost)}: obeyed here, but extended XYZ cannot hold such constraints: set them anew where you go on "
        "from a file"
    )


def has_stress(atoms: ase.Atoms) -> bool:
    return is_periodic(atoms) and "stress" in atoms.calc.model.outputs


def is_periodic(atoms: ase.Atoms) -> bool:
    return bool(atoms.pbc.all()) and atoms.cell.rank == 3


def ended(
    atoms: ase.Atoms, converged: bool, steps: int, first: float | None, results: dict[str, Any], trouble: str | None
) -> ase.Atoms:
    """The structure with what became of it, in place of labels and momenta that it had before; `first` is the energy it
    began with, None where there was none."""
    for name in (*LABELS, "momenta"):
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.info |= {"relaxed": converged, "relax_steps": steps}
    if first is not None:
        atoms.info["relax_energy_change"] = float(results["energy"] - first)
    if trouble:
        atoms.info["relax_trouble"] = trouble
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def as_text(atoms: ase.Atoms) -> str:
    from ase.io.extxyz import write_xyz

    text = io.StringIO()
    write_xyz(text, [atoms])
    return text.getvalue()


def write_frame(path: Path, atoms: ase.Atoms) -> None:
    write_whole(path, as_text(atoms).encode())


def _engine(atoms: ase.Atoms, settings: Settings, rng: np.random.Generator, freedoms: int) -> Any:
    """ASE's integrator, which acts on as many degrees of freedom as are given."""
    step, kelvin = settings.timestep * units.fs, settings.temperature
    if settings.engine == "verlet":
        from ase.md.verlet import VelocityVerlet

        return VelocityVerlet(atoms, step)
    assert settings.tau is not None
    tau = settings.tau * units.fs
    if settings.engine == "langevin":
        from ase.md.langevin import Langevin

        return Langevin(atoms, step, temperature_K=kelvin, friction=1 / tau, fixcm=False, rng=rng)
    if settings.engine == "bussi":
        from ase.md.bussi import Bussi

        bussi = Bussi(atoms, step, temperature_K=kelvin, taut=tau, rng=rng)
        bussi.ndof, bussi.target_kinetic_energy = freedoms, freedoms / 2 * units.kB * kelvin
        return bussi
    try:
        from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
    except ImportError:
        raise InputError("nose-hoover and npt need ASE 3.26 or newer: pip install -U ase") from None
    chain: Any
    if settings.engine == "nose-hoover":
        chain = NoseHooverChainNVT(atoms, step, temperature_K=kelvin, tdamp=tau)
    else:
        assert settings.pressure is not None and settings.tau_pressure is not None
        chain = (IsotropicMTKNPT if settings.engine == "mtk" else MTKNPT)(
            atoms, step, temperature_K=kelvin, pressure_au=settings.pressure, tdamp=tau,
            pdamp=settings.tau_pressure * units.fs,
        )  # fmt: skip
        chain._num_atoms_global = freedoms / 3
    chain._thermostat._num_atoms_global = freedoms / 3  # three less than ASE counts: the whole does not move
    return chain


def _begin_anew(atoms: ase.Atoms) -> None:
    """Let the calculator forget what it found, but not what it is asked for."""
    calculator: Calculator = atoms.calc
    calculator.reset()
    calculator.search = calculator.edges.search(calculator.skin)
    calculator.usual = {"forces"} | ({"stress"} if has_stress(atoms) else set())


def freedoms_of(atoms: ase.Atoms, engine: str) -> int:
    """Along which the atoms move: all that constraints leave with Langevin, else not those of the whole, unless it is
    held, or was moving in the beginning and no thermostat is there to be misled."""
    others = [one for one in atoms.constraints if _kind(one) not in KEPT]
    left = 3 * len(atoms) - int(fixed(atoms).sum()) - sum(_taken(one, atoms) for one in others)
    if engine == "langevin" or is_held(atoms) or (engine == "verlet" and moves_as_a_whole(atoms)):
        return left
    if not any(_kind(one) == "FixCom" for one in atoms.constraints):  # which has taken them already
        left -= 3
    if atoms.pbc.any():
        return left
    turns = np.linalg.matrix_rank(atoms.positions - atoms.positions.mean(axis=0), tol=1e-3)
    return left - (0, 2, 3, 3)[turns]


def _taken(constraint: Any, atoms: ase.Atoms) -> int:
    """Degrees of freedom that a constraint takes."""
    try:
        return int(constraint.get_removed_dof(atoms))
    except (AttributeError, NotImplementedError):
        raise InputError(
            f"md cannot count what {_kind(constraint)} holds: remove it or choose another constraint"
        ) from None


def _kind(constraint: Any) -> str:
    return type(constraint).__name__


def is_held(atoms: ase.Atoms) -> bool:
    """Whether constraints tie atoms to places, so that the whole cannot move freely."""
    free = [one for one in atoms.constraints if _kind(one) in INNER]
    free += [one for one in atoms.constraints if _kind(one) == "Hookean" and np.size(one.get_indices()) == 2]
    return len(free) < len(atoms.constraints)


def fixed(atoms: ase.Atoms) -> np.ndarray:
    """Which components of positions cannot change, as far as atoms are fixed one by one: (n_atoms, 3)."""
    found = np.zeros((len(atoms), 3), bool)
    for one in atoms.constraints:
        if _kind(one) in KEPT:
            left = np.ones(found.shape)
            one.adjust_forces(atoms, left)
            found |= left == 0
    return found


def has_momenta(atoms: ase.Atoms) -> bool:
    return atoms.has("momenta") and bool(np.any(atoms.get_momenta()))


def moves_as_a_whole(atoms: ase.Atoms) -> bool:
    """Whether more than rounding of the kinetic energy is the motion of the whole, or its turning."""
    if not has_momenta(atoms):
        return False
    still = atoms.copy()
    hold_still(still)
    return bool(still.get_kinetic_energy() < (1 - 1e-6) * atoms.get_kinetic_energy())


def hold_still(atoms: ase.Atoms) -> None:
    """Take away the momentum of the whole, and its turning where it is not periodic."""
    masses, momenta = atoms.get_masses()[:, None], atoms.get_momenta()
    momenta -= masses * momenta.sum(axis=0) / masses.sum()
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        inertia = (
            np.einsum("n,nij->ij", masses[:, 0], np.eye(3) * (arms**2).sum(axis=1)[:, None, None])
            - (masses * arms).T @ arms
        )
        spin = np.linalg.pinv(inertia, rcond=1e-9, hermitian=True) @ np.cross(arms, momenta).sum(axis=0)
        momenta -= masses * np.cross(spin, arms)
    atoms.set_momenta(momenta, apply_constraint=False)


def _draw_momenta(atoms: ase.Atoms, temperature: float, freedoms: int, rng: np.random.Generator) -> None:
    """Random ones of exactly this temperature, with which the whole neither moves nor turns unless it is held."""
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * np.sqrt(atoms.get_masses() * units.kB)[:, None])
    if not is_held(atoms):
        hold_still(atoms)
    now = float(observables.temperature(atoms.get_kinetic_energy(), freedoms))
    atoms.set_momenta(atoms.get_momenta() * np.sqrt(temperature / now) if now > 0 else np.zeros((len(atoms), 3)))
