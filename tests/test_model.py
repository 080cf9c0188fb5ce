"""Models compute what is asked for, and their files hold all of them or are refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

import transfermium as tm
from transfermium.errors import InputError
from transfermium.graph import Cutoff, to_graph
from transfermium.model import BondVectors, copied, described, rebuilt


def potential(backbone: tm.Backbone | None = None, **outputs: Any) -> tm.Model:
    torch.manual_seed(0)
    backbone = backbone or tm.PaiNN(8, depth=2, cutoff=4.0, radial=8)
    heads: dict[str, Any] = {"energy": tm.EnergyHead(8), "forces": tm.Gradient("energy"), "stress": tm.Strain("energy")}
    return tm.Model(backbone, {**heads, **outputs}).eval()


def outputs_of(model: tm.Model, *structures: Atoms, wanted: list[str] | None = None) -> dict[str, Tensor]:
    return model(to_graph(structures, model.backbone.edges), wanted)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    potential().save(path)
    return path


# ------------------------------------------------------------------------------------------------- only what is asked


def test_only_what_is_wanted_is_returned(structures: list[Atoms]) -> None:
    model = potential(gap=tm.ScalarHead(8))
    assert list(outputs_of(model, *structures)) == ["energy", "gap", "forces", "stress"]
    assert list(outputs_of(model, *structures, wanted=["forces", "gap"])) == ["forces", "gap"]
    assert outputs_of(model, *structures, wanted=[]) == {}


def test_only_what_is_wanted_is_computed(molecule: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    model = potential(gap=tm.ScalarHead(8))
    called = []
    for name, head in model.heads.items():
        head.register_forward_hook(lambda *_, name=name: called.append(name))
    outputs_of(model, molecule, wanted=["forces"])
    assert called == ["energy"]

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a derivative was taken")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    outputs_of(model, molecule, wanted=["energy", "gap"])
    with pytest.raises(AssertionError, match="a derivative was taken"):
        outputs_of(model, molecule, wanted=["energy", "forces"])


def test_forces_and_stress_take_one_backward_pass(crystal: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(args)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    outputs_of(potential(), crystal)
    assert len(passes) == 1


def test_derivatives_are_differentiable_in_training_only(crystal: Atoms) -> None:
    model = potential()
    assert not any(value.requires_grad for value in outputs_of(model, crystal).values())
    model.train()
    assert all(value.requires_grad for value in outputs_of(model, crystal).values())


def test_forces_come_also_where_gradients_are_off(crystal: Atoms) -> None:
    model = potential()
    with torch.no_grad():
        quiet = outputs_of(model, crystal)
    assert torch.equal(quiet["forces"], outputs_of(model, crystal)["forces"])


def test_forces_come_from_a_frozen_model(crystal: Atoms, lone_atom: Atoms) -> None:
    model = potential().requires_grad_(False)
    assert bool(outputs_of(model, crystal)["forces"].any())
    assert not outputs_of(model, lone_atom)["forces"].any()


def test_an_output_that_is_not_there_is_an_error(crystal: Atoms) -> None:
    with pytest.raises(InputError, match="no output 'dipole': it has energy, forces, stress"):
        outputs_of(potential(), crystal, wanted=["dipole"])


def test_a_derivative_needs_its_head() -> None:
    with pytest.raises(InputError, match="output 'forces' derives 'energy', which is not a head"):
        tm.Model(tm.PaiNN(8), {"forces": tm.Gradient("energy")})


def test_bond_vectors_are_only_built_for_backbones_without() -> None:
    vector = {"forces": tm.VectorHead(8)}
    assert tm.Model(tm.PaiNN(8), vector).bond_vectors is None
    assert tm.Model(tm.TensorNet(8), vector).bond_vectors is None
    assert isinstance(tm.Model(tm.CGCNN(8), vector).bond_vectors, BondVectors)
    assert tm.Model(tm.CGCNN(8), {"energy": tm.EnergyHead(8)}).bond_vectors is None


def test_rows_are_atoms_or_structures() -> None:
    model = potential(charge=tm.AtomHead(8))
    per_atom = {name: model.per_atom(name) for name in model.outputs}
    assert per_atom == {"energy": False, "charge": True, "forces": True, "stress": False}


# ------------------------------------------------------------------------------------------------------------ physics


def test_forces_add_up_to_nothing(structures: list[Atoms]) -> None:
    for atoms in structures:
        total = outputs_of(potential().double(), atoms)["forces"].sum(dim=0)
        torch.testing.assert_close(total, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_molecules_and_slabs_have_no_stress(crystal: Atoms, molecule: Atoms) -> None:
    slab = crystal.copy()
    slab.pbc = [True, False, True]
    molecule.cell = 10 * np.eye(3)
    stress = outputs_of(potential(), crystal, slab, molecule)["stress"]
    assert bool(stress[0].isfinite().all())
    assert bool(stress[1:].isnan().all())


def test_stress_is_symmetric_and_negative_when_compressed() -> None:
    """A pair repulsion through the model's own machinery: the sign is ASE's."""

    class Repulsion(tm.Head):
        def forward(self, features: tm.Features, graph: Any) -> Tensor:
            repulsion = graph.sum_over_neighbors(torch.exp(-graph.edge_vectors().norm(dim=1))).double()
            return graph.sum_over_systems(repulsion)

    model = potential(push=Repulsion(), pressure=tm.Strain("push")).double()
    stress = outputs_of(model, bulk("NaCl", "rocksalt", a=5.6), wanted=["pressure"])["pressure"][0]
    torch.testing.assert_close(stress, stress.mT)
    assert bool((stress.diagonal() < 0).all())


def test_energies_of_large_systems_keep_their_digits() -> None:
    atoms = bulk("Cu", "fcc", a=3.7) * (10, 10, 10)
    atoms.positions += 0.05 * np.random.default_rng(0).normal(size=atoms.positions.shape)
    model = potential(tm.PaiNN(8, depth=1, cutoff=3.0, radial=4))
    plain = outputs_of(model, atoms, wanted=["energy"])["energy"].item()
    model.heads["energy"].references.fill_(-1e5)  # type: ignore[operator]
    shifted = outputs_of(model, atoms, wanted=["energy"])["energy"].item()
    assert shifted + 1e5 * len(atoms) == pytest.approx(plain, abs=1e-5)

    exact = outputs_of(model.double(), atoms, wanted=["energy"])["energy"].item()
    assert shifted == pytest.approx(exact, abs=1e-4)  # of -1e8 eV, with weights in single precision


# ----------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_holds_all_of_a_model(tmp_path: Path, structures: list[Atoms], dtype: torch.dtype) -> None:
    model = potential(gap=tm.ScalarHead(8, "attention"), site=tm.AtomHead(8, classes=4)).to(dtype)
    model.heads["energy"].references.fill_(1 / 3)  # type: ignore[operator]
    model.card = {"history": [{"steps": 3}], "note": "Å"}
    model.save(tmp_path / "new" / "model.safetensors")
    again = tm.load(tmp_path / "new" / "model.safetensors")

    assert again.card == model.card
    assert again.architecture() == model.architecture()
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for name, value in outputs_of(model, *structures).items():
        torch.testing.assert_close(outputs_of(again, *structures)[name], value, rtol=0, atol=0, equal_nan=True)


def test_the_card_can_be_read_without_us(saved: Path) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        card = json.loads(file.metadata()["transfermium"])
    assert card["backbone"]["class"] == "PaiNN"
    assert card["backbone"]["arguments"]["width"] == 8
    assert card["outputs"]["forces"] == {"class": "Gradient", "arguments": {"of": "energy"}}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match=f"there is no file {path}"):
            tm.load(path)


class Explosive:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Explosive()))
    torch.save(Explosive(), zipped)
    for path in (plain, zipped):
        with pytest.raises(InputError, match=f"{path} is a pickle"):
            tm.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content) if isinstance(keep, float) else keep)])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        tm.load(saved)


@pytest.mark.parametrize("card", [None, "", "no json", "{}", "[]", "3", "null", '"text"'])
def test_a_foreign_file_is_refused(tmp_path: Path, card: str | None) -> None:
    path = tmp_path / "foreign.safetensors"
    metadata = None if card is None else {"transfermium": card}
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(InputError, match="is not a transfermium model: its header has no readable card"):
        tm.load(path)


def edited(path: Path, **changes: Any) -> Path:
    """The file with other entries in its card; None removes one."""
    with safetensors.safe_open(path, "pt") as file:
        card = {**json.loads(file.metadata()["transfermium"]), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    card = {name: value for name, value in card.items() if value is not None}
    safetensors.torch.save_file(tensors, path, {"transfermium": json.dumps(card)})
    return path


def test_a_file_of_a_later_version_says_so(saved: Path) -> None:
    with pytest.raises(InputError, match="has file format 99, but this version reads 1: update transfermium"):
        tm.load(edited(saved, format=99))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"class": "Nobody", "arguments": {}}}, "the class Nobody is not known here: import the module"),
        ({"backbone": {"class": "EnergyHead", "arguments": {"width": 8}}}, "the class EnergyHead is not known here"),
        ({"backbone": {"class": "PaiNN", "arguments": {"depht": 2}}}, "damaged or from another version: .*depht"),
        ({"backbone": {"class": "PaiNN", "arguments": {"width": 4}}}, "damaged or from another version"),
        ({"backbone": {"class": "PaiNN", "arguments": {"width": 8, "cutoff": -1}}}, "a cutoff of -1 Å makes no sense"),
        ({"backbone": None}, "damaged or from another version"),
        ({"outputs": {"energy": {"class": "os.system", "arguments": {}}}}, "the class os.system is not known here"),
        ({"outputs": {"forces": {"class": "Gradient", "arguments": {"of": "energy"}}}}, "derives 'energy'"),
        ({"outputs": []}, "damaged or from another version"),
        ({"dtype": "int8"}, "damaged or from another version"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        tm.load(edited(saved, **changes))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="no space left"):
                potential(tm.PaiNN(8, depth=3)).save(saved)
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]
        assert saved.read_bytes() == before


def test_new_files_are_as_readable_as_any(saved: Path) -> None:
    other = saved.parent / "plain"
    other.write_bytes(b"")
    assert saved.stat().st_mode == other.stat().st_mode


# --------------------------------------------------------------------------------------------- arguments read back


def test_described_objects_can_be_built_again() -> None:
    backbone = tm.PaiNN(8, depth=1, inputs=["charge"])
    spec = json.loads(json.dumps(described(backbone)))
    again = rebuilt(spec, tm.Backbone)
    assert described(again) == described(copied(backbone)) == described(backbone)
    assert again.edges == Cutoff(5.0)


def test_a_copy_has_weights_of_its_own() -> None:
    torch.manual_seed(0)
    backbone = tm.PaiNN(8)
    assert not torch.equal(copied(backbone).node_inputs.element.weight, backbone.node_inputs.element.weight)
