"""Pairs of similar structures: between two of them the energy changes by the work of forces and stress.

The mid-point rule, dE = -(F_a + F_b)/2 · dx + (V_a σ_a + V_b σ_b)/2 : dε, needs no level of theory. It holds to second
order, and exactly where the energy is quadratic: for frames of a trajectory, relaxations, volume scans, strained cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .base import Case

MOST_FRAMES = 240  # of one substance that are compared with each other
MOST_PAIRS = 300  # of one substance
MOST_WORK = 40_000_000  # coordinates that are compared in all
FARTHEST = 0.25  # Å, root mean square displacement
LARGEST_STRAIN = 0.04
SHEAR = ([1, 0, 0], [2, 2, 1])  # yz, xz, xy


class Pairs(NamedTuple):
    """Pairs of similar structures, the closest first; energies in eV."""

    a: np.ndarray
    b: np.ndarray
    distance: np.ndarray  # Å, root mean square
    strain: np.ndarray  # largest component
    change: np.ndarray  # of the energy
    by_forces: np.ndarray  # work
    by_stress: np.ndarray  # NaN without stress
    shears: np.ndarray  # twice the strain in yz, xz, xy: (n, 3)
    virials: np.ndarray  # volume times stress in yz, xz, xy: (n, 3)

    def only(self, chosen: np.ndarray) -> Pairs:
        return Pairs(*(array[chosen] for array in self))


def similar(case: Case, indices: np.ndarray) -> Pairs:
    """Pairs of the same atoms in the same order, a little displaced, turned or strained, among these structures."""
    key = ("pairs", indices.tobytes())
    if key not in case.kept:
        case.kept[key] = _similar(case, indices)
    found: Pairs = case.kept[key]
    return found


def _similar(case: Case, indices: np.ndarray) -> Pairs:
    groups: dict[tuple[bytes, bool, bool], list[int]] = {}
    known = np.isfinite(case.energy) & (case.periodic | ~np.array([a.pbc.any() for a in case.atoms]))
    for i in indices[known[indices]].tolist():
        if case.n_atoms[i] > 1:
            at = case.atoms[i]
            groups.setdefault((at.numbers.tobytes(), bool(case.periodic[i]), bool(case.has_forces[i])), []).append(i)
    found, work = [], 0
    for (_, periodic, _), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        if len(members) < 2 or work > MOST_WORK:
            continue
        one = np.array(members[:MOST_FRAMES])
        work += 3 * case.n_atoms[one[0]] * len(one) ** 2 // 2
        found.append(_of_crystal(case, one) if periodic else _of_molecule(case, one))
    if not found:
        return Pairs(*(np.zeros(0, int),) * 2, *(np.zeros(0),) * 5, *(np.zeros((0, 3)),) * 2)
    joined = Pairs(*map(np.concatenate, zip(*found, strict=True)))
    return joined.only(np.argsort(joined.distance + 5 * joined.strain, kind="stable"))


def _stacked(case: Case, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    positions = np.array([case.atoms[i].positions for i in members])
    forces = np.array([case.forces[case.first[i] : case.first[i + 1]] for i in members])
    return positions, forces


def _of_crystal(case: Case, members: np.ndarray) -> Pairs:
    positions, forces = _stacked(case, members)
    cells = np.array([case.atoms[i].cell.array for i in members])
    inside = positions @ np.linalg.inv(cells)
    virial = case.volume[members, None, None] * case.stress[members]
    first, second = np.triu_indices(len(members), 1)
    strain = np.concatenate([_strain(cells, f, s) for f, s in _chunks(first, second, 9)])
    near = np.abs(strain).max(axis=(1, 2)) < LARGEST_STRAIN
    first, second, strain = first[near], second[near], strain[near]
    chunks = _chunks(first, second, positions[0].size)
    rms = np.concatenate([_rms(_moved(inside, cells, f, s)) for f, s in chunks]) if len(first) else np.zeros(0)
    chosen = _closest(rms + 5 * np.abs(strain).max(axis=(1, 2)), rms)
    first, second, strain = first[chosen], second[chosen], strain[chosen]
    moved = _moved(inside, cells, first, second)
    strain = (strain + strain.swapaxes(1, 2)) / 2
    virial = (virial[first] + virial[second]) / 2
    by_stress = np.einsum("nij,nij->n", virial, strain)
    shears, virials = 2 * strain[:, SHEAR[0], SHEAR[1]], virial[:, SHEAR[0], SHEAR[1]]
    by_forces = -np.einsum("nij,nij->n", (forces[first] + forces[second]) / 2, moved)
    largest = np.abs(strain).max(axis=(1, 2))
    a, b = members[first], members[second]
    change = case.energy[b] - case.energy[a]
    return Pairs(a, b, rms[chosen], largest, change, by_forces, by_stress, shears, virials)


def _of_molecule(case: Case, members: np.ndarray) -> Pairs:
    positions, forces = _stacked(case, members)
    positions = positions - positions.mean(axis=1, keepdims=True)
    n = positions.shape[1]
    corners = np.triu_indices(n, 1) if n <= 60 else (np.arange(n - 1), np.arange(1, n))
    inner = np.linalg.norm(positions[:, corners[0]] - positions[:, corners[1]], axis=2)
    first, second = np.triu_indices(len(members), 1)
    far = [np.sqrt(np.square(inner[f] - inner[s]).mean(axis=1)) for f, s in _chunks(first, second, inner[0].size)]
    chosen = np.argsort(np.concatenate(far), kind="stable")[:MOST_PAIRS]
    first, second = first[chosen], second[chosen]
    a, b = positions[first], positions[second]
    u, _, v = np.linalg.svd(b.swapaxes(1, 2) @ a)  # the rotation of b that fits a best (Kabsch)
    u[:, :, 2] *= np.sign(np.linalg.det(u @ v))[:, None]
    turn = u @ v
    moved = b @ turn - a
    work = -np.einsum("nij,nij->n", (forces[first] + forces[second] @ turn) / 2, moved)
    rms = _rms(moved)
    near = rms < FARTHEST
    still = np.zeros(len(first))
    none = np.full((len(first), 3), np.nan)
    one, other = members[first], members[second]
    change = case.energy[other] - case.energy[one]
    return Pairs(one, other, rms, still, change, work, none[:, 0], none, none).only(near)


def _chunks(first: np.ndarray, second: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    n = max(1, 2_000_000 // size)
    return [(first[i : i + n], second[i : i + n]) for i in range(0, len(first), n)]


def _strain(cells: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """By which the second cell is the first one, about their mean: (n, 3, 3)."""
    return np.asarray(np.linalg.pinv((cells[first] + cells[second]) / 2) @ (cells[second] - cells[first]))


def _moved(inside: np.ndarray, cells: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far atoms moved within the cell, the whole held: (n, n_atoms, 3), Å."""
    shift = inside[second] - inside[first]
    shift -= np.round(shift)
    shift -= shift.mean(axis=1, keepdims=True)
    return np.asarray(shift @ ((cells[first] + cells[second]) / 2))


def _rms(moved: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.square(moved).sum(axis=2).mean(axis=1)))


def _closest(distance: np.ndarray, rms: np.ndarray) -> np.ndarray:
    order = np.argsort(distance, kind="stable")[:MOST_PAIRS]
    return order[rms[order] < FARTHEST]


class Slope(NamedTuple):
    """By how much one quantity changes with another, from several pairs.

    Attributes:
        value: the median of the ratios, weighted by the work.
        spread: of ln |ratio|, half of the middle 68 %.
        agreement: the share of the work in pairs whose ratio is within a third of `value`.
        n: pairs.
        right: the share of the work in pairs whose ratio is within a third of one.
    """

    value: float
    spread: float
    agreement: float
    n: int
    right: float

    @property
    def holds(self) -> bool:
        """Whether enough pairs agree, and none of the others are as they should be, as in mixtures."""
        return self.agreement > 0.4 and (self.right < 0.1 or abs(np.log(abs(self.value))) < np.log(2))


def slope(change: np.ndarray, work: np.ndarray) -> Slope | None:
    """The ratio that most pairs agree on; None for fewer than 5 with any work."""
    known = np.isfinite(change) & np.isfinite(work) & (work != 0) & (change != 0)
    if known.sum() < 5:
        return None
    change, weight = change[known], np.abs(work[known])
    ratio = change / work[known]
    weight = np.minimum(weight, 10 * np.median(weight))
    sign = np.sign((np.sign(ratio) * weight).sum()) or 1.0
    same = np.sign(ratio) == sign
    logs, held = np.log(np.abs(ratio[same])), weight[same]
    order = np.argsort(logs)
    share = np.cumsum(held[order]) / held.sum()
    low, middle, high = (float(logs[order][np.searchsorted(share, q)]) for q in (0.16, 0.5, 0.84))
    agree = held[np.abs(logs - middle) < np.log(4 / 3)].sum() / weight.sum()
    right = weight[np.abs(ratio - 1) < 1 / 3].sum() / weight.sum()
    return Slope(float(sign * np.exp(middle)), (high - low) / 2, float(agree), int(known.sum()), float(right))
