"""Pre-train and fine-tune: from structures, and perhaps a base, to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..align import align_references, show_alignment
from ..backbones import Backbone, TensorNet
from ..card import quantities_of, theory, theory_of
from ..console import console
from ..data.labels import Labels, ratio_of_units
from ..data.read import Source, read
from ..dataset import TrainingData
from ..errors import InputError
from ..graph import Sample
from ..heads import EnergyHead, Head, LevelHead, is_extensive
from ..lora import RANK, adapt
from ..model import Model, Output, described, load
from ..objectives import Objective, Potential, Property
from ..objectives.base import told
from ..run import fingerprint, leaving_nothing
from ..teacher import taught
from ..train import TrainConfig, chosen_device
from ..unseen import check_policy, settle_unseen, unseen_in_words
from .energy_probe import EnergyProbeHead, probed_energy
from .ladder import climbed, rungs
from .probe import ProbeHead, probed, probes, told_of_probe
from .replay import Ledger, beside, check_ledger, chosen_replay
from .stage import claimed, configured, lasting, rehearsed, trained


@leaving_nothing
def pretrain(
    structures: Source | Mapping[str, Source],
    objective: Objective,
    backbone: Backbone | None = None,
    *,
    out: str | Path | None = None,
    valid: Source | Mapping[str, Source] | None = None,
    valid_fraction: float = 0.1,
    split_by: str = "auto",
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    held_out: Source | None = None,
    teacher: Any = None,
    teacher_skip: bool = False,
    teacher_overwrite: bool = False,
    provenance: Mapping[str, str] | None = None,
    level: str | None = None,
    allow_mixed: bool = False,
    calibrate: bool = True,
    dry_run: bool = False,
    verbose: bool = True,
    **config: Any,
) -> Model:
    """Train a new model on any objective.

    Args:
        structures: files, folders or `ase.Atoms`; for `Together` and `Fidelities`, also names of parts to such.
        objective: what to learn.
        backbone: the architecture, TensorNet(64, 2) by default; its weights are drawn anew from `seed`.
        out: run folder; the same call goes on where a killed one stopped, and returns at once when it had finished.
        valid: structures that choose the checkpoint; by default a fraction of `structures`.
        valid_fraction: that fraction; zero validates nothing and returns the last weights.
        split_by: "auto", "random", "composition", "prototype", an info key whose groups stay together, or the
            split.json of an earlier run on the same structures.
        split_key: info key that says where each structure belongs ("train", "val", "test"), or KEY=VALUE for the value
            that is the test set, such as "test_fold=0"; test structures are left out.
        label: quantity to the key that holds it, such as {"band_gap": "gap_pbe"}; of one part of several, as
            {"pbesol.energy": "E_pbesol"}.
        unit: quantity to the unit it is given in, such as {"energy": "hartree"}.
        held_out: structures on which the model will be judged: what matches one of them (see `leaks`) is left out.
        teacher: labels `structures` and `valid` before training: an ASE calculator, a function that makes one,
            "module:function", or a model or its file (`transfermium.teacher`).
        teacher_skip: leave out the structures on which the teacher fails, rather than stop.
        teacher_overwrite: let the teacher replace labels that the structures have.
        provenance: what else is known of the labels, for the card: "functional", "u", "pseudopotentials", "code" and
            "corrections" to any text; of one part of several, as {"pbe.code": "VASP"}.
        level: use the structures at this level of theory only, as `info["level"]` (or "functional", "xc") names it.
        allow_mixed: labels of several levels of theory may share a head, which is refused otherwise.
        calibrate: take from the validation structures how large errors are, and keep it with the model, for intervals
            and for telling what lies far from the training data (`transfermium.uncertainty`); the training stays as it
            is.
        dry_run: only say what the run would take, or what is left of it where `out` holds a part of it, measured on a
            few steps; nothing is written. The model that is returned was not trained; its card has the numbers under
            "dry run".
        config: fields of `TrainConfig`.

    Raises:
        InputError: for data, labels or options that cannot be used.
    """
    distributed.join()
    settings = configured(config)
    _check_objective(objective)
    backbone = TensorNet() if backbone is None else backbone
    check_together(backbone, objective)
    lesson = taught(
        teacher, structures, valid, objective, out=out, named=[*(label or {}), *(unit or {})], skip=teacher_skip,
        overwrite=teacher_overwrite, dry_run=dry_run, verbose=verbose,
    )  # fmt: skip
    data = TrainingData(
        lesson.structures, objective, lesson.valid, valid_fraction, split_by, split_key, label, unit, held_out,
        settings.seed, verbose, provenance, level, allow_mixed,
    )  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        architecture = described(told(backbone, objective))
    asked = {
        "verb": "pretrain",
        "backbone": architecture,
        **data.asked,
        **lesson.asked,
        "train": lasting(settings),
    }
    folder, finished = distributed.from_first(lambda: claimed(out, asked, dry_run, verbose))
    if finished is not None:
        return finished

    samples = data.samples(objective)
    settled = distributed.from_first(lambda: objective.settled(samples))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Model(told(backbone, objective), settled.outputs(backbone.width))
    for name, head in model.heads.items():
        head.calibrate(*settled.calibration(name, samples))  # type: ignore[operator]
    report = settle_unseen(model, settled, samples, {}, validated=data.validated)
    if dry_run:
        return rehearsed(model, settled, data, settings, folder, verbose)
    return trained(
        model, settled, data, settings, folder, asked, history=[], report=report, verbose=verbose, calibrate=calibrate
    )


@leaving_nothing
@console.once()  # rungs of a ladder would repeat what is said of the data
def finetune(
    base: str | Path | Model,
    structures: Source | Mapping[str, Source],
    objective: Objective,
    *,
    out: str | Path | None = None,
    part: str | None = None,
    strategy: str = "full",
    rank: int | None = None,
    replay: Source | None = None,
    replay_weight: float | None = None,
    pseudo: bool = False,
    ledger: Source | None = None,
    align: bool = True,
    unseen: str = "refuse",
    valid: Source | Mapping[str, Source] | None = None,
    valid_fraction: float = 0.1,
    split_by: str = "auto",
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    held_out: Source | None = None,
    teacher: Any = None,
    teacher_skip: bool = False,
    teacher_overwrite: bool = False,
    provenance: Mapping[str, str] | None = None,
    level: str | None = None,
    allow_mixed: bool = False,
    calibrate: bool = True,
    dry_run: bool = False,
    verbose: bool = True,
    **config: Any,
) -> Model:
    """Train a copy of `base` on new labels.

    Heads that both objectives have are kept, others are new. Before the first step, the references of kept heads are
    fitted again to the residuals (`align`), which is reported; apart from that, zero steps leave the base as it is.

    Args:
        base: a model or its file.
        part: which part of a base that learned several objectives, each with its own energy.
        strategy: "full" trains everything; "head" the heads alone (`backbone_lr=0`); "probe" fits a ridge regression or
            a Gaussian process to what the frozen backbone sees (`transfer/probe.py`), or a linear correction of an
            energy (`transfer/energy_probe.py`), in seconds; "aligned" only fits references, and "zero-shot" does
            nothing but report errors. "lora" trains heads, and low-rank updates of the matrices of the backbone that
            are merged in the end (`lora.py`); "replay" goes on learning the base's task beside the new one
            (`transfer/replay.py`). "auto" tries zero-shot, aligned, probe, head, lora and full, each with the same
            options and as long as they say, and takes what is best on the validation structures
            (`transfer/ladder.py`).
        rank: of the updates of "lora"; 8 by default.
        replay: structures with labels of the base's task, at its level of theory (unless `allow_mixed`); or "generated"
            for rattled and strained copies of `structures`, which the base labels before training.
        replay_weight: of the base's loss where that of the new one has weight one; 1 by default.
        pseudo: the base labels the structures of `replay`, whatever labels they have.
        ledger: structures with labels of the base's task, at its level of theory too, on which errors before and after
            are reported; of what is replayed at least a tenth by default, with no material on both sides.
        align: fit references (and the scale of a head that was trained on another quantity) to the new labels.
        unseen: what of the references of elements that no new label has, where `align` moves the others: "refuse"
            energies with them later on; take those of isolated atoms in the data ("isolated"); move them by the mean
            shift of the others ("group"); or "keep" them (see `transfermium.unseen`).
        config: fields of `TrainConfig`; `backbone_lr` is the learning rate of the backbone: zero freezes it.

    The other arguments, and what is raised, are those of `pretrain`.
    """
    _check_idle(strategy, config)
    given = dict(locals())  # all arguments, so that every rung of a ladder is asked the same
    distributed.join()
    _check_objective(objective)
    base = (base if isinstance(base, Model) else load(base)).whole(part, _names(objective), objective.scalar_inputs())
    again = chosen_replay(strategy, replay, replay_weight, pseudo, objective)
    rank = _chosen_rank(strategy, rank)
    if ledger is not None:
        check_ledger(base, objective)
    check_policy(unseen, align)
    settings = configured(_with_strategy(strategy, objective, config), base.architecture()["dtype"])
    align = align and strategy != "zero-shot"
    check_together(base.backbone, objective)
    check_known(strategy, objective, base.outputs, base.backbone.width)
    lesson = taught(
        teacher, structures, valid, objective, out=out, named=[*(label or {}), *(unit or {})], skip=teacher_skip,
        overwrite=teacher_overwrite, dry_run=dry_run, verbose=verbose,
    )  # fmt: skip
    data = TrainingData(
        lesson.structures, objective, lesson.valid, valid_fraction, split_by, split_key, label, unit, held_out,
        settings.seed, verbose, provenance, level, allow_mixed,
    )  # fmt: skip

    identity = {"card": base.card.get("history", []), "weights": weights_fingerprint(base)}
    asked: dict[str, Any] = {"verb": "finetune", "base": identity, "align": align}
    asked |= {**data.asked, **lesson.asked, "train": lasting(settings)}
    if strategy != "full":
        asked["strategy"] = strategy
    if rank is not None:
        asked["rank"] = rank
    if unseen != "refuse":
        asked["unseen"] = unseen
    if again is not None:
        others = {} if held_out is None else {"held out": distributed.from_first(lambda: fingerprint(read(held_out)))}
        asked["replay"] = {**distributed.from_first(again.asked), **others}
    if ledger is not None:
        asked["ledger"] = distributed.from_first(lambda: fingerprint(read(ledger)))
    if verbose and (before := theory(base.card)) and (now := theory_of(data)):
        console.print(f"Labels: the base learned {before}; these are {now}", markup=False)
    folder, finished = distributed.from_first(lambda: claimed(out, asked, dry_run, verbose))
    if finished is not None:
        return finished
    if strategy == "auto":
        possible = rungs(objective, align, settings.backbone_lr == 0)
        names = [name for name in possible if not _unknown(name, objective, base.outputs, base.backbone.width)]
        n = len(data.train) + len(data.valid)
        return climbed(partial(_rung, given | lesson.given), names, n, len(data.valid), folder, dry_run, verbose)

    samples = data.samples(objective)
    settled = distributed.from_first(lambda: objective.settled(samples))
    model, kept = _transferred(base, settled, samples, settings.seed, settings.steps == 0)
    anew = strategy == "probe" and isinstance(settled, Property)
    converted = {} if anew else _converted(model, base, settled, data.labels, kept)
    if verbose:
        for name, (old, new) in converted.items():
            console.print(f"The base gives '{name}' in {old}, these labels are in {new}: it is converted")
    for name in _left_behind(base, model, kept) if verbose and strategy != "probe" else ():
        console.print(f"[yellow]The base has a probe for '{name}', which cannot be trained: it begins anew[/yellow]")
    model.to(chosen_device(settings.device))
    report: dict[str, Any] = {"kept heads": kept}
    was = base.card.get("quantities", {})
    if strategy == "probe" and isinstance(settled, Property):
        model, found = probed(model, settled, data.train, settings.edges)
        report |= found
    elif strategy == "probe" and isinstance(settled, Potential):
        model, found = probed_energy(model, settled, samples, was, kept, align, settings.edges, not verbose)
        report |= found
    elif align and kept:
        report |= align_references(model, settled, samples, was, kept)
    if verbose:
        show_alignment(report)
        if "probe" in report:
            console.print(f"Probe: {told_of_probe(report)}")
    report |= settle_unseen(model, settled, samples, report, unseen, base, align, data.validated)
    for words in unseen_in_words(report) if verbose else ():
        console.print(f"Alignment: {words}", markup=False)
    book = None
    if ledger is not None:
        book = Ledger(base, ledger, settings, allow_mixed=allow_mixed, verbose=verbose)
    two = None
    if again is not None:
        two, own = beside(base, model, settled, data, again, held_out, ledger, settings, verbose, allow_mixed)
        book = book or own
    updates = None if rank is None else _adapted(model, base, rank, settings.seed, verbose)
    if dry_run:
        return rehearsed(model, settled, data, settings, folder, verbose, two)
    return trained(
        model, settled, data, settings, folder, asked, base.card.get("history", []), report, verbose, base,
        two=two, ledger=book, updates=updates, calibrate=calibrate,
    )  # fmt: skip


STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "replay": {},
    "head": {"backbone_lr": 0.0},
    "probe": {"steps": 0},
    "aligned": {"steps": 0},
    "zero-shot": {"steps": 0},
    "auto": {},
}


OF_STEPS = ("lr", "layer_decay", "l2_to_base")  # options of training that change nothing without a step


def _check_idle(strategy: str, config: Mapping[str, Any]) -> None:
    """Refuse options of training where nothing is trained."""
    for name in _idle(strategy):
        if config.get(name) not in (None, getattr(TrainConfig, name)):
            raise InputError(
                f"strategy '{strategy}' does no step of training, so {name}={config[name]} would change nothing: leave "
                "one out"
            )


def _idle(strategy: str) -> tuple[str, ...]:
    """Options that change nothing."""
    return OF_STEPS if STRATEGIES.get(strategy, {}).get("steps") == 0 else ()


def _with_strategy(strategy: str, objective: Objective, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of training with those that the strategy stands for."""
    if strategy not in STRATEGIES:
        raise InputError(f"there is no strategy '{strategy}': choose among {', '.join(STRATEGIES)}")
    for name, value in STRATEGIES[strategy].items():
        if config.get(name) not in (None, value):
            raise InputError(f"strategy '{strategy}' means {name}={value}, but {name} is {config[name]}: leave one out")
    if strategy in ("lora", "replay") and config.get("backbone_lr") == 0:
        raise InputError(f"strategy '{strategy}' trains the backbone, but backbone_lr=0 freezes it: leave one out")
    if strategy == "probe" and not probes(objective):
        raise InputError(
            f"a probe learns one number per structure, or an energy whose derivatives are forces and stress, not "
            f"{objective!r}: give another objective, or another strategy"
        )
    return {**config, **STRATEGIES[strategy]}


def _chosen_rank(strategy: str, rank: int | None) -> int | None:
    """Of the updates of LoRA, and of no other strategy."""
    if rank is not None and strategy not in ("lora", "auto"):
        raise InputError(f"rank is for strategy 'lora', but the strategy is '{strategy}': choose one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, but must be at least one")
    return RANK if rank is None and strategy == "lora" else rank


def _rung(given: Mapping[str, Any], strategy: str, out: Path | None) -> Model:
    """The same call of `finetune` with one strategy of the ladder, and the options that it leaves open."""
    fixed = {*STRATEGIES[strategy], *_idle(strategy)}
    config = {name: value for name, value in given["config"].items() if name not in fixed}
    own = {"strategy": strategy, "out": out, "rank": given["rank"] if strategy == "lora" else None}
    return finetune(**{**{name: value for name, value in given.items() if name != "config"}, **own, **config})


def _adapted(model: Model, base: Model, rank: int, seed: int, verbose: bool) -> dict[str, int]:
    """Freeze the backbone but for updates of this rank, and for what the base does not have; says what is trained."""
    own = model.backbone.state_dict().keys() - base.backbone.state_dict().keys()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = adapt(model.backbone, rank, own)
    if verbose:
        trained, numbers = found["trained numbers"], found["numbers"]
        console.print(f"LoRA: updates of rank {rank}, {trained:,} numbers in place of {numbers:,}, train the backbone")
    return found


def _transferred(
    base: Model, objective: Objective, samples: Sequence[Sample], seed: int, idle: bool
) -> tuple[Model, list[str]]:
    """A copy of the base with the objective's outputs, and the names of the heads that both have.

    Probes go on as heads: those of energies, as what is trained beside them can be; others where the model is `idle`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = told(base.backbone, objective)
        outputs = objective.outputs(backbone.width)
        outputs |= _probes_of(base.outputs, outputs, idle)
        model = Model(backbone, outputs)
    model.to(dtype=next(base.parameters()).dtype)

    kept = [name for name, head in model.heads.items() if name in base.heads and _goes_on(head, base.heads[name])]
    weights = base.state_dict()
    same = [name for name in kept if not isinstance(model.heads[name], LevelHead)]
    shared = ("backbone.", "bond_vectors.", *(f"heads.{name}." for name in same))
    own = model.state_dict()
    model.load_state_dict({**own, **{k: v for k, v in weights.items() if k.startswith(shared) and k in own}})
    for name, head in model.heads.items():
        if name not in kept:
            head.calibrate(*objective.calibration(name, samples))  # type: ignore[operator]
        elif isinstance(head, LevelHead):
            head.start_from(base.heads[name])  # type: ignore[arg-type]
    return model, kept


def _converted(
    model: Model, base: Model, objective: Objective, labels: Labels, kept: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Kept heads in the units of the labels, in place, where these differ: name to the unit before and after.

    Raises:
        InputError: for units that cannot be converted.
    """
    before, now = base.card.get("quantities", {}), quantities_of(kept, objective, labels)
    found: dict[str, tuple[str, str]] = {}
    for name in kept:
        (old, given), (quantity, wanted) = before.get(name, ("", "")), now.get(name, ("", ""))
        if name.endswith("_std"):  # earlier cards had no unit there
            given = given or before.get(name.removesuffix("_std"), ("", ""))[1]
        if old != quantity or not given or not wanted or given == wanted:
            continue
        factor = ratio_of_units(given, wanted)
        if factor is None:
            raise InputError(
                f"the base gives '{quantity}' in {given}, and these labels are in {wanted}, which cannot be converted: "
                f"give them in {given}, or, if both are one, declare it so (--unit {quantity}='{given}')"
            )
        for buffer in ("scale", "shift"):
            if buffer in dict(model.heads[name].named_buffers(recurse=False)):
                getattr(model.heads[name], buffer).mul_(factor)
        found |= {name: (given, wanted)} if factor != 1 else {}
    return found


def _probes_of(base: Mapping[str, Output], outputs: Mapping[str, Output], idle: bool) -> dict[str, Head]:
    """New heads like the probes among the outputs of a base, in place of these outputs."""
    found: dict[str, Head] = {}
    for name, old in base.items():
        new = outputs.get(name)
        if isinstance(old, EnergyProbeHead) and type(new) is EnergyHead:
            found[name] = EnergyProbeHead(old.width, old.features)
        elif isinstance(old, ProbeHead) and isinstance(new, Head) and idle and is_extensive(new) == is_extensive(old):
            found[name] = ProbeHead(old.features, old.support, old.kind)
    return found


def _left_behind(base: Model, model: Model, kept: Sequence[str]) -> list[str]:
    """Outputs for which the base has a probe, but the model has not."""
    probes = [name for name, head in base.heads.items() if isinstance(head, ProbeHead | EnergyProbeHead)]
    return [name for name in probes if name in model.heads and name not in kept]


def _goes_on(head: nn.Module, base: nn.Module) -> bool:
    """Whether a head can go on from one of the base: of the same arguments, or several levels from what they share."""
    if isinstance(head, LevelHead):
        head, base = head.head, base.head if isinstance(base, LevelHead) else base
    return described(head) == described(base)


def _names(objective: Objective) -> list[str]:
    """Of its outputs."""
    with torch.random.fork_rng(devices=[]):
        return list(objective.outputs(2))


def _check_objective(objective: Any) -> None:
    if not isinstance(objective, Objective):
        raise InputError(f"the objective is {objective!r}, but must be one such as Potential() or Property('band_gap')")


def check_together(backbone: Backbone, objective: Objective) -> None:
    """Refuse, before anything is read, an objective that wants what the backbone cannot give."""
    with torch.random.fork_rng(devices=[]):
        Model(told(backbone, objective), objective.outputs(backbone.width))


def check_known(strategy: str, objective: Objective, base: Mapping[str, Output], width: int) -> None:
    """Refuse, before anything is read, to call a head that would be drawn at random what the base knows.

    Args:
        base: its outputs.
        width: of its backbone.
    """
    if missing := _unknown(strategy, objective, base, width):
        raise InputError(
            f"the base has no output {' or '.join(map(repr, missing))} of this kind, which {strategy} would have to "
            "draw at random: choose probe, head or full"
        )


def _unknown(strategy: str, objective: Objective, base: Mapping[str, Output], width: int) -> list[str]:
    """Heads of an objective of which the base has none, where the strategy only uses what it has."""
    if strategy not in ("zero-shot", "aligned"):
        return []
    with torch.random.fork_rng(devices=[]):
        outputs = objective.outputs(width)
    outputs |= _probes_of(base, outputs, idle=True)
    heads = {name: head for name, head in outputs.items() if isinstance(head, Head)}
    kept = (isinstance(old := base.get(name), Head) and _goes_on(head, old) for name, head in heads.items())
    return [] if any(kept) else list(heads)


def weights_fingerprint(model: Model) -> str:
    """A short hash of all numbers of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
