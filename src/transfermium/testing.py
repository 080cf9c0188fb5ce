"""Contracts: hold your own backbone, head or objective to the laws that ours keep.

Call one of the three functions in a test. It returns nothing, or raises `AssertionError` with the law that is broken.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.build import bulk

from .backbones import Backbone, PaiNN
from .graph import AtomGraph, Batch, Sample, to_batch, to_graph
from .heads import AtomHead, ClassHead, EnergyHead, Head, ScalarHead, TensorHead, VectorHead
from .model import Gradient, Model, Output, Strain, copied, described, load, rebuilt
from .objectives import Fidelities, Objective
from .objectives.base import told

Outputs = dict[str, np.ndarray]
Law = Callable[..., None]
Move = Callable[[ase.Atoms, np.ndarray], ase.Atoms]

VECTORS = "vectors told"  # array of the structures below
STEP = 1e-4  # Å, or strain: of finite differences, and of the step across a cutoff


def check_backbone(backbone: Backbone) -> None:
    """Hold a backbone to every law, with one head of each kind on it.

    `rotation`, `reflection`, `smooth` and `derivatives` bind it only if its `laws` name them. The weights it comes
    with are not changed.

    Raises:
        AssertionError: naming the law that is broken, and how.
    """
    _hold(backbone, [arguments_are_readable], backbone, Backbone)
    _hold(backbone, [features_have_their_shapes], backbone)

    width = backbone.width
    derivatives: dict[str, Output] = {"forces": Gradient("energy"), "stress": Strain("energy")}
    outputs: dict[str, Output] = {
        "energy": EnergyHead(width),
        **(derivatives if "derivatives" in backbone.laws else {}),
        "mean": ScalarHead(width),
        "attention": ScalarHead(width, "attention"),
        "sum": ScalarHead(width, "sum"),
        "classes": ClassHead(width),
        "atom": AtomHead(width),
        "vector": VectorHead(width),
        "tensor": TensorHead(width),
    }
    _hold(backbone, laws_of_models(backbone), _moved_weights(Model(copy.deepcopy(backbone), outputs)))


def check_head(head: Head, backbone: Backbone | None = None) -> None:
    """Hold a head to every law, on features of `backbone`; by default of a small PaiNN of the head's `width`.

    The output has to stay as it is or to turn with the structure: rows of three numbers as vectors, rows of 3×3 as
    tensors. In a repeated cell it has to stay (intensive) or to grow in proportion (extensive). The derivatives of an
    output of one number per structure are checked too.

    Raises:
        AssertionError: naming the law that is broken, and how.
    """
    _hold(head, [arguments_are_readable], head, Head)
    if backbone is None:
        if not isinstance(width := getattr(head, "width", None), int):
            raise AssertionError(f"{type(head).__name__} has no width to build features of: pass a backbone")
        backbone = _small_backbone(width)

    model = _moved_weights(Model(copy.deepcopy(backbone), {"head": copy.deepcopy(head)}))
    _hold(head, [rows_are_atoms_or_structures, labels_set_references_and_scale], model)
    if "derivatives" in backbone.laws and _outputs(model, _molecule())["head"].shape == (1,):
        model = Model(model.backbone, {**model.outputs, "forces": Gradient("head"), "stress": Strain("head")}).eval()
    _hold(head, laws_of_models(backbone), model)


def check_objective(
    objective: Objective, backbone: Backbone | None = None, structures: Sequence[ase.Atoms] | None = None
) -> None:
    """Hold an objective to every law, training a small PaiNN or a copy of `backbone`.

    Args:
        structures: with labels; by default small ones, whose labels are made up in the shape of the target of the
            same name.

    Raises:
        AssertionError: naming the law that is broken, and how.
    """
    _hold(objective, [arguments_are_readable], objective, Objective)
    model = _objective_model(objective, _small_backbone(16) if backbone is None else backbone)
    if structures is None:
        bare = [_crystal(), _molecule(), _lone_atom()]
        _hold(objective, LAWS_OF_VIEWS, objective, model, bare)
        labelled = [_labelled(atoms, objective, model) for atoms in bare]
        structures = [one for atoms in labelled for one in _at_every_level(atoms, objective)]
    _hold(objective, LAWS_OF_VIEWS, objective, model, structures)

    samples = [_prepared(objective, atoms) for atoms in structures]
    settled = objective.settled(samples)
    _hold(settled, [arguments_are_readable], settled, Objective)
    model = _objective_model(settled, model.backbone)
    for name, head in model.heads.items():
        head.calibrate(*settled.calibration(name, samples))  # type: ignore[operator]
    _hold(objective, LAWS_OF_LOSSES, settled, model, structures)


# -- laws of everything that is saved -------------------------------------------------------------------------------


def arguments_are_readable(thing: Any, base: type) -> None:
    """Constructor arguments are kept as attributes that JSON can hold, and build the same again"""
    spec = json.dumps(described(thing))
    for again in (copied(thing), rebuilt(json.loads(spec), base)):
        _claim(json.dumps(described(again)) == spec, f"{spec} became {json.dumps(described(again))}")


# -- laws of backbones and heads ------------------------------------------------------------------------------------


def laws_of_models(backbone: Backbone) -> list[Law]:
    """What every model on this backbone has to keep, simplest first."""
    optional = {
        "rotation": rotation_turns_or_keeps,
        "reflection": reflection_turns_or_keeps,
        "smooth": nothing_jumps_at_the_cutoff,
        "derivatives": derivatives_are_finite_differences,
    }
    return [
        nothing_given_is_changed,
        outputs_are_finite,
        alone_is_batched,
        translation_keeps,
        permutation_permutes,
        repeated_cells_are_multiples,
        *(law for name, law in optional.items() if name in backbone.laws),
        single_precision_is_close,
        files_keep_everything,
        every_parameter_learns,
        single_precision_learns_the_same,
    ]


def features_have_their_shapes(backbone: Backbone) -> None:
    """Features are scalars (n_atoms, width) and, if `laws` names vectors, vectors (n_atoms, 3, width)"""
    backbone = copy.deepcopy(backbone).double()
    graph = _graph(backbone, _structures())
    features = backbone(graph)
    shape = tuple(features.scalars.shape)
    _claim(shape == (graph.n_atoms, backbone.width), f"scalars have the shape {shape} for {graph.n_atoms} atoms")

    promised = "vectors" in backbone.laws
    found = features.vectors is not None
    _claim(found == promised, "there are none" if promised else "there are some: add it to `laws`")
    if features.vectors is not None:
        shape = tuple(features.vectors.shape)
        _claim(shape == (graph.n_atoms, 3, backbone.width), f"vectors have the shape {shape}")


def rows_are_atoms_or_structures(model: Model) -> None:
    """A head has one row per atom if it is `per_atom`, else one per structure"""
    for name, value in _outputs(model, *_structures()).items():
        rows = sum(map(len, _structures())) if model.per_atom(name) else len(_structures())
        _claim(value.ndim > 0 and len(value) == rows, f"its shape is {value.shape}, but {rows} rows are due")
        if isinstance(model.outputs[name], TensorHead):
            _claim_close(value, value.swapaxes(1, 2), "the tensor and its transpose")


def labels_set_references_and_scale(model: Model) -> None:
    """`calibrate` changes nothing without labels, never moves a weight, and bears labels that are all equal"""
    atoms = [_crystal(), _molecule()]
    for label in (np.nan, 3.0):
        head = copy.deepcopy(model.heads["head"])
        before = copy.deepcopy(head)
        shapes = [_outputs(model, one)["head"].shape for one in atoms]
        samples = [Sample(one, {"head": np.full(shape, label)}) for one, shape in zip(atoms, shapes, strict=True)]
        head.calibrate("head", samples)  # type: ignore[operator]
        fixed = dict(before.state_dict() if np.isnan(label) else before.named_parameters())
        for name, value in head.state_dict().items():
            _claim(bool(torch.isfinite(value).all()), f"'{name}' is not finite for labels of {label}")
            _claim(name not in fixed or torch.equal(value, fixed[name]), f"'{name}' moved for labels of {label}")


def nothing_given_is_changed(model: Model) -> None:
    """Structures and graphs are left as they were given"""
    given = _structures()
    graph = _graph(model.backbone, given)
    before = copy.deepcopy(graph)
    for wanted in (list(model.heads), list(model.outputs)):  # derivatives are taken of a copy
        model(graph, wanted)
    tensors = zip((*before[:-1], *before.inputs.values()), (*graph[:-1], *graph.inputs.values()), strict=True)
    _claim(all(torch.equal(a, b) and not b.requires_grad for a, b in tensors), "the graph was changed")
    _claim(all(a == b for a, b in zip(given, _structures(), strict=True)), "an ase.Atoms was changed")


def outputs_are_finite(model: Model) -> None:
    """A lone atom and a structure without atoms have finite outputs, alone and beside others"""
    for structures in ([_lone_atom()], [_nothing()], _structures()):
        outputs = _outputs(model, *structures)
        strained = {name for name, output in model.outputs.items() if isinstance(output, Strain)}  # NaN is right there
        for name in outputs.keys() - strained:
            _claim(bool(np.isfinite(outputs[name]).all()), f"'{name}' is not finite")


def alone_is_batched(model: Model) -> None:
    """Structures side by side have the outputs that each has alone"""
    alone = [_outputs(model, atoms) for atoms in _structures()]
    expected = {name: np.concatenate([one[name] for one in alone]) for name in alone[0]}
    _claim_same(expected, _outputs(model, *_structures()))


def translation_keeps(model: Model) -> None:
    """Moving a structure as a whole changes nothing"""
    for atoms in _structures():
        moved = atoms.copy()
        moved.positions += [0.3, -1.1, 0.7]
        _claim_same(_outputs(model, atoms), _outputs(model, moved))


def permutation_permutes(model: Model) -> None:
    """Another order of the atoms gives the same outputs in that order"""
    for atoms in (_crystal(), _molecule()):
        order = np.roll(np.arange(len(atoms)), 1)
        before, after = _outputs(model, atoms), _outputs(model, atoms[order])
        _claim_same({name: x[order] if model.per_atom(name) else x for name, x in before.items()}, after)


def repeated_cells_are_multiples(model: Model) -> None:
    """A cell repeated twice has twice the energy, and the same on every copy of an atom"""
    once, twice = _outputs(model, _crystal()), _outputs(model, _crystal() * (2, 1, 1))
    growth = {name: _growth(head, once[name], twice[name]) for name, head in model.heads.items()}
    for name, value in once.items():
        output = model.outputs[name]
        factor = growth[name] if isinstance(output, Head) else growth[output.of] / 2
        expected = np.concatenate([value, value]) if model.per_atom(name) else value
        _claim_close(factor * expected, twice[name], f"{factor} times '{name}' of one cell and that of two")


def rotation_turns_or_keeps(model: Model) -> None:
    """Outputs turn with the structure or stay as they are"""
    _claim_turns(model, _rotation())


def reflection_turns_or_keeps(model: Model) -> None:
    """The mirror image has the mirrored outputs"""
    _claim_turns(model, _rotation() @ np.diag([1.0, 1.0, -1.0]))


def nothing_jumps_at_the_cutoff(model: Model) -> None:
    """Outputs and derivatives are continuous where a neighbour crosses the cutoff"""
    cutoff = model.backbone.edges.radius

    def with_neighbor_at(distance: float) -> Outputs:
        positions = [[0.0, 0.0, 0.0], [0.0, 1.1, 0.0], [distance, 0.0, 0.0]]
        return _outputs(model, ase.Atoms("OHC", positions, cell=[3 * cutoff] * 3, pbc=True))

    near, inside, outside = (with_neighbor_at(d) for d in (0.7 * cutoff, cutoff - STEP, cutoff + STEP))
    for name in near:
        jump, effect = (np.abs(x - outside[name]).max() for x in (inside[name], near[name]))
        _claim(jump <= 0.01 * effect + 1e-9, f"'{name}' jumps by {jump:.2g} at {cutoff} Å")


def derivatives_are_finite_differences(model: Model) -> None:
    """Forces and stress are the finite differences of what they derive"""
    for name, output in model.outputs.items():
        if isinstance(output, Gradient):
            for atoms in (_crystal(), _molecule(), _slab()):
                numeric = -_slopes(model, output.of, atoms, _displaced, (len(atoms), 3))
                _claim_close(numeric, _outputs(model, atoms, wanted=[name])[name], f"differences and '{name}'", 1e-5)
        if isinstance(output, Strain):
            atoms = _crystal()
            numeric = _slopes(model, output.of, atoms, _strained, (3, 3)) / atoms.get_volume()
            _claim_close(numeric, _outputs(model, atoms, wanted=[name])[name][0], f"differences and '{name}'", 1e-5)


def single_precision_is_close(model: Model) -> None:
    """The model in float32 agrees with itself in float64"""
    rough = copy.deepcopy(model).float()
    _claim_same(_outputs(model, *_structures()), _outputs(rough, *_structures()), 1e-3)


def files_keep_everything(model: Model) -> None:
    """A saved and loaded model has the very same outputs"""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.safetensors")
        again = load(Path(folder) / "model.safetensors")
    for name, value in _outputs(model, *_structures()).items():
        other = _outputs(again, *_structures())[name]
        _claim(np.array_equal(value, other, equal_nan=True), f"'{name}' differs by {np.nanmax(np.abs(value - other))}")


def every_parameter_learns(model: Model) -> None:
    """Every trainable parameter has a finite gradient from some output, and not zero"""
    for name, gradient in _gradients(copy.deepcopy(model)).items():
        if gradient is None:
            raise AssertionError(f"{name} has none")
        _claim(bool(torch.isfinite(gradient).all()), f"{name} has one that is not finite")
        _claim(bool(gradient.any()), f"{name} has only zeros")


def single_precision_learns_the_same(model: Model) -> None:
    """Gradients of the parameters in float32 agree with those in float64"""
    exact, rough = _gradients(copy.deepcopy(model)), _gradients(copy.deepcopy(model).float())
    largest = max(float(gradient.norm()) for gradient in exact.values() if gradient is not None)
    for name, gradient in exact.items():
        other = rough[name]
        if gradient is None or other is None:
            raise AssertionError(f"{name} has none")
        difference = float((gradient - other).norm()) / (float(gradient.norm()) + 1e-3 * largest)
        _claim(difference < 1e-2, f"that of {name} differs by {difference:.1e} of its size")


def _gradients(model: Model) -> dict[str, torch.Tensor | None]:
    """What every trainable parameter has to do with a random combination of all outputs."""
    model.train()
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for value in model(_graph(model.backbone, _structures())).values():
        known = value[torch.isfinite(value)].double()
        total = total + (known * torch.randn(known.shape, generator=generator, dtype=torch.float64)).sum()
    total.backward()
    return {
        name: None if p.grad is None else p.grad.double() for name, p in model.named_parameters() if p.requires_grad
    }


# -- laws of objectives ---------------------------------------------------------------------------------------------


def preparing_keeps_the_structure(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """`prepare` leaves the structure as it was given, labels included"""
    for atoms in structures:
        before = _contents(atoms)
        _prepared(objective, atoms)
        _claim(_contents(atoms) == before, f"{atoms.get_chemical_formula()} was changed")


def chance_is_an_argument(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """`prepare` takes its randomness from `rng` alone"""
    for atoms in structures:
        one, other = _prepared(objective, atoms, seed=1), _prepared(objective, atoms, seed=1)
        _claim(_contents(one.atoms) == _contents(other.atoms), "the same rng gave two structures")
        for name in one.targets.keys() | one.inputs.keys():
            a, b = ({**sample.inputs, **sample.targets}[name] for sample in (one, other))
            _claim(np.array_equal(a, b, equal_nan=True), f"the same rng gave two values of '{name}'")


def targets_are_outputs(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """Outputs are wanted for targets, which have a leading axis of atoms, or of one structure"""
    for atoms in structures:
        sample = _prepared(objective, atoms)
        for name in objective.wanted(sample.targets):
            _claim(name in model.outputs, f"'{name}' is no output: there are {', '.join(model.outputs)}")
        for name, target in sample.targets.items():
            per_atom = model.per_atom(name) if name in model.outputs else None
            rows = [1] * (per_atom is not True) + [len(sample.atoms)] * (per_atom is not False)
            shape = np.shape(target)
            _claim(bool(shape) and shape[0] in rows, f"'{name}' has the shape {shape} for {len(sample.atoms)} atoms")


def losses_are_sums_and_counts(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """Every term is a finite sum over present labels with their count, and can be differentiated"""
    batch = _batch(objective, model, structures)
    model = copy.deepcopy(model).train()
    terms = objective.loss(model(batch.graph, objective.wanted(batch.targets)), batch)
    _claim(bool(terms), "there are no terms")
    for name, (total, count) in terms.items():
        _claim(total.dim() == 0 and bool(torch.isfinite(total)), f"the sum of '{name}' is {total}")
        _claim(int(count) == float(count) > 0, f"the count of '{name}' is {count}, although there are labels")
        if name in batch.targets:
            present = torch.isfinite(batch.targets[name])
            rows = present.reshape(len(present), -1).any(dim=1)
            due = {int(present.sum()), int(rows.sum())}
            _claim(int(count) in due, f"the count of '{name}' is {int(count)}, but {due} are present")

    torch.stack([total for total, _ in terms.values()]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    _claim(any(bool(g.any()) for g in gradients), "no weight has a gradient")
    _claim(all(bool(torch.isfinite(g).all()) for g in gradients), "a gradient is not finite")


def losses_add_up(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """Sums and counts of a batch are those of its structures added up"""
    together = _terms(objective, model, _batch(objective, model, structures))
    alone = [_terms(objective, model, _batch(objective, model, [atoms])) for atoms in structures]
    for name, pair in together.items():
        added = np.sum([terms.get(name, (0.0, 0.0)) for terms in alone], axis=0)
        _claim_close(added, np.array(pair), f"sum and count of '{name}'")


def missing_labels_do_not_count(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """A structure without labels adds nothing to sums and counts"""
    if not objective.labels():
        return
    bare = [ase.Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in structures]
    for name, (total, count) in _terms(objective, model, _batch(objective, model, bare)).items():
        _claim(total == count == 0, f"'{name}' has a sum of {total} and a count of {count} without labels")


def learning_lowers_the_loss(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> None:
    """A few steps on one batch lower the loss"""
    batch = _batch(objective, model, structures)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        terms = objective.loss(model(batch.graph, objective.wanted(batch.targets)), batch)
        loss = torch.stack([total / count for total, count in terms.values() if count]).sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _claim(losses[-1] < losses[0], f"it went from {losses[0]:.4g} to {losses[-1]:.4g}")


LAWS_OF_VIEWS: list[Law] = [preparing_keeps_the_structure, chance_is_an_argument, targets_are_outputs]
LAWS_OF_LOSSES: list[Law] = [
    losses_are_sums_and_counts,
    losses_add_up,
    missing_labels_do_not_count,
    learning_lowers_the_loss,
]


# -- saying what is broken ------------------------------------------------------------------------------------------


def _hold(thing: Any, laws: Sequence[Law], *arguments: Any) -> None:
    for law in laws:
        try:
            law(*arguments)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(
                f"{type(thing).__name__} breaks the law '{law.__name__}'. {law.__doc__}; here: {kind}{error}"
            ) from error


def _claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-7) -> bool:
    size = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=tolerance * (size + 0.1), equal_nan=True)


def _claim_close(a: np.ndarray, b: np.ndarray, what: str, tolerance: float = 1e-7) -> None:
    if not _close(a, b, tolerance):
        by = f"{np.nanmax(np.abs(a - b)):.2g}" if a.shape == b.shape else f"shape: {a.shape} and {b.shape}"
        raise AssertionError(f"{what} differ by {by}")


def _claim_same(expected: Outputs, found: Outputs, tolerance: float = 1e-7) -> None:
    for name, value in expected.items():
        _claim_close(value, found[name], f"two values of '{name}'", tolerance)


def _claim_turns(model: Model, matrix: np.ndarray) -> None:
    for atoms in (_crystal(), _molecule(), _slab()):
        before, after = _outputs(model, atoms), _outputs(model, _turned(atoms, matrix))
        for name, value in before.items():
            if not _close(value, after[name]):
                _claim_close(_turned_rows(value, matrix), after[name], f"'{name}' of the turned structure, and turned,")


# -- structures and models ------------------------------------------------------------------------------------------


def _structures() -> list[ase.Atoms]:
    return [_crystal(), _lone_atom(), _molecule(), _nothing(), _slab()]


def _crystal() -> ase.Atoms:
    """Two atoms in a triclinic cell smaller than any cutoff."""
    atoms = bulk("BN", "zincblende", a=3.62)
    atoms.set_cell(atoms.cell.array @ [[1.02, 0.03, 0.0], [0.0, 0.97, -0.02], [0.01, 0.0, 1.0]], scale_atoms=True)
    atoms.positions[1] += [0.08, -0.05, 0.11]
    return _with_vectors(atoms)


def _molecule() -> ase.Atoms:
    """Chiral, so that its mirror image is another one."""
    positions = [[0.0, 0.0, 0.0], [1.2, 0.1, 0.0], [-0.3, 1.0, 0.2], [0.2, 0.4, 1.3]]
    return _with_vectors(ase.Atoms("COHN", positions))


def _slab() -> ase.Atoms:
    """Periodic in two directions, with a third cell vector that means nothing."""
    positions = [[0.0, 0.0, 0.0], [0.9, 0.8, 1.5]]
    cell = [[2.6, 0.2, 0.0], [-0.4, 2.9, 0.1], [0.0, 0.0, 7.0]]
    return _with_vectors(ase.Atoms("BC", positions, cell=cell, pbc=[True, True, False]))


def _lone_atom() -> ase.Atoms:
    return _with_vectors(ase.Atoms("O", positions=[[0.1, 0.2, 0.3]]))


def _with_vectors(atoms: ase.Atoms) -> ase.Atoms:
    """With vectors for backbones that may be told some."""
    atoms.set_array(VECTORS, np.random.default_rng(len(atoms)).normal(scale=2.0, size=(len(atoms), 3)))
    return atoms


def _nothing() -> ase.Atoms:
    return ase.Atoms()


def _rotation() -> np.ndarray:
    """About a skew axis."""
    q, _ = np.linalg.qr([[0.3, -0.8, 0.5], [0.9, 0.4, 0.1], [-0.2, 0.6, 0.7]])
    return q * np.linalg.det(q)


def _turned(atoms: ase.Atoms, matrix: np.ndarray) -> ase.Atoms:
    turned = ase.Atoms(atoms.numbers, atoms.positions @ matrix.T, cell=atoms.cell.array @ matrix.T, pbc=atoms.pbc)
    turned.set_array(VECTORS, _vectors(atoms) @ matrix.T)
    return turned


def _turned_rows(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rows of three numbers as vectors, rows of 3×3 as tensors, others as they are."""
    if x.shape[1:] == (3, 3):
        return matrix @ x @ matrix.T
    return x @ matrix.T if x.shape[1:] == (3,) else x


def _growth(head: Any, once: np.ndarray, twice: np.ndarray) -> int:
    """By which factor an output of a structure grows when the cell is repeated: an energy has to double."""
    if head.per_atom or (_close(once, twice) and not isinstance(head, EnergyHead)):
        return 1
    return 2


def _displaced(atoms: ase.Atoms, step: np.ndarray) -> ase.Atoms:
    moved = atoms.copy()
    moved.positions += step
    return moved


def _strained(atoms: ase.Atoms, step: np.ndarray) -> ase.Atoms:
    strained = _turned(atoms, np.eye(3) + (step + step.T) / 2)
    strained.set_array(VECTORS, _vectors(atoms))  # what a model is told stays
    return strained


def _slopes(model: Model, name: str, atoms: ase.Atoms, moved: Move, shape: tuple[int, int]) -> np.ndarray:
    """Central differences of one output of one structure along each component of a step of this shape."""
    steps = STEP * np.eye(shape[0] * shape[1]).reshape(-1, *shape)
    there = _outputs(model, *(moved(atoms, step) for step in steps), wanted=[name])[name]
    back = _outputs(model, *(moved(atoms, -step) for step in steps), wanted=[name])[name]
    return ((there - back) / (2 * STEP)).reshape(shape)


def _graph(backbone: Backbone, structures: Sequence[ase.Atoms]) -> AtomGraph:
    """A graph with the inputs that the backbone takes: scalars made up from the elements, vectors where there are."""
    inputs = [
        {
            **dict.fromkeys(getattr(backbone, "inputs", ()), atoms.numbers[:, None] / 10),
            **dict.fromkeys(getattr(backbone, "vector_inputs", ()), _vectors(atoms)),
        }
        for atoms in structures
    ]
    return to_graph(structures, backbone.edges, inputs)


def _vectors(atoms: ase.Atoms) -> np.ndarray:
    found: np.ndarray = atoms.arrays.get(VECTORS, np.zeros((len(atoms), 3)))
    return found


def _outputs(model: Model, *structures: ase.Atoms, wanted: Sequence[str] | None = None) -> Outputs:
    outputs = model(_graph(model.backbone, structures), wanted)
    return {name: value.detach().double().numpy() for name, value in outputs.items()}


def _moved_weights(model: Model) -> Model:
    """In double precision, all weights moved a little: layers that start at zero would hide what lies before them."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _small_backbone(width: int) -> Backbone:
    """The same weights every time: whether a flaw is seen must not depend on what was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PaiNN(width, depth=2, cutoff=4.0, radial=8)


def _objective_model(objective: Objective, backbone: Backbone) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(told(backbone, objective), objective.outputs(backbone.width)).double().eval()


def _prepared(objective: Objective, atoms: ase.Atoms, seed: int = 0) -> Sample:
    return objective.prepare(atoms, np.random.default_rng(seed))


def _batch(objective: Objective, model: Model, structures: Sequence[ase.Atoms]) -> Batch:
    return to_batch([_prepared(objective, atoms) for atoms in structures], model.backbone.edges)


def _terms(objective: Objective, model: Model, batch: Batch) -> dict[str, tuple[float, float]]:
    terms = objective.loss(model(batch.graph, objective.wanted(batch.targets)), batch)
    return {name: (float(total.detach()), float(count)) for name, (total, count) in terms.items()}


def _labelled(atoms: ase.Atoms, objective: Objective, model: Model) -> ase.Atoms:
    """The structure with a label wherever it has a finite output: zero or one, or random vectors and tensors."""
    targets = {name.rpartition(" ")[2]: target for name, target in _prepared(objective, atoms).targets.items()}
    full = {name: o for name in objective.labels() for o in model.outputs if o == name or o.endswith(f"_{name}")}
    labels = {name: targets[name] for name in full if name in targets}
    outputs = {name: _outputs(model, atoms, wanted=[full[name]])[full[name]] for name in labels}
    rng = np.random.default_rng(len(atoms))
    for name, target in labels.items():
        if not np.isfinite(outputs[name]).all():
            continue
        per_atom = model.per_atom(full[name])
        label = rng.normal(size=target.shape) if target.ndim > 1 else (atoms.numbers if per_atom else len(atoms)) % 2
        if per_atom:
            atoms.set_array(name, np.asarray(label))
        else:
            atoms.info[name] = np.squeeze(label)
    for output, (quantity, minus) in objective.differences().items():
        if np.isfinite(_outputs(model, atoms, wanted=[output])[output]).all():
            cheap = atoms.numbers if model.per_atom(output) else np.asarray(len(atoms))
            store = atoms.arrays if model.per_atom(output) else atoms.info
            store[quantity.rpartition(" ")[2]], store[minus] = 1.5 * cheap, 1.0 * cheap
    return atoms


def _at_every_level(atoms: ase.Atoms, objective: Objective) -> list[ase.Atoms]:
    """The structure once for each level of theory that the objective has, or as it is."""
    if not isinstance(objective, Fidelities):
        return [atoms]
    copies = [atoms.copy() for _ in objective.levels]
    for one, level in zip(copies, objective.levels, strict=True):
        one.info["level"] = level
    return copies


def _contents(atoms: ase.Atoms) -> str:
    """All that a structure holds, to be compared."""
    results: Mapping[str, Any] = getattr(atoms.calc, "results", {})
    held = {**atoms.arrays, **{f"info {k}": v for k, v in atoms.info.items()}, **results, "cell": atoms.cell.array}
    return repr({name: np.asarray(value).tolist() for name, value in held.items()}) + repr(atoms.pbc.tolist())
