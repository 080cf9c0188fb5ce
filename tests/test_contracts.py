"""Everything exported keeps the contracts, and the contracts notice what breaks them."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import ase
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transfermium as tm
from transfermium import backbones
from transfermium.graph import AtomGraph, Batch, Cutoff, Sample
from transfermium.model import Output
from transfermium.objectives.base import Loss, absolute_errors, label
from transfermium.testing import check_backbone, check_head, check_objective

SMALL: dict[str, Any] = {"width": 8, "channels": 8, "depth": 2, "cutoff": 4.0, "radial": 8, "gaussians": 8}

BACKBONES = [
    cls for name in backbones.__all__ if issubclass(cls := getattr(backbones, name), tm.Backbone) and cls != tm.Backbone
]

HEADS = [
    tm.EnergyHead(8),
    tm.ScalarHead(8),
    tm.ScalarHead(8, "attention"),
    tm.ScalarHead(8, "sum"),
    tm.ClassHead(8),
    tm.ClassHead(8, classes=3),
    tm.AtomHead(8),
    tm.AtomHead(8, classes=3),
    tm.VectorHead(8),
    tm.TensorHead(8),
    tm.CompositionHead(8),
    tm.CompositionHead(8, "extensive", heads=2, layers=(2, 1)),
    tm.DeviationHead(8),
    tm.DeviationHead(8, "extensive"),
    tm.DeviationHead(8, "per-atom"),
]

OBJECTIVES = [
    tm.Potential(),
    tm.Potential(conservative=False),
    tm.Potential(energy=1.0, forces=10.0, stress=0.0),
    tm.Potential(energy=0.0),
    tm.Denoise(),
    tm.Denoise(sigma=0.3, conservative=False),
    tm.Denoise(sigma=[0.05, 0.2], strain=0.03),
    tm.Denoise(conservative=False, strain=0.03),
    tm.Denoise(told_forces=True),
    tm.MaskAtoms(),
    tm.MaskAtoms(1.0, "leaf", flag=False, length=0.5, conservative=False),
    tm.MaskElements(),
    tm.MaskPositions(),
    tm.MaskPositions(0.5, "leaf", radius=2.5, rings=1, resolution=0.2, flag=False),
    tm.Together({"first": tm.Potential(), "second": tm.Potential(forces=0.0)}),
    tm.Together({"gap": tm.Property("gap"), "way": tm.Denoise(told_forces=True)}, weights={"way": 0.5}),
    tm.Fidelities(tm.Potential(), ["pbe", "scan"]),
    tm.Fidelities({"pbe": tm.Potential(conservative=False), "scan": tm.Potential(conservative=False, forces=2.0)}),
    tm.Fidelities(tm.Property("gap", uncertainty=True), ["pbe", "scan", "hse"], weights={"hse": 2.0}),
    tm.Fidelities(tm.Property("polarisability", "extensive"), ["pbe", "scan"]),
    tm.Fidelities(tm.Property("charge", "per-atom"), ["pbe", "scan"]),
    tm.Fidelities(tm.Property("metal", task="classification"), ["pbe", "scan"]),
    tm.Property("gap"),
    tm.Property("gap", pooling="attention", weight=2.0),
    tm.Property("gap", minus="cheap"),
    tm.Property("gap", pooling="composition", uncertainty=True),
    tm.Property("polarisability", "extensive"),
    tm.Property("polarisability", "extensive", pooling="composition"),
    tm.Property("charge", "per-atom"),
    tm.Property("charge", "per-atom", uncertainty=True),
    tm.Property("metal", task="classification"),
    tm.Property("site", "per-atom", "classification", classes=3),
]


def small(cls: type[tm.Backbone], **arguments: Any) -> tm.Backbone:
    """A backbone that is quick, whatever its constructor calls its sizes."""
    names = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in SMALL.items() if name in names}, **arguments)


def spelled(thing: Any) -> str:
    given = inspect.signature(type(thing)).parameters
    values = ", ".join(", ".join(v) if isinstance(v, dict) else str(v) for v in (getattr(thing, n) for n in given))
    return f"{type(thing).__name__}({values})"


@pytest.mark.parametrize("cls", BACKBONES)
def test_backbones_keep_every_law(cls: type[tm.Backbone]) -> None:
    check_backbone(small(cls))


@pytest.mark.parametrize("cls", BACKBONES)
def test_backbones_keep_every_law_with_inputs(cls: type[tm.Backbone]) -> None:
    check_backbone(small(cls, inputs=("charge",)))


@pytest.mark.parametrize("cls", BACKBONES)
def test_backbones_keep_every_law_with_vectors_that_they_may_be_told(cls: type[tm.Backbone]) -> None:
    check_backbone(small(cls, vector_inputs=("forces",)))


@pytest.mark.parametrize("cls", [tm.PaiNN, tm.CGCNN])  # with vectors and without
@pytest.mark.parametrize("head", HEADS, ids=spelled)
def test_heads_keep_every_law(head: tm.Head, cls: type[tm.Backbone]) -> None:
    check_head(head, small(cls))


@pytest.mark.parametrize("cls", [tm.PaiNN, tm.CGCNN, tm.TensorNet, tm.CGAT])
@pytest.mark.parametrize(("support", "kind"), [(0, "intensive"), (5, "extensive")])
def test_probes_keep_every_law(support: int, kind: str, cls: type[tm.Backbone]) -> None:
    torch.manual_seed(0)
    backbone = small(cls)
    crystal = tm.crystals("PBE", "test")[:1]
    names = tm.features(tm.Model(backbone, {}), crystal, per_atom=True, verbose=False).names
    head = tm.ProbeHead(len(names), support, kind)
    head.points.normal_()
    head.length.fill_(20.0)
    head.weights.normal_()
    check_head(head, backbone)


@pytest.mark.parametrize("cls", [tm.PaiNN, tm.CGCNN, tm.TensorNet, tm.EGNN])
def test_probes_of_energies_keep_every_law(cls: type[tm.Backbone]) -> None:
    torch.manual_seed(0)
    backbone = small(cls)
    crystal = tm.crystals("PBE", "test")[:1]
    names = tm.features(tm.Model(backbone, {}), crystal, per_atom=True, verbose=False).names
    head = tm.EnergyProbeHead(backbone.width, len(names))
    head.correction.normal_()
    check_head(head, backbone)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=spelled)
def test_objectives_keep_every_law(objective: tm.Objective) -> None:
    check_objective(objective)


def test_objectives_keep_every_law_on_a_backbone_without_vectors() -> None:
    check_objective(tm.Potential(conservative=False), small(tm.CGCNN))


def test_nothing_exported_is_left_out() -> None:
    def exported(base: type) -> set[type]:
        found = [getattr(tm, name) for name in tm.__all__]
        return {x for x in found if inspect.isclass(x) and issubclass(x, base)} - {base}

    assert exported(tm.Backbone) == set(BACKBONES)
    assert exported(tm.Head) == {type(head) for head in HEADS} | {
        tm.ProbeHead,
        tm.EnergyProbeHead,
    }  # each backbone has its own
    assert exported(tm.Objective) == {type(objective) for objective in OBJECTIVES}


def test_what_is_checked_is_not_changed() -> None:
    backbone = small(tm.PaiNN)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    check_backbone(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in backbone.parameters())


# ---------------------------------------------------------------------------------------------- what breaks the laws


class FlawedBackbone(tm.Backbone):
    """Sums over neighbours, with one flaw (or none)."""

    noise: Tensor

    def __init__(self, flaw: str = "none"):
        super().__init__()
        self.flaw = flaw
        self.width = 6
        self.edges = Cutoff(4.0)
        self.element = nn.Embedding(119, 6)
        self.filter = nn.Linear(1, 6)
        self.readout = nn.Linear(6, 6)
        self.register_buffer("noise", torch.rand(6), persistent=False)
        if flaw == "unused parameter":
            self.unused = nn.Linear(6, 6)

    def forward(self, graph: AtomGraph) -> tm.Features:
        if self.flaw == "changes the graph":
            graph.positions.add_(0.01)
        vectors = graph.edge_vectors()
        lengths = vectors.norm(dim=1, keepdim=True)
        weights = torch.ones_like(lengths) if self.flaw == "no envelope" else self.edges.envelope(lengths)
        if self.flaw == "no derivative":
            lengths = lengths.detach()
        if self.flaw == "absolute direction":
            lengths = lengths + vectors[:, :1]
        if self.flaw == "double only":
            lengths = lengths.double()

        x = self.element(graph.atomic_numbers)
        messages = weights * self.filter(lengths).tanh() * x.index_select(0, graph.senders)
        x = x + graph.sum_over_neighbors(messages)
        return self._finished(self.readout(x).tanh(), vectors, weights, graph)

    def _finished(self, x: Tensor, vectors: Tensor, weights: Tensor, graph: AtomGraph) -> tm.Features:
        start = torch.cumsum(graph.atoms_per_system(), 0) - graph.atoms_per_system()
        match self.flaw:
            case "absolute position":
                x = x + graph.positions[:, :1]
            case "mean over the batch":
                x = x + x.mean(dim=0)
            case "order of atoms":
                x = x + (torch.arange(graph.n_atoms) - start[graph.system_idx]).unsqueeze(1)
            case "size of the cell":
                x = x + graph.atoms_per_system()[graph.system_idx].unsqueeze(1)
            case "no neighbours":
                x = x / graph.sum_over_neighbors(weights).square()
            case "handedness":
                sums = [
                    graph.sum_over_neighbors(vectors * weights * vectors.norm(dim=1, keepdim=True) ** k)
                    for k in range(3)
                ]
                x = x + torch.linalg.det(torch.stack(sums, dim=1)).unsqueeze(1)
            case "not in the file":
                x = x + self.noise
            case "wrong width":
                x = torch.cat([x, x], dim=1)
            case "undeclared vectors":
                return tm.Features(x, graph.sum_over_neighbors((vectors * weights).unsqueeze(2).expand(-1, -1, 6)))
        return tm.Features(x)


class ForgetfulBackbone(FlawedBackbone):
    """Its constructor argument is gone."""

    def __init__(self, channels: int = 6):
        super().__init__()


class DiscreteBackbone(FlawedBackbone):
    """Admits what it does not keep."""

    laws: ClassVar[frozenset[str]] = frozenset({"rotation", "reflection"})


@pytest.mark.parametrize(
    ("flaw", "law"),
    {
        "changes the graph": "nothing_given_is_changed",
        "no neighbours": "outputs_are_finite",
        "mean over the batch": "alone_is_batched",
        "absolute position": "translation_keeps",
        "order of atoms": "permutation_permutes",
        "size of the cell": "repeated_cells_are_multiples",
        "absolute direction": "rotation_turns_or_keeps",
        "handedness": "reflection_turns_or_keeps",
        "no envelope": "nothing_jumps_at_the_cutoff",
        "no derivative": "derivatives_are_finite_differences",
        "double only": "single_precision_is_close",
        "not in the file": "files_keep_everything",
        "unused parameter": "every_parameter_learns",
        "wrong width": "features_have_their_shapes",
        "undeclared vectors": "features_have_their_shapes",
    }.items(),
)
def test_a_flawed_backbone_is_told_which_law_it_breaks(flaw: str, law: str) -> None:
    with pytest.raises(AssertionError, match=f"FlawedBackbone breaks the law '{law}'"):
        check_backbone(FlawedBackbone(flaw))


def test_a_backbone_without_flaw_passes() -> None:
    check_backbone(FlawedBackbone())


def test_arguments_that_are_not_kept_are_named() -> None:
    with pytest.raises(AssertionError, match="does not remember its argument 'channels'"):
        check_backbone(ForgetfulBackbone())


def test_a_backbone_is_only_held_to_the_laws_it_claims() -> None:
    check_backbone(DiscreteBackbone("no envelope"))


class FlawedHead(tm.Head):
    """A vector per atom and its length per structure, with one flaw."""

    needs = frozenset({"vectors"})
    shift: Tensor

    def __init__(self, width: int, flaw: str):
        super().__init__()
        self.width = width
        self.flaw = flaw
        self.per_atom = flaw in ("not a vector", "claims rows")
        self.mix = nn.Linear(width, 1, bias=False)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, features: tm.Features, graph: AtomGraph) -> Tensor:
        assert features.vectors is not None
        vectors = 10 * self.mix(features.vectors).squeeze(2)  # far above the tolerance of any law
        if self.flaw == "not a vector":
            return vectors.abs()
        lengths = graph.sum_over_systems(vectors.square().sum(dim=1)) + self.shift
        return lengths**2 if self.flaw == "grows with the square" else lengths

    def calibrate(self, name: str, samples: Any) -> None:
        if self.flaw == "careless calibration":
            self.shift.fill_(np.nanmean([sample.targets[name].mean() for sample in samples] + [1.0]))


@pytest.mark.parametrize(
    ("flaw", "law"),
    {
        "claims rows": "rows_are_atoms_or_structures",
        "careless calibration": "labels_set_references_and_scale",
        "grows with the square": "repeated_cells_are_multiples",
        "not a vector": "rotation_turns_or_keeps",
    }.items(),
)
def test_a_flawed_head_is_told_which_law_it_breaks(flaw: str, law: str) -> None:
    with pytest.raises(AssertionError, match=f"FlawedHead breaks the law '{law}'"):
        check_head(FlawedHead(8, flaw))


class FlawedObjective(tm.Objective):
    """A charge per atom, with one flaw."""

    def __init__(self, flaw: str = "none"):
        self.flaw = flaw

    def outputs(self, width: int) -> dict[str, Output]:
        return {"charge": tm.AtomHead(width)}

    def labels(self) -> dict[str, bool]:
        return {"charge": True}

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        target = label(atoms, "charge", (len(atoms),))
        if self.flaw == "changes the structure":
            atoms.info["seen"] = True
        if self.flaw == "global randomness":
            atoms = atoms.copy()
            atoms.positions += 0.01 * np.random.normal(size=atoms.positions.shape)
        if self.flaw == "unknown name":
            return Sample(atoms, {"charges": target})
        return Sample(atoms, {"charge": target[None] if self.flaw == "extra axis" else target})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        output, target = outputs["charge"], batch.targets["charge"]
        total, count = absolute_errors(output.detach() if self.flaw == "detached" else output, target, 1.0)
        match self.flaw:
            case "mean":
                total = total / count.clamp(min=1)
            case "counts what is missing":
                count = torch.tensor(len(target))
            case "miscounts":
                count = 2 * count
            case "wrong direction":
                total = -total
            case "nan":
                total = (output.double() - target).abs().sum()
        return {"charge": (total, count)}


@pytest.mark.parametrize(
    ("flaw", "law"),
    {
        "changes the structure": "preparing_keeps_the_structure",
        "global randomness": "chance_is_an_argument",
        "unknown name": "targets_are_outputs",
        "extra axis": "targets_are_outputs",
        "detached": "losses_are_sums_and_counts",
        "miscounts": "losses_are_sums_and_counts",
        "mean": "losses_add_up",
        "counts what is missing": "missing_labels_do_not_count",
        "nan": "missing_labels_do_not_count",
    }.items(),
)
def test_a_flawed_objective_is_told_which_law_it_breaks(flaw: str, law: str) -> None:
    with pytest.raises(AssertionError, match=f"FlawedObjective breaks the law '{law}'"):
        check_objective(FlawedObjective(flaw))


def test_an_objective_without_flaw_passes() -> None:
    check_objective(FlawedObjective())
