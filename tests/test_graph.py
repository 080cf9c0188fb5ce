"""Neighbours are those that ASE finds, whatever the cell; bad structures are refused in one sentence."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from transfermium.errors import InputError
from transfermium.graph import AtomGraph, Cutoff, Sample, is_isolated_atom, to_batch, to_graph

Edge = tuple[int, int, tuple[int, ...]]

periodicities = st.tuples(st.booleans(), st.booleans(), st.booleans())


def edges_of(graph: AtomGraph) -> list[Edge]:
    shifts = graph.cell_shifts.round().int().tolist()
    return sorted(zip(graph.receivers.tolist(), graph.senders.tolist(), map(tuple, shifts), strict=True))


def edges_by_ase(atoms: Atoms, cutoff: float) -> list[Edge]:
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    return sorted(zip(i.tolist(), j.tolist(), map(tuple, shifts.tolist()), strict=True))


def random_structure(seed: int, n: int, pbc: tuple[bool, bool, bool], size: float) -> Atoms:
    """Atoms inside and outside a skewed cell of a volume that is not tiny."""
    rng = np.random.default_rng(seed)
    cell = size * (np.eye(3) + rng.uniform(-0.45, 0.45, (3, 3)))
    positions = rng.uniform(-0.5, 1.5, (n, 3)) @ cell
    return Atoms(rng.integers(1, 90, n), positions, cell=cell, pbc=pbc)


@settings(max_examples=80)
@given(st.integers(0, 2**32), st.integers(1, 6), periodicities, st.floats(2.5, 9.0), st.floats(1.0, 6.0))
def test_edges_are_those_of_ase(seed: int, n: int, pbc: tuple[bool, bool, bool], size: float, cutoff: float) -> None:
    atoms = random_structure(seed, n, pbc, size)
    graph = to_graph([atoms], Cutoff(cutoff))
    assert edges_of(graph) == edges_by_ase(atoms, cutoff)
    vectors = graph.edge_vectors().numpy()
    assert np.all(np.linalg.norm(vectors, axis=1) < cutoff + 1e-9)
    assert np.all(np.diff(graph.receivers) >= 0)


@settings(max_examples=20)
@given(st.integers(0, 2**32), periodicities)
def test_directions_that_are_not_periodic_need_no_cell_vector(seed: int, pbc: tuple[bool, bool, bool]) -> None:
    atoms = random_structure(seed, 4, pbc, 4.0)
    atoms.cell[~atoms.pbc] = 0.0
    assert edges_of(to_graph([atoms], Cutoff(4.0))) == edges_by_ase(atoms, 4.0)


def test_tiny_cells_see_many_images_of_themselves() -> None:
    atoms = bulk("Cu", "fcc", a=3.6)
    graph = to_graph([atoms], Cutoff(9.0))
    assert graph.n_atoms == 1
    assert graph.n_edges == len(neighbor_list("i", atoms, 9.0)) > 200
    assert edges_of(graph) == edges_by_ase(atoms, 9.0)


def test_every_edge_has_its_way_back(alloy: Atoms) -> None:
    edges = edges_of(to_graph([alloy], Cutoff(5.0)))
    back = sorted((j, i, tuple(-n for n in shift)) for i, j, shift in edges)
    assert edges == back


def test_edge_vectors_point_from_receiver_to_sender(molecule: Atoms) -> None:
    graph = to_graph([molecule], Cutoff(3.0))
    expected = molecule.positions[graph.senders] - molecule.positions[graph.receivers]
    np.testing.assert_allclose(graph.edge_vectors(), expected, atol=1e-12)


def test_atoms_far_outside_their_cell_keep_their_edges(crystal: Atoms) -> None:
    moved = crystal.copy()
    moved.positions[0] += 7 * moved.cell[0] - 3 * moved.cell[1]
    a, b = (to_graph([atoms], Cutoff(5.0)).edge_vectors().norm(dim=1).sort().values for atoms in (crystal, moved))
    torch.testing.assert_close(a, b)


def test_edges_stay_inside_their_structure(structures: list[Atoms]) -> None:
    graph = to_graph(structures, Cutoff(5.0))
    assert torch.equal(graph.system_idx[graph.senders], graph.system_idx[graph.receivers])
    assert graph.atoms_per_system().tolist() == [len(atoms) for atoms in structures]
    assert np.all(np.diff(graph.receivers) >= 0)

    start = 0
    for k, atoms in enumerate(structures):
        own = graph.system_idx[graph.receivers] == k
        edges = sorted(zip((graph.receivers[own] - start).tolist(), (graph.senders[own] - start).tolist(), strict=True))
        assert edges == [(i, j) for i, j, _ in edges_by_ase(atoms, 5.0)]
        start += len(atoms)


def test_a_lone_atom_and_no_atom_have_no_edges(lone_atom: Atoms) -> None:
    graph = to_graph([lone_atom, Atoms(), lone_atom], Cutoff(5.0))
    assert (graph.n_systems, graph.n_atoms, graph.n_edges) == (3, 2, 0)
    assert graph.system_idx.tolist() == [0, 2]
    assert to_graph([Atoms()], Cutoff(5.0)).edge_vectors().shape == (0, 3)


def test_cells_hold_only_what_is_periodic(crystal: Atoms, molecule: Atoms) -> None:
    molecule.cell[:] = np.nan
    slab = crystal.copy()
    slab.pbc = [True, True, False]
    graph = to_graph([crystal, slab, molecule], Cutoff(4.0))
    cell = graph.cell.numpy()
    np.testing.assert_array_equal(cell[0], crystal.cell)
    np.testing.assert_array_equal(cell[1], [*crystal.cell[:2], [0, 0, 0]])
    assert not cell[2].any()
    assert bool(graph.edge_vectors().isfinite().all())


def test_sums_run_over_neighbors_and_systems(structures: list[Atoms]) -> None:
    graph = to_graph(structures, Cutoff(4.0))
    neighbors = graph.sum_over_neighbors(torch.ones(graph.n_edges))
    assert neighbors.tolist() == torch.bincount(graph.receivers, minlength=graph.n_atoms).tolist()
    sizes = graph.sum_over_systems(torch.ones(graph.n_atoms, 2, 3))
    assert sizes[:, 1, 2].tolist() == [len(atoms) for atoms in structures]


def test_to_converts_reals_and_leaves_indices(molecule: Atoms) -> None:
    graph = to_graph([molecule], Cutoff(3.0), [{"charge": np.ones(len(molecule))}]).to("cpu", torch.float32)
    assert graph.positions.dtype == graph.cell.dtype == graph.inputs["charge"].dtype == torch.float32
    assert graph.receivers.dtype == graph.atomic_numbers.dtype == torch.int64


def test_inputs_reach_every_atom(crystal: Atoms, molecule: Atoms) -> None:
    per_atom = [{"charge": np.arange(2), "spin": np.array([3.0])}, {"charge": np.zeros(9), "spin": np.array([1.0])}]
    inputs = to_graph([crystal, molecule], Cutoff(3.0), per_atom).inputs
    assert inputs["charge"][:3, 0].tolist() == [0, 1, 0]
    assert inputs["spin"][:, 0].tolist() == [3.0] * 2 + [1.0] * 9


def test_batches_join_targets_in_double_precision(crystal: Atoms, molecule: Atoms) -> None:
    samples = [Sample(a, {"energy": np.array([1.0]), "forces": np.zeros((len(a), 3))}) for a in (crystal, molecule)]
    batch = to_batch(samples, Cutoff(3.0)).to("cpu", torch.float32)
    assert batch.targets["energy"].shape == (2,)
    assert batch.targets["forces"].shape == (11, 3)
    assert batch.targets["forces"].dtype == torch.float64


def test_isolated_atoms_are_marked_ones(lone_atom: Atoms, molecule: Atoms) -> None:
    assert not is_isolated_atom(lone_atom)
    for atoms in (lone_atom, molecule):
        atoms.info["config_type"] = "IsolatedAtom"
    assert is_isolated_atom(lone_atom)
    assert not is_isolated_atom(molecule)


# ------------------------------------------------------------------------------------------------------------ errors


def test_positions_have_to_be_finite(molecule: Atoms) -> None:
    molecule.positions[3, 1] = np.nan
    with pytest.raises(InputError, match=r"C2H6O has positions that are not finite"):
        to_graph([molecule], Cutoff(5.0))


@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.diag([3.0, 3.0, 0.0]), [[3, 0, 0], [0, 3, 0], [3, 3, 0]]])
def test_a_periodic_cell_has_to_have_a_volume(cell: np.ndarray) -> None:
    with pytest.raises(InputError, match="no volume: set pbc to False or give a cell"):
        to_graph([Atoms("Cu", cell=cell, pbc=True)], Cutoff(5.0))


def test_a_cell_has_to_be_finite(crystal: Atoms) -> None:
    crystal.cell[0, 0] = np.inf
    with pytest.raises(InputError, match="MgO is periodic but its cell"):
        to_graph([crystal], Cutoff(5.0))


def test_huge_structures_are_refused_before_they_exhaust_memory() -> None:
    with pytest.raises(InputError, match="are its positions in Å"):
        to_graph([Atoms("H2", positions=[[0, 0, 0], [0, 0, 1e9]])], Cutoff(5.0))
    with pytest.raises(InputError, match="a cell longer than"):
        to_graph([Atoms("H", cell=[1e5, 3, 3], pbc=True)], Cutoff(5.0))


def test_two_atoms_in_one_place_are_refused(crystal: Atoms) -> None:
    doubled = crystal + crystal[:1]
    doubled.positions[2] += doubled.cell[1]  # in the same place, one cell on
    with pytest.raises(InputError, match="two atoms at the same place"):
        to_graph([doubled], Cutoff(5.0))


def test_one_bad_structure_among_good_ones_is_found(structures: list[Atoms]) -> None:
    with pytest.raises(InputError, match="Cu has positions that are not finite"):
        to_graph([*structures, Atoms("Cu", positions=[[0, np.inf, 0]])], Cutoff(5.0))


@pytest.mark.parametrize("radius", [0.0, -1.0, 1e3, np.nan])
def test_cutoffs_have_to_make_sense(radius: float) -> None:
    with pytest.raises(InputError, match="makes no sense"):
        Cutoff(radius)
