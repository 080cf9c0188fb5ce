"""Make the water that ships with transfermium: boxes of TIP3P at 300 K, for pre-training without labels.

    nice python datasets/water/generate.py --out src/transfermium/waters

Needs OpenMM (`pip install 'transfermium[water]'`), and takes about a quarter of an hour on one core. Every frame is
kept as soon as it is there, and follows from the one before it and its own seed: the same command goes on where it was
stopped, with the frames that it would have made anyway.

OpenMM, because it comes as one wheel that brings the force field along (`tip3p.xml`), keeps rigid water rigid (SETTLE),
and has PME; ASE's TIP3P has rigid molecules and a cutoff only. Nothing else of the package needs it.

Settings. Cubic cells of 0.997 g/cm³ (64 molecules: 12.43 Å, 258: 19.78 Å), fixed volume. PME; beyond the cutoff, 6 Å
and 9 Å, there is no Lennard-Jones but a constant. Rigid molecules have 0.9572 Å and 104.52°, flexible ones harmonic
bonds and angles about these (`rigidWater=False`). LangevinMiddleIntegrator, 300 K, 1/ps; 2 fs if rigid, 0.5 fs if
flexible. Molecules start on a grid, randomly turned, are relaxed, and equilibrated for 12 ps; then comes a frame every
1 to 2 ps (`BOXES`). Molecules are whole, their oxygen in the cell, in the order O H H; positions are rounded to 1e-4 Å.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ase
import ase.io
import numpy as np
import openmm
from ase import units
from openmm import app, unit
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.spatial.transform import Rotation

DENSITY = 0.997  # g/cm³
TEMPERATURE = 300.0  # K
FRICTION = 1.0  # 1/ps
EQUILIBRATION = 12.0  # ps
BOND, ANGLE = 0.9572, np.radians(104.52)  # Å
CUTOFF = {64: 6.0, 258: 9.0}  # Å
SEED = 2026


class Box(NamedTuple):
    """One of the sets of frames."""

    rigid: bool
    molecules: int
    frames: int
    spacing: float  # of the frames, in ps

    @property
    def name(self) -> str:
        return f"{'rigid' if self.rigid else 'flexible'}-{self.molecules}"

    @property
    def length(self) -> float:
        """Of the edges, in Å."""
        grams = self.molecules * ase.Atoms("OH2").get_masses().sum() * units._amu * 1e3
        return float((grams / DENSITY) ** (1 / 3) * 1e8)

    @property
    def time_step(self) -> float:
        """In ps."""
        return 2e-3 if self.rigid else 0.5e-3

    def seed(self, frame: int) -> int:
        return int(np.random.SeedSequence([SEED, self.rigid, self.molecules, frame]).generate_state(1)[0] >> 1)


BOXES = (Box(False, 64, 200, 1.5), Box(True, 64, 100, 2.0), Box(True, 258, 20, 2.0), Box(False, 258, 20, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed extended XYZ files")
    parser.add_argument("--only", nargs="*", choices=[box.name for box in BOXES], help="all by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for box in BOXES:
            target, begun = args.out / f"{box.name}.extxyz.xz", args.out / f"{box.name}.npz"
            if target.exists() or (args.only and box.name not in args.only):
                continue
            task = progress.add_task(box.name, total=box.frames)
            for positions in trajectory(box, begun):
                progress.update(task, completed=len(positions))
            text = io.StringIO()
            ase.io.write(text, structures(box, positions), format="extxyz")
            replace(target, lzma.compress(text.getvalue().encode(), preset=9 | lzma.PRESET_EXTREME))
            begun.unlink()


def trajectory(box: Box, begun: Path) -> Iterator[np.ndarray]:
    """All frames so far, (n_frames, n_atoms, 3) in Å, each time that there is one more; they are kept in `begun`."""
    simulation = simulated(box)
    context = simulation.context
    if begun.exists():
        with np.load(begun) as kept:
            frames, positions, velocities = [*kept["frames"]], kept["positions"], kept["velocities"]
    else:
        frames, positions, velocities = [], start(box), None
    if frames:
        yield np.array(frames)

    while len(frames) < box.frames:
        first = not frames
        simulation.integrator.setRandomNumberSeed(box.seed(len(frames)))
        context.reinitialize()
        context.setPositions(positions)
        if first:
            simulation.minimizeEnergy()
            context.setVelocitiesToTemperature(TEMPERATURE, box.seed(len(frames)))
        else:
            context.setVelocities(velocities)
        simulation.integrator.step(round((EQUILIBRATION if first else box.spacing) / box.time_step))
        state = context.getState(positions=True, velocities=True)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
        frames.append(10 * positions)
        content = io.BytesIO()
        np.savez(content, frames=frames, positions=positions, velocities=velocities)
        replace(begun, content.getvalue())
        yield np.array(frames)


def simulated(box: Box) -> app.Simulation:
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(box.molecules):
        residue = topology.addResidue("HOH", chain)
        o, h1, h2 = (topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2"))
        topology.addBond(o, h1)
        topology.addBond(o, h2)
    topology.setUnitCellDimensions([box.length / 10] * 3 * unit.nanometer)
    system = app.ForceField("tip3p.xml").createSystem(
        topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=CUTOFF[box.molecules] * unit.angstrom,
        rigidWater=box.rigid,
    )
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, FRICTION, box.time_step)
    platform = openmm.Platform.getPlatformByName("CPU")
    return app.Simulation(topology, system, integrator, platform, {"Threads": "1", "DeterministicForces": "true"})


def start(box: Box) -> np.ndarray:
    """Molecules in random orientations on points of a cubic grid, in nm."""
    rng = np.random.default_rng(box.seed(0))
    side = int(np.ceil(box.molecules ** (1 / 3) - 1e-9))
    points = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)
    oxygens = rng.permutation(points)[: box.molecules] * box.length / side
    molecule = BOND * np.array([[0, 0, 0], [1, 0, 0], [np.cos(ANGLE), np.sin(ANGLE), 0]])
    turned = Rotation.random(box.molecules, rng).as_matrix() @ molecule.T  # (n_molecules, 3, 3), atoms last
    return (oxygens[:, None] + turned.transpose(0, 2, 1)).reshape(-1, 3) / 10


def structures(box: Box, frames: np.ndarray) -> list[ase.Atoms]:
    found = []
    for frame, positions in enumerate(frames):
        molecules = positions.reshape(-1, 3, 3)
        whole = molecules - box.length * np.floor(molecules[:, :1] / box.length)
        atoms = ase.Atoms("OH2" * box.molecules, np.round(whole, 4).reshape(-1, 3), cell=[box.length] * 3, pbc=True)
        atoms.info = {"source": "TIP3P", "rigid": box.rigid, "frame": frame}
        found.append(atoms)
    return found


def replace(path: Path, content: bytes) -> None:
    """Write a file that is never there in part."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


if __name__ == "__main__":
    main()
