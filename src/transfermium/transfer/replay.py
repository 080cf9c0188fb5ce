"""Replay: the base's own task beside the new one; and the ledger of what a base forgot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import torch

from ..card import validated
from ..console import console, table
from ..data.columns import isolated_atoms
from ..data.labels import Labelled, Labels, resolve
from ..data.read import Source, read
from ..data.sequences import Joined, Subset
from ..data.split import IDS, split
from ..dataset import TrainingData
from ..errors import InputError
from ..evaluate import PRINTED, _as_in_training, objective_of, predict, unseen_elements
from ..levels import apart, learned_levels
from ..model import Model, copied, described
from ..objectives import Objective, Potential, Together
from ..objectives.together import Parts
from ..run import fingerprint
from ..train import TrainConfig, chosen_device

GENERATED = "generated"
NEW, OLD = "new", "base"  # parts of what is learned together
ASIDE = 0.1  # of what there is to replay, at least, for the ledger
FEWEST, COPIES, MOST = 200, 4, 2_000  # structures that are generated, and copies of each at least
MEASURES = ("mae", "accuracy", "loss")  # of what is forgotten, the first that a quantity has
RATTLE = (0.01, 0.1)  # Å, between which the standard deviation of displacements is drawn for each copy
STRAIN = 0.02  # standard deviation of each component


class Replay:
    """What keeps the base's task alive while another one is learned.

    Args:
        source: structures with the base's labels; or "generated": rattled and strained copies of the new ones.
        weight: of the base's loss beside the new one.
        pseudo: the base itself labels the structures, whatever labels they have; it always does what is generated.
    """

    def __init__(self, source: Source, weight: float = 1.0, pseudo: bool = False):
        if not 0 < weight < np.inf:
            raise InputError(f"replay_weight is {weight}, but must be above zero")
        self.generated = source in (GENERATED, [GENERATED])
        if self.generated and Path(GENERATED).exists():
            raise InputError(
                f"{GENERATED} is here, and stands for structures to be made: write ./{GENERATED}, or rename"
            )
        self.source = source
        self.weight = weight
        self.pseudo = pseudo or self.generated

    def asked(self) -> dict[str, Any]:
        """What tells one replay from another; pseudo-labels follow from the base."""
        given = GENERATED if self.generated else fingerprint(read(self.source))
        return {"source": given, "weight": self.weight, "pseudo": self.pseudo}


def chosen_replay(
    strategy: str, source: Source | None, weight: float | None, pseudo: bool, objective: Objective
) -> Replay | None:
    """What is to be replayed, for the strategy "replay" and no other."""
    if strategy != "replay":
        given = {"replay": source is not None, "replay_weight": weight is not None, "pseudo": pseudo}
        if any(given.values()):
            name = next(name for name, is_given in given.items() if is_given)
            raise InputError(f"{name} is for strategy 'replay', but the strategy is '{strategy}': choose one of them")
        return None
    if source is None:
        raise InputError("strategy 'replay' needs what to replay: replay=FILES of the base's data, or 'generated'")
    if isinstance(objective, Parts):
        raise InputError(
            f"strategy 'replay' learns one objective beside the base's, not {type(objective).__name__}: give one part"
        )
    return Replay(source, 1.0 if weight is None else weight, pseudo)


def check_ledger(base: Model, objective: Objective) -> None:
    """Refuse to ask what a base forgot of a model that is told more than structures."""
    if more := set(objective.scalar_inputs()) - set(getattr(base.backbone, "inputs", ())):
        raise InputError(f"a ledger judges models that are told structures alone, not {min(more)}: leave ledger out")


class Beside(NamedTuple):
    """Two tasks on one backbone: that of the model to be returned, and that of its base."""

    model: Model  # with the outputs of both
    base: Model  # with those of the base's task
    objective: Together
    train: Sequence[ase.Atoms]
    valid: Sequence[ase.Atoms]  # of the new task, which alone chooses the checkpoint
    said: dict[str, Any]  # of what is replayed


def beside(
    base: Model,
    model: Model,
    objective: Objective,
    data: TrainingData,
    replay: Replay,
    held_out: Source | None,
    ledger: Source | None,
    config: TrainConfig,
    verbose: bool,
    allow_mixed: bool = False,
) -> tuple[Beside, Ledger | None]:
    """Join the base's task to the new one, whose model shares its weights with the result.

    Heads of both start as they are: those of `model` aligned, those of the base as it has them. The smaller of the two
    sets is repeated, so that batches have about as many structures of each. Structures that match `held_out` or
    `ledger` are left out. Without `ledger` at least a tenth of the structures is set aside for one.

    Raises:
        InputError: for labels at a level of theory that the base did not learn, unless `allow_mixed`.
    """
    task = _task(base)
    base = copy.deepcopy(base).to(chosen_device(config.device))
    given, aside, said = _given(base, task, data, replay, ledger is None, config, verbose, allow_mixed)
    named = ({}, {}) if replay.pseudo else _as_in_training(base, given, {}, {}, verbose)
    task = _with_labels(task, given, *named)
    label, unit = ({k: v for k, v in pairs.items() if k in task.labels()} for pairs in named)
    away = Joined([read(source) for source in (held_out, ledger) if source is not None])
    if verbose:
        console.print(
            f"Replay of {len(given)} structures, labelled by {'the base' if replay.pseudo else 'their data'}:"
        )
    try:
        old = TrainingData(
            given, task, None, 0.0, "auto", None, label, unit, away if len(away) else None, config.seed, verbose,
            allow_mixed=allow_mixed or len(learned_levels(base.card)) > 1,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"replay: {error}") from None

    together = Together({NEW: objective, OLD: task}, {OLD: replay.weight})
    remembered = copy.deepcopy(base)
    remembered.backbone = model.backbone
    new, again = (Labelled(d.train, Labels(()), part) for d, part in ((data, NEW), (old, OLD)))
    found = Beside(
        model=_joint(together, model, remembered),
        base=remembered,
        objective=together,
        train=Joined([_repeated(new, len(again)), _repeated(again, len(new))], [NEW, OLD]),
        valid=Labelled(data.valid, Labels(()), NEW),
        said={
            "structures": len(again),
            "from": GENERATED if replay.generated else "given",
            "labels": "base" if replay.pseudo else "given",
            "weight": replay.weight,
        },
    )
    own = None if aside is None else Ledger(base, aside, config, said, replay.pseudo, allow_mixed)
    return found, own


class Ledger:
    """Errors on the task of a base, before and after it was trained on another.

    Args:
        structures: with labels of that task, found and converted as those it was trained on.
        said: where they are from.
        pseudo: the base made the labels, so that it has no error before.
        allow_mixed: labels may be at a level of theory that the base did not learn, which is refused otherwise.
    """

    def __init__(
        self,
        base: Model,
        structures: Source,
        config: TrainConfig,
        said: str = "given",
        pseudo: bool = False,
        allow_mixed: bool = False,
        verbose: bool = False,
    ):
        task = _task(base).comparable()
        self.base = copy.deepcopy(base).to(chosen_device(config.device))
        self.config = config
        self.said = {"from": said, "labels": "base" if pseudo else "given"}
        given = read(structures)
        wanted = list(task.labels())
        label, unit = ({}, {}) if pseudo else _as_in_training(base, given, {}, {}, False)
        labels = resolve(given, wanted, labels=label, units=unit, optional=wanted)
        if wanted and not labels.entries:
            raise InputError(
                f"ledger: no structure has {' or '.join(wanted)}, what the base learned: give structures labelled so"
            )
        if not pseudo:
            other = "or measure errors at another one knowingly with"
            _check_levels("ledger", base, task, given, labels, other, allow_mixed, verbose)
        members = np.setdiff1d(np.arange(len(given)), isolated_atoms(given))
        self.structures = Subset(Labelled(given, labels), members)
        self.task = task
        self.before = self._errors(self.base)

    def entry(self, trained: Model) -> dict[str, Any]:
        """What a card says: "structures", and of each quantity the "measure", "before", "after" and the "unit"."""
        after = self._errors(as_base(self.base, trained))
        errors = {}
        for name, found in self.before.items():
            measure = next(one for one in MEASURES if one in found)
            errors[name] = {"measure": measure, "before": found[measure], "after": after[name][measure]}
            errors[name]["unit"] = found["unit"]
        return {"structures": len(self.structures), **self.said, "errors": errors}

    def _errors(self, model: Model) -> dict[str, Any]:
        return validated(model, self.task, self.structures, self.config).errors


def as_base(base: Model, trained: Model) -> Model:
    """The base with what training made of its backbone and of the heads that were kept.

    References, shifts and scales stay those of the base, so that what `align` did is no error; a head that was not kept
    stays as it was.
    """
    first = next(trained.parameters())
    model = copy.deepcopy(base).to(first.device, first.dtype)
    model.backbone = trained.backbone
    if model.bond_vectors is not None and trained.bond_vectors is not None:
        model.bond_vectors = trained.bond_vectors
    for name, head in model.heads.items():
        if name in trained.heads and described(trained.heads[name]) == described(head):
            learned = dict(trained.heads[name].named_parameters())
            head.load_state_dict({**head.state_dict(), **learned})
    return model


def forgetting(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of a table of errors before and after."""
    rows = []
    for name, found in entry["errors"].items():
        unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0)) if found["measure"] == "mae" else ("", 1.0)
        numbers = {when: f"{found[when] * factor:.4g}" for when in ("before", "after")}
        quantity = name.replace("_", " ") + ("" if found["measure"] == "mae" else f" ({found['measure']})")
        rows.append({"quantity": quantity, **numbers, "unit": unit})
    return rows


def show_forgetting(entry: Mapping[str, Any]) -> None:
    console.print(table(told_of_ledger(entry), forgetting(entry)))


def told_of_ledger(entry: Mapping[str, Any]) -> str:
    """What the errors before and after are errors on."""
    labels = ", labelled by the base itself" if entry["labels"] == "base" else ""
    return f"Errors on the base's own task, on {entry['structures']} structures ({entry['from']}{labels})"


def generated(structures: Sequence[ase.Atoms], seed: int) -> list[ase.Atoms]:
    """Each structure as it is, and rattled and strained copies of it, without labels: some hundreds in all.

    A copy has displacements with a standard deviation between 0.01 and 0.1 Å and, where it is periodic in three
    directions, a strain of 2 % (standard deviation of each component). There are at least four of each structure, as it
    is included, and 200 in all; of more than 500 structures evenly spaced ones are taken.
    """
    some = np.unique(np.linspace(0, len(structures) - 1, min(len(structures), MOST // COPIES)).astype(int))
    copies = max(COPIES, -(-FEWEST // len(some)))
    moved = [
        _moved(structures[int(i)], np.random.default_rng((seed, int(i), k))) for i in some for k in range(1, copies)
    ]
    return [_bare(structures[int(i)]) for i in some] + moved


def _bare(atoms: ase.Atoms) -> ase.Atoms:
    """The structure with its ids, by which leaks are found, and nothing else."""
    bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info = {key: atoms.info[key] for key in IDS if key in atoms.info}
    return bare


def _moved(atoms: ase.Atoms, rng: np.random.Generator) -> ase.Atoms:
    moved = _bare(atoms)
    if atoms.pbc.all():
        strain = STRAIN * rng.normal(size=(3, 3))
        moved.set_cell(moved.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    moved.positions += rng.uniform(*RATTLE) * rng.normal(size=moved.positions.shape)
    return moved


def _task(base: Model) -> Objective:
    task = objective_of(base)
    if isinstance(task, Parts):
        raise InputError(
            f"the base learned several objectives: name the one to remember with part: {', '.join(task.parts)}"
        )
    return task


def _given(
    base: Model,
    task: Objective,
    data: TrainingData,
    replay: Replay,
    divide: bool,
    config: TrainConfig,
    verbose: bool,
    allow_mixed: bool,
) -> tuple[Sequence[ase.Atoms], Sequence[ase.Atoms] | None, str]:
    """Structures to replay, those set aside for a ledger, and where these are from; with the base's labels where they
    are asked for."""
    if replay.pseudo and not task.labels():
        raise InputError(f"the base learned {task!r}, which has no labels to predict: give structures to replay alone")
    given: Sequence[ase.Atoms] = data.train if replay.generated else read(replay.source)
    if replay.pseudo:
        lone = set(isolated_atoms(given))
        known = [i for i in range(len(given)) if i not in lone and not unseen_elements(base, given[i].numbers)]
        if not known:
            raise InputError("replay: the base has not seen all elements of any structure: give some of its own data")
        if verbose and (left := len(given) - len(lone) - len(known)):
            console.print(
                f"[yellow]Replay leaves out {left} structures with elements that are new to the base[/yellow]"
            )
        given = Subset(given, known)
    else:
        label, unit = _as_in_training(base, given, {}, {}, False)
        labels = resolve(given, list(task.labels()), labels=label, units=unit, optional=list(task.labels()))
        other = "or pseudo=True (--pseudo) for labels made by the base, or learn both with one head knowingly with"
        _check_levels("replay", base, task, given, labels, other, allow_mixed, verbose)

    sides: list[Sequence[ase.Atoms]] = [given]
    said = ""
    if divide and len(given) - len(isolated_atoms(given)) > 1:
        divided = split(given, ASIDE, seed=config.seed)
        sides = [Subset(given, divided.train), Subset(given, divided.valid)]
        said = f"{'copies of ' if replay.generated else ''}{len(divided.valid)} of {len(given)} structures, set aside"
        if verbose:
            console.print(f"Ledger: {divided.reason.replace('validate', 'are set aside')}")
    if replay.pseudo:
        sides = [generated(s, config.seed) if replay.generated else [_bare(atoms) for atoms in s] for s in sides]
        options: dict[str, Any] = {"edges": config.edges, "device": config.device, "verbose": verbose}
        sides = [predict(base, side, **options) for side in sides]
    return sides[0], sides[1] if len(sides) > 1 else None, said


def _check_levels(
    what: str,
    base: Model,
    task: Objective,
    structures: Sequence[ase.Atoms],
    labels: Labels,
    other: str,
    allow_mixed: bool,
    verbose: bool,
) -> None:
    """Refuse labels at a level of theory that the base did not learn, unless that is wanted."""
    found = apart(base.card, task, structures, labels)
    if found is None:
        return
    if not allow_mixed:
        raise InputError(
            f"{what}: {found.told('base')}: give structures at that level, {other} allow_mixed=True (--allow-mixed)"
        )
    if verbose:
        console.print(f"{what}: {found.told('base')}, as was allowed", style="yellow", markup=False)


def _with_labels(
    task: Objective, structures: Sequence[ase.Atoms], label: Mapping[str, str], unit: Mapping[str, str]
) -> Objective:
    """The task without those labels of a potential that no structure has."""
    wanted = list(task.labels())
    found = resolve(structures, wanted, labels=label, units=unit, optional=wanted)
    if wanted and not found.entries:
        raise InputError(
            f"replay: no structure has {' or '.join(wanted)}, what the base learned: give structures labelled so, or "
            "pseudo=True (--pseudo) for labels made by the base"
        )
    missing = [name for name in wanted if name not in found]
    if not missing or not isinstance(task, Potential):
        return task
    left: Objective = copied(task, **dict.fromkeys(missing, 0.0))
    return left


def _joint(together: Together, model: Model, base: Model) -> Model:
    """A model with the outputs of both, whose modules are theirs."""
    with torch.random.fork_rng(devices=[]):
        joint = Model(model.backbone, together.outputs(model.backbone.width))
    for part, own in ((NEW, model), (OLD, base)):
        for name, full in together.names[part].items():
            if name in own.heads:
                joint.heads[full] = own.heads[name]
    vectors = base.bond_vectors if model.bond_vectors is None else model.bond_vectors
    joint.bond_vectors = vectors
    if base.bond_vectors is not None:
        base.bond_vectors = vectors
    return joint


def _repeated(structures: Sequence[ase.Atoms], others: int) -> Sequence[ase.Atoms]:
    """The same structures so often that there are about as many as of others, and once at least."""
    times = max(1, round(others / len(structures)))
    return structures if times == 1 else Subset(structures, np.tile(np.arange(len(structures)), times))
