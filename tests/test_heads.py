"""Heads in physical units: references are recovered, pooling pools, and precision is kept."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

import transfermium as tm
from transfermium.backbones.base import Features
from transfermium.errors import InputError
from transfermium.graph import AtomGraph, Cutoff, Sample, to_graph
from transfermium.heads import Head, LevelHead, isolated_energies, pooled, rms, values
from transfermium.references import fit_references

KNOWN = {1: -13.7, 6: -147.2, 8: -431.9}


def compositions(n: int, elements: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(elements, size=rng.integers(1, 12)) for _ in range(n)]


def totals(numbers: list[np.ndarray]) -> np.ndarray:
    return np.array([sum(KNOWN[int(z)] for z in zs) for zs in numbers])


def energies(structures: list[Atoms], labels: list[float], name: str = "energy") -> list[Sample]:
    return [Sample(atoms, {name: np.array([e])}) for atoms, e in zip(structures, labels, strict=True)]


def some_features(graph: AtomGraph, width: int = 8, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    scalars = torch.randn(graph.n_atoms, width, generator=generator)
    return Features(scalars, torch.randn(graph.n_atoms, 3, width, generator=generator))


# -------------------------------------------------------------------------------------------------------- references


def test_known_references_are_recovered() -> None:
    numbers = compositions(40, list(KNOWN))
    references = fit_references(numbers, totals(numbers))
    spread = max(KNOWN.values()) - min(KNOWN.values())
    for z, e in KNOWN.items():
        assert references[z] == pytest.approx(e, abs=1e-5 * spread)
    assert not np.delete(references, list(KNOWN)).any()


def test_isolated_atoms_fix_their_element() -> None:
    numbers = compositions(40, list(KNOWN))
    references = fit_references(numbers, totals(numbers) + 1.0, fixed={1: -13.7, 92: -1.0})
    assert references[1] == -13.7
    assert references[92] == -1.0
    assert references[8] != pytest.approx(KNOWN[8], abs=1e-3)


def test_fixing_every_element_leaves_nothing_to_fit() -> None:
    references = fit_references([np.array([1, 1, 8])], np.array([5.0]), fixed=KNOWN)
    assert references[[1, 6, 8]].tolist() == list(KNOWN.values())


def test_elements_always_in_the_same_ratio_share_what_is_left() -> None:
    numbers = [np.array([11, 17] * n) for n in (1, 2, 4)]
    references = fit_references(numbers, np.array([-8.0, -16.0, -32.0]))
    np.testing.assert_allclose(references[[11, 17]], -4.0, atol=1e-9)


def test_a_single_structure_is_explained() -> None:
    numbers = [np.array([12, 8, 8, 1, 1])]
    references = fit_references(numbers, np.array([-1000.0]))
    assert references[numbers[0]].sum() == pytest.approx(-1000.0, abs=1e-6)


def test_large_energies_are_explained_as_well_as_small_ones() -> None:
    numbers = compositions(60, list(KNOWN))
    noise = np.random.default_rng(1).normal(size=60)
    small, large = (fit_references(numbers, totals(numbers) * scale + noise) for scale in (0.0, 1000.0))
    for z, e in KNOWN.items():
        assert large[z] - small[z] == pytest.approx(1000 * e, rel=1e-4)


@pytest.mark.parametrize("n", [20, 40, 60, 80, 200])
def test_as_many_labels_as_elements_do_not_make_references_worse_than_none(n: int) -> None:
    random = np.random.default_rng(n)
    numbers = [random.choice(np.arange(1, 61), 4, replace=False) for _ in range(n + 400)]
    own = random.normal(size=61)
    energies = np.array([own[z].sum() + 0.5 * len(z) * random.normal() for z in numbers])
    references = fit_references(numbers[:n], energies[:n])

    def missed(per_element: np.ndarray) -> float:
        return float(np.abs([e - per_element[z].sum() for z, e in zip(numbers[n:], energies[n:], strict=True)]).mean())

    alone = missed(np.full(119, np.mean([e / 4 for e in energies[:n]])))
    assert missed(references) < 1.1 * alone
    assert n < 200 or missed(references) < 0.85 * alone


def test_an_energy_head_predicts_references_before_training(structures: list[Atoms]) -> None:
    head = tm.EnergyHead(8)
    nn.init.zeros_(head.readout[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head.readout[-1].bias)  # type: ignore[arg-type]
    labels = [-3.0 * len(atoms) for atoms in structures]
    head.calibrate("energy", energies(structures, labels))
    graph = to_graph(structures, Cutoff(4.0))
    assert head(some_features(graph), graph).tolist() == pytest.approx(labels)


def test_marked_isolated_atoms_are_references(crystal: Atoms, lone_atom: Atoms) -> None:
    marked = lone_atom.copy()
    marked.info["config_type"] = "isolatedatom"
    samples = energies([crystal, lone_atom, marked], [-12.0, -5.0, -1.5])
    assert isolated_energies("energy", samples) == {8: -1.5}
    head = tm.EnergyHead(8)
    head.calibrate("energy", samples)
    assert float(head.references[8]) == -1.5


def test_the_scale_of_an_energy_is_the_rms_force(crystal: Atoms) -> None:
    forces = np.random.default_rng(0).normal(size=(2, 3))
    head = tm.EnergyHead(8)
    head.calibrate("energy", [Sample(crystal, {"energy": np.array([-5.0]), "forces": forces})])
    assert float(head.scale) == pytest.approx(np.sqrt(np.mean(forces**2)))


def test_missing_energies_are_passed_over(crystal: Atoms, molecule: Atoms) -> None:
    head = tm.EnergyHead(8)
    head.calibrate("energy", energies([crystal, molecule], [-8.0, np.nan]))
    assert head.references[[12, 8]].tolist() == pytest.approx([-4.0, -4.0])
    assert not head.references[[1, 6]].any()


def test_values_leave_out_rows_without_a_label(crystal: Atoms) -> None:
    forces = np.array([[1.0, 2.0, 3.0], [np.nan, 0.0, 0.0]])
    samples = [Sample(crystal, {"forces": forces}), Sample(crystal, {})]
    np.testing.assert_array_equal(values("forces", samples), [[1.0, 2.0, 3.0]])
    assert values("energy", samples).shape == (0,)


# ------------------------------------------------------------------------------------------------- shifts and scales


def test_scalars_start_at_mean_and_spread(structures: list[Atoms]) -> None:
    head = tm.ScalarHead(8)
    head.calibrate("gap", energies(structures, [1.0, 2.0, 3.0, np.nan], "gap"))
    assert (float(head.shift), float(head.scale)) == pytest.approx((2.0, np.sqrt(2 / 3)))


def test_sums_start_at_what_each_element_adds(structures: list[Atoms]) -> None:
    """Elements without a label at the mean over all atoms."""
    head = tm.ScalarHead(8, "sum")
    head.calibrate("volume", energies(structures, [5.0 * len(atoms) for atoms in structures], "volume"))
    np.testing.assert_allclose(head.shift, 5.0, rtol=1e-12)
    assert float(head.scale) == 1.0

    water = [molecule(name) for name in ("H2O", "H2", "O2", "H2O2", "OH")]
    labels = [2.0 * atoms.symbols.count("H") + 7.0 * atoms.symbols.count("O") for atoms in water]
    head.calibrate("x", energies(water, labels, "x"))
    np.testing.assert_allclose(head.shift[[1, 8]], [2.0, 7.0], rtol=1e-4)
    mean = np.mean([total / len(atoms) for total, atoms in zip(labels, water, strict=True)])
    np.testing.assert_allclose(head.shift[[6, 79]], mean, rtol=1e-12)


def test_sums_with_one_shift_for_all_elements_can_still_be_read() -> None:
    head = tm.ScalarHead(8, "sum")
    old = {**head.state_dict(), "shift": torch.tensor(3.0, dtype=torch.float64)}
    head.load_state_dict(old)
    assert head.shift.shape == (119,) and bool((head.shift == 3.0).all())
    levels = LevelHead(tm.ScalarHead(8, "sum"), ["a", "b"])
    levels.load_state_dict({**levels.state_dict(), "shift": torch.tensor([1.0, 2.0]), "head.shift": torch.tensor(0.0)})
    assert levels.shift[:, 6].tolist() == [1.0, 2.0] and levels.shift.shape == (2, 119)


@pytest.mark.parametrize("value", [0.0, 0.1, 100_000.1, -123_456.789])
@pytest.mark.parametrize("head", [tm.ScalarHead(8), tm.ScalarHead(8, "sum"), tm.AtomHead(8), tm.TensorHead(8)])
def test_labels_that_are_all_equal_leave_the_scale_at_one(head: Head, value: float) -> None:
    crystals = [bulk("Cu") for _ in range(3)]
    shape = (1, 3, 3) if isinstance(head, tm.TensorHead) else (1,)
    label = value * np.eye(3).reshape(shape) if isinstance(head, tm.TensorHead) else np.full(shape, value)
    head.calibrate("x", [Sample(atoms, {"x": label}) for atoms in crystals])
    assert float(head.scale) == 1.0  # type: ignore[arg-type]
    np.testing.assert_allclose(head.shift, value, rtol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_energies_that_are_all_equal_leave_the_scale_at_one(n: int) -> None:
    head = tm.EnergyHead(8)
    head.calibrate("energy", energies([bulk("Cu")] * n, [-45_678.901] * n))
    assert float(head.scale) == 1.0


def test_rms_of_nothing_is_one() -> None:
    assert rms(np.zeros(0)) == rms(np.zeros(5)) == 1.0
    assert rms(np.array([3.0, 4.0, 0.0, 0.0])) == 2.5
    assert rms(np.array([1e-11, -1e-11]), np.array([1e5, 1e5])) == 1.0
    assert rms(np.array([1e-9, -1e-9])) == pytest.approx(1e-9)


@pytest.mark.parametrize("head", [tm.EnergyHead(8), tm.ScalarHead(8), tm.AtomHead(8), tm.VectorHead(8)])
def test_references_and_scales_stay_in_double_precision(head: Head) -> None:
    for name, buffer in head.named_buffers():
        buffer.fill_(1 / 3)
        head.float()
        assert head.get_buffer(name).dtype == torch.float64
        assert bool((head.get_buffer(name) == 1 / 3).all())
    assert all(p.dtype == torch.float32 for p in head.parameters())
    assert all(p.dtype == torch.float64 for p in head.double().parameters())


# ---------------------------------------------------------------------------------------------------- what they give


def test_energies_are_extensive_and_means_intensive(crystal: Atoms) -> None:
    backbone = tm.PaiNN(8, depth=2, cutoff=4.0, radial=8)
    outputs = {"energy": tm.EnergyHead(8), "sum": tm.ScalarHead(8, "sum"), "mean": tm.ScalarHead(8)}
    model = tm.Model(backbone, {**outputs, "attention": tm.ScalarHead(8, "attention")}).double().eval()
    once, thrice = (model(to_graph([atoms], backbone.edges)) for atoms in (crystal, crystal * (1, 3, 1)))
    for name, factor in {"energy": 3, "sum": 3, "mean": 1, "attention": 1}.items():
        torch.testing.assert_close(factor * once[name], thrice[name])


def test_vectors_and_tensors_turn_with_the_structure(molecule: Atoms) -> None:
    backbone = tm.TensorNet(8, depth=2, cutoff=4.0, radial=8)
    model = tm.Model(backbone, {"vector": tm.VectorHead(8), "tensor": tm.TensorHead(8)}).double().eval()
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = Atoms(molecule.numbers, molecule.positions @ turn.T)
    before, after = (model(to_graph([atoms], backbone.edges)) for atoms in (molecule, turned))

    matrix = torch.from_numpy(turn)
    torch.testing.assert_close(after["vector"], before["vector"] @ matrix.T)
    torch.testing.assert_close(after["tensor"], matrix @ before["tensor"] @ matrix.T)
    torch.testing.assert_close(before["tensor"], before["tensor"].mT)
    assert not torch.allclose(before["vector"], after["vector"])
    assert not torch.allclose(before["tensor"], after["tensor"])


def test_a_tensor_head_can_be_anisotropic_and_starts_near_its_labels(molecule: Atoms) -> None:
    head = tm.TensorHead(8)
    head.calibrate("dielectric", [Sample(molecule, {"dielectric": np.diag([2.0, 3.0, 4.0])[None]})])
    assert float(head.shift) == 3.0
    assert float(head.scale) == pytest.approx(np.sqrt(2 / 9))


def test_attention_is_a_weighted_mean(structures: list[Atoms]) -> None:
    graph = to_graph(structures, Cutoff(4.0))
    x = torch.randn(graph.n_atoms, 1, dtype=torch.float64)
    mean = pooled(x, graph)
    torch.testing.assert_close(pooled(x, graph, torch.zeros(graph.n_atoms, 1)), mean)
    torch.testing.assert_close(
        pooled(torch.ones_like(x), graph, torch.randn(graph.n_atoms, 1)).float(), torch.ones(4, 1)
    )

    first = torch.zeros(graph.n_atoms, 1)
    first[0] = 1e6  # attention on one atom of the first structure, however strong, is finite and stays inside
    result = pooled(x, graph, first)
    torch.testing.assert_close(result[1:], mean[1:])
    assert float(result[0, 0]) == pytest.approx(float(x[0, 0]), abs=1e-3)


def test_attention_can_pick_one_atom() -> None:
    """A number that only the one oxygen carries is intensive: attention finds it, a plain mean dilutes it."""
    structures = [bulk("Cu", cubic=True) * (1, 1, n) for n in (1, 2, 4)]
    for atoms in structures:
        atoms.numbers[0] = 8
    graph = to_graph(structures, Cutoff(3.0))
    is_oxygen = (graph.atomic_numbers == 8).float().unsqueeze(1).expand(-1, 8)

    torch.manual_seed(0)
    head = tm.ScalarHead(8, "attention")
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (head(Features(is_oxygen), graph) - 1).square().sum() + head.readout(torch.zeros(1, 8)).square().sum()
        loss.backward()
        optimizer.step()
    assert head(Features(is_oxygen), graph).tolist() == pytest.approx([1.0] * 3, abs=0.05)


def test_classes_have_scores_in_rows(structures: list[Atoms]) -> None:
    graph = to_graph(structures, Cutoff(4.0))
    features = some_features(graph)
    assert tm.ClassHead(8, classes=5)(features, graph).shape == (4, 5)
    assert tm.AtomHead(8, classes=5)(features, graph).shape == (graph.n_atoms, 5)
    assert tm.AtomHead(8)(features, graph).shape == (graph.n_atoms,)


def test_an_unknown_pooling_is_an_error() -> None:
    with pytest.raises(InputError, match="pooling is 'max', but must be one of mean, attention, sum"):
        tm.ScalarHead(8, "max")


def test_cgcnn_has_the_published_size() -> None:
    model = tm.Model(tm.CGCNN(), {"energy": tm.EnergyHead(150)})
    assert sum(p.numel() for p in model.parameters()) == 271_501
