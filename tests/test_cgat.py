"""CGAT: the shells it sees are those of the crystal, its features know symmetry and no lengths, and its heads learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal as of_group
from torch import Tensor, nn

import transfermium as tm
from tests.alloys import QUICK
from transfermium.data.load import Batches
from transfermium.errors import InputError
from transfermium.graph import Cutoff, Neighbors, Sample, Shells, to_batch, to_graph
from transfermium.heads import Composition, ReZero
from transfermium.nn import weighted_mean
from transfermium.testing import check_backbone, check_head, check_objective

CRYSTALS: dict[str, Callable[[], Atoms]] = {
    "rocksalt": lambda: of_group(
        ["Mg", "O"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=225, cellpar=[4.21] * 3 + [90] * 3
    ),
    "CsCl": lambda: of_group(["Cs", "Cl"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=221, cellpar=[4.12] * 3 + [90] * 3),
    "fluorite": lambda: of_group(["Ca", "F"], [(0, 0, 0), (0.25,) * 3], spacegroup=225, cellpar=[5.46] * 3 + [90] * 3),
    "perovskite": lambda: of_group(
        ["Sr", "Ti", "O"], [(0, 0, 0), (0.5,) * 3, (0.5, 0.5, 0)], spacegroup=221, cellpar=[3.91] * 3 + [90] * 3
    ),
    "Heusler": lambda: of_group(
        ["Cu", "Mn", "Al"], [(0.25,) * 3, (0, 0, 0), (0.5,) * 3], spacegroup=225, cellpar=[5.95] * 3 + [90] * 3
    ),
}

NEAREST = {  # sizes of the first shells, from the geometry of the lattices
    "rocksalt": [[6, 12], [6, 12]],
    "CsCl": [[8, 6], [8, 6]],
    "fluorite": [[8, 12], [4, 6, 12]],
}


@pytest.fixture(params=CRYSTALS)
def named_crystal(request: pytest.FixtureRequest) -> Atoms:
    return CRYSTALS[request.param]()


def small(**changes: Any) -> tm.CGAT:
    return tm.CGAT(**{"width": 8, "depth": 2, **changes})


def features(atoms: Atoms, **changes: Any) -> Tensor:
    torch.manual_seed(0)
    backbone = small(**changes).double()
    return backbone(to_graph([atoms], backbone.edges)).scalars.detach()


def sizes_of_shells(found: Neighbors, atom: int) -> list[int]:
    return np.bincount(found.shells[found.receivers == atom])[1:].tolist()


def as_set(found: Neighbors) -> set[tuple[int, ...]]:
    return {
        (int(i), int(j), *map(int, s), int(k))
        for i, j, s, k in zip(found.receivers, found.senders, found.shifts, found.shells, strict=True)
    }


# ------------------------------------------------------------------------------------------------------------ shells


@pytest.mark.parametrize("name", NEAREST)
def test_shells_are_those_of_the_lattice(name: str) -> None:
    atoms = CRYSTALS[name]()
    found = Shells().neighbors(atoms)
    order = list(dict.fromkeys(atoms.numbers.tolist()))
    for atom, z in enumerate(atoms.numbers):
        assert sizes_of_shells(found, atom) == NEAREST[name][order.index(z)]


def test_a_small_sphere_tells_what_the_whole_one_does(structures: list[Atoms], named_crystal: Atoms) -> None:
    slab = bulk("Cu", "fcc", a=3.6, cubic=True) * (2, 2, 1)
    slab.pbc = [True, True, False]
    slab.append("H")
    slab.positions[-1] = [0, 0, 14.0]  # nobody near
    for atoms in [*structures, named_crystal, slab]:
        for edges in (Shells(), Shells(5), Shells(24, whole=False, tolerance=1e-6), Shells(most=1)):
            quick, all_of_it = edges.neighbors(atoms), edges.neighbors(atoms, edges.search())
            if edges.whole:
                assert as_set(quick) == as_set(all_of_it)
            np.testing.assert_array_equal(quick.shells, all_of_it.shells)


@pytest.mark.parametrize("size", [2.5, 4.0, 6.5, 9.0])  # from dense to thin, where the sphere has to grow
def test_the_sphere_grows_until_the_shells_are_certain(size: float) -> None:
    rng = np.random.default_rng(int(10 * size))
    for pbc in (True, [True, True, False], False):
        cell = size * (np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3)))
        atoms = Atoms("HCO", rng.uniform(0, 1, (3, 3)) @ cell, cell=cell, pbc=pbc)
        for edges in (Shells(), Shells(7), Shells(24, tolerance=0.2), Shells(16, tolerance=0.5)):
            assert as_set(edges.neighbors(atoms)) == as_set(edges.neighbors(atoms, edges.search()))


def test_whole_shells_stay_whole_and_cut_ones_do_not() -> None:
    atoms = CRYSTALS["rocksalt"]()  # 6, 12 and 8 neighbours
    assert sizes_of_shells(Shells(26).neighbors(atoms), 0) == [6, 12, 8]
    assert sizes_of_shells(Shells(25).neighbors(atoms), 0) == [6, 12]
    assert sizes_of_shells(Shells(24, whole=False).neighbors(atoms), 0) == [6, 12, 6]


def test_the_first_shell_is_kept_whatever_its_size() -> None:
    assert sizes_of_shells(Shells(3).neighbors(bulk("Cu", "fcc", a=3.6)), 0) == [12]


def test_a_shell_bears_noise_within_the_tolerance() -> None:
    atoms = CRYSTALS["rocksalt"]()
    rattled = atoms.copy()
    rattled.positions += np.random.default_rng(0).uniform(-5e-4, 5e-4, atoms.positions.shape)
    assert sizes_of_shells(Shells().neighbors(rattled), 0) == [6, 12]
    assert len(sizes_of_shells(Shells(tolerance=1e-8).neighbors(rattled), 0)) > 12
    torch.testing.assert_close(features(atoms), features(rattled))
    assert not torch.allclose(features(atoms), features(rattled, tolerance=1e-8))


def test_few_atoms_have_few_neighbors(lone_atom: Atoms, molecule: Atoms) -> None:
    graph = to_graph([lone_atom, molecule, Atoms()], Shells(most=100, tolerance=0.0))
    assert graph.n_edges == 9 * 8
    assert int(graph.shells.min()) == 1
    assert graph.shells.dtype == torch.int64


def test_only_those_within_the_radius_are_neighbors() -> None:
    atoms = Atoms("H3", [[0, 0, 0], [0, 0, 1], [0, 0, 9]])
    assert len(Shells(radius=5.0).neighbors(atoms).senders) == 2
    assert len(Shells(radius=18.0).neighbors(atoms).senders) == 6


def test_kept_neighbors_make_the_same_batch(alloy: Atoms, molecule: Atoms) -> None:
    for atoms in (alloy, molecule):
        atoms.info["x"] = 1.0
    batches = Batches([alloy, molecule], tm.Property("x"), Shells(), 0)
    first, again = (batches[0, np.arange(2)].graph for _ in range(2))
    assert batches.kept[0].neighbors.shells.dtype == np.uint8
    fresh = to_graph([alloy, molecule], Shells())
    for graph in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(graph[:-1], fresh[:-1], strict=True))


def test_graphs_of_a_cutoff_have_no_shells(alloy: Atoms) -> None:
    graph = to_graph([alloy], Cutoff(4.0))
    assert len(graph.shells) == 0
    with pytest.raises(InputError, match="a graph without shells"):
        small()(graph)


@pytest.mark.parametrize("wrong", [{"most": 0}, {"radius": -1.0}, {"radius": np.nan}, {"tolerance": -1e-3}])
def test_shells_have_to_make_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no sense"):
        Shells(**wrong)


# ---------------------------------------------------------------------------------------------------------- symmetry


def test_equivalent_sites_have_equal_features(named_crystal: Atoms) -> None:
    found = features(named_crystal)
    kinds = named_crystal.arrays["spacegroup_kinds"]
    for kind in np.unique(kinds):
        same = found[torch.from_numpy(kinds == kind)]
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert len(np.unique(found.numpy().round(6), axis=0)) == len(np.unique(kinds))


def test_features_do_not_know_the_volume_or_the_cell(named_crystal: Atoms) -> None:
    found = features(named_crystal)
    for factor in (0.93, 1.1):
        scaled = named_crystal.copy()
        scaled.set_cell(factor * scaled.cell.array, scale_atoms=True)
        torch.testing.assert_close(features(scaled), found)
    torch.testing.assert_close(features(named_crystal * (1, 2, 1)), found.repeat(2, 1))


def test_features_follow_the_atoms_and_not_their_order(alloy: Atoms) -> None:
    order = np.random.default_rng(0).permutation(len(alloy))
    torch.testing.assert_close(features(alloy[order]), features(alloy)[torch.from_numpy(order)])


def test_messages_go_to_the_atom_whose_neighbors_they_come_from() -> None:
    def row(*elements: str) -> Tensor:
        return features(Atoms(elements, [[0, 0, 0], [0, 0, 1], [0, 0, 3]]), depth=1, most=1)

    changed = (row("H", "C", "O") != row("H", "C", "N")).any(dim=1)
    assert changed.tolist() == [False, False, True]  # the last hears the middle one, and nobody hears the last
    changed = (row("H", "C", "O") != row("H", "N", "O")).any(dim=1)
    assert changed.tolist() == [True, True, True]


def test_compositions_are_counted_in_fractions() -> None:
    torch.manual_seed(0)
    net = Composition(8).double()

    def seen(*structures: Atoms) -> Tensor:
        return net(to_graph(structures, Cutoff(3.0))).detach()

    water, twice = Atoms("OHH", np.eye(3)), Atoms("HOHHOH", 3 * np.eye(6)[:, :3] + np.arange(6)[:, None])
    peroxide = Atoms("OHOH", np.arange(12).reshape(4, 3))
    alone = [seen(one) for one in (water, peroxide, Atoms("H"), Atoms())]
    torch.testing.assert_close(seen(twice), alone[0])
    torch.testing.assert_close(seen(water, peroxide, Atoms("H"), Atoms()), torch.cat(alone))
    assert not torch.allclose(alone[0], alone[1])


def test_a_trace_of_an_element_hardly_changes_the_composition() -> None:
    torch.manual_seed(0)
    net = Composition(8).double()
    structures = [Atoms(f"Cu{n}Zn", np.arange(3 * n + 3).reshape(-1, 3)) for n in (1, 1000)]
    pure, half, trace = net(to_graph([Atoms("Cu"), *structures], Cutoff(1.0))).detach()
    assert float((trace - pure).norm()) < 0.01 * float((half - pure).norm())


def test_attention_is_a_weighted_mean() -> None:
    values = torch.tensor([[1.0], [3.0], [7.0]])
    index = torch.tensor([0, 0, 2])
    same = weighted_mean(values, torch.zeros(3, 1), index, 3)
    assert same.squeeze(1).tolist() == [2.0, 0.0, 7.0]
    weighted = weighted_mean(values, torch.zeros(3, 1), index, 3, prior=torch.tensor([[1.0], [3.0], [1.0]]))
    assert weighted.squeeze(1).tolist() == [2.5, 0.0, 7.0]
    strong = weighted_mean(values, torch.tensor([[-1e9], [1e9], [1e9]]), index, 3)
    torch.testing.assert_close(strong, torch.tensor([[3.0], [0.0], [7.0]]))


# --------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("whole", [True, False])
def test_cgat_keeps_every_law_it_claims(whole: bool) -> None:
    check_backbone(small(heads=3, generated=3, most=12, whole=whole))
    assert "derivatives" not in tm.CGAT.laws
    assert "smooth" not in tm.CGAT.laws


@pytest.mark.parametrize("head", [tm.CompositionHead(8, heads=2, layers=(2, 2, 1)), tm.DeviationHead(8)])
def test_heads_keep_every_law_on_it(head: tm.Head) -> None:
    check_head(head, small())


def test_objectives_keep_every_law_on_it() -> None:
    check_objective(tm.Property("gap", pooling="composition", uncertainty=True), small())
    check_objective(tm.Denoise(conservative=False), small())
    check_objective(tm.Potential(forces=0, stress=0, conservative=False), small())


@pytest.mark.parametrize("objective", [tm.Potential(), tm.Denoise(), tm.Denoise(strain=0.02)])
def test_derivatives_are_refused_before_anything_is_read(objective: tm.Objective) -> None:
    with pytest.raises(InputError, match=r"CGAT is not smooth in the positions.* forces.*conservative=False"):
        tm.pretrain("nowhere.extxyz", objective, small())


def test_one_head_is_refused() -> None:
    with pytest.raises(InputError, match="choose two or more"):
        small(heads=1)


def test_the_published_size_is_within_reach() -> None:
    with torch.device("meta"):
        head = tm.CompositionHead(128)
        layers = [layer.layer.out_features for layer in head.residual if isinstance(layer, ReZero)]
        published = tm.Model(tm.CGAT(128, depth=5, heads=5, generated=4), {"e": head, "e_std": tm.DeviationHead(128)})
        usual = tm.CGAT()
    assert layers == [1024, 1024, 512, 512, 256, 256, 128]
    total, made = count(published), sum(count(node.update) for node in published.backbone.nodes)  # type: ignore
    assert 59e6 < total < 62e6
    assert 0.68 < made / total < 0.75  # the hyper-networks have 70 %
    assert count(usual) < 2.5e6


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_files_keep_it(tmp_path: Path, alloy: Atoms) -> None:
    objective = tm.Property("gap", pooling="composition", uncertainty=True)
    model = tm.Model(small(most=12, tolerance=0.02, whole=False), objective.outputs(8)).eval()
    model.save(tmp_path / "model.safetensors")
    again = tm.load(tmp_path / "model.safetensors")
    assert again.backbone.edges == Shells(12, 18.0, 0.02, whole=False)
    graph = to_graph([alloy], again.backbone.edges)
    assert all(torch.equal(value, again(graph)[name]) for name, value in model(graph).items())


# --------------------------------------------------------------------------------------------------------- learning


def halides() -> list[Atoms]:
    """Alkali halides with a made-up property of their elements, in the rocksalt and the CsCl structure."""
    structures = []
    for a, alkali in enumerate(["Li", "Na", "K", "Rb"]):
        for b, halogen in enumerate(["F", "Cl", "Br", "I"]):
            for structure in ("rocksalt", "cesiumchloride"):
                atoms = bulk(alkali + halogen, structure, a=5.0)
                atoms.info["gap"] = 5.0 + a - 1.5 * b + (structure == "rocksalt")
                structures.append(atoms)
    return structures


OBJECTIVE = tm.Property("gap", pooling="composition", uncertainty=True)


@pytest.fixture(scope="module")
def trained() -> tm.Model:
    """A model of the halides; leave it as it is."""
    return tm.pretrain(halides(), OBJECTIVE, small(width=16), steps=60, lr=0.01, valid_fraction=0, **QUICK)


def test_it_learns_elements_and_structure(trained: tm.Model) -> None:
    untrained = tm.pretrain(halides(), OBJECTIVE, small(width=16), steps=0, valid_fraction=0, **QUICK)
    before, after = (tm.evaluate(m, halides(), device="cpu", verbose=False)["gap"]["mae"] for m in (untrained, trained))
    assert after < 0.3 * before


def test_predictions_come_with_their_uncertainty(trained: tm.Model) -> None:
    predicted = tm.predict(trained, halides()[:3], device="cpu", verbose=False)
    for atoms in predicted:
        assert atoms.info["gap_std"] > 0
        assert np.isfinite(atoms.info["gap"])


def test_fine_tuning_aligns_the_head(trained: tm.Model) -> None:
    shifted = halides()
    for atoms in shifted:
        atoms.info["gap"] += 10.0
    tuned = tm.finetune(trained, shifted, OBJECTIVE, steps=0, valid_fraction=0, **QUICK)
    graph = to_graph(shifted[:2], tuned.backbone.edges)
    difference = (tuned(graph)["gap"] - trained(graph)["gap"]).numpy()
    np.testing.assert_allclose(difference, 10.0, atol=1.0)
    assert torch.equal(tuned(graph)["gap_std"], trained(graph)["gap_std"])


def test_the_robust_loss_is_least_at_the_true_deviation() -> None:
    rng = np.random.default_rng(0)
    labels = rng.laplace(scale=0.3, size=4000)
    samples = [Sample(Atoms("H"), {"gap": np.array([x])}) for x in [*labels, np.nan]]
    batch = to_batch(samples, Cutoff(1.0))
    objective = tm.Property("gap", uncertainty=True, weight=1.0)
    deviations = np.linspace(0.2, 0.8, 61)
    zeros = torch.zeros(len(samples), dtype=torch.float64)
    losses = [objective.loss({"gap": zeros, "gap_std": zeros + s}, batch)["gap"] for s in deviations]
    assert {int(n) for _, n in losses} == {4000}
    best = deviations[np.argmin([float(total) for total, _ in losses])]
    assert best == pytest.approx(np.sqrt(2) * np.abs(labels).mean(), abs=0.006)
    assert best == pytest.approx(labels.std(), rel=0.05)


def test_missing_labels_leave_gradients_alone() -> None:
    samples = [Sample(Atoms("H"), {"gap": np.array([x])}) for x in (1.0, np.nan)]
    outputs = {name: torch.ones(2, dtype=torch.float64, requires_grad=True) for name in ("gap", "gap_std")}
    total, _ = tm.Property("gap", uncertainty=True).loss(outputs, to_batch(samples, Cutoff(1.0)))["gap"]
    total.backward()
    for output in outputs.values():
        assert output.grad is not None
        assert bool(output.grad.isfinite().all())
        assert float(output.grad[1]) == 0.0


def test_an_extensive_property_is_that_of_an_atom_times_their_number(alloy: Atoms) -> None:
    torch.manual_seed(0)
    objective = tm.Property("volume", "extensive", pooling="composition", uncertainty=True)
    model = tm.Model(small(), objective.outputs(8)).double().eval()
    samples = [Sample(a, {"volume": np.array([10.0 * len(a)])}) for a in (alloy, alloy[:2], alloy[:3])]
    for name, head in model.heads.items():
        head.calibrate(*objective.calibration(name, samples))  # type: ignore[operator]
    assert float(model.heads["volume"].shift) == pytest.approx(10.0)  # type: ignore[arg-type]
    once, twice = (model(to_graph([atoms], model.backbone.edges)) for atoms in (alloy, alloy * (2, 1, 1)))
    for name in ("volume", "volume_std"):
        torch.testing.assert_close(2 * once[name], twice[name])


def test_two_properties_keep_their_uncertainties_apart() -> None:
    both = tm.Together({name: tm.Property(name, uncertainty=True) for name in ("gap", "volume")})
    assert set(both.outputs(8)) == {"gap", "gap_std", "volume", "volume_std"}
    check_objective(both, small())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "composition", "kind": "per-atom"}, "one number per structure"),
        ({"pooling": "composition", "task": "classification"}, "one number per structure"),
        ({"uncertainty": True, "task": "classification"}, "probabilities instead of an uncertainty"),
        ({"uncertainty": True, "weight": 0.0}, "must be above zero"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tm.Property("x", **arguments)
