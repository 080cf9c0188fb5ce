"""The study behind a learning curve: its data, its cells, what it costs, and what there is without a network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ..backbones import Backbone, TensorNet
from ..card import theory
from ..console import console
from ..data import Labels, read, resolve
from ..data.columns import isolated_atoms
from ..data.labels import UNITS, ratio_of_units
from ..data.leakage import summary as leaked
from ..data.leakage import without
from ..data.provenance import checked
from ..data.read import Source
from ..data.sequences import Subset
from ..data.split import by_key, independent, nested, split
from ..errors import InputError
from ..model import Model, Output, copied, load
from ..objectives import Fidelities, Objective, Property
from ..objectives.together import Parts
from ..run import fingerprint
from ..seen import copies_of_seen
from ..transfer.learn import check_known, weights_fingerprint
from ..transfer.probe import probes
from .baselines import AS_IT_IS, baselines, compositions_of, unlabelled
from .bounds import both, in_words, seconds_of
from .cells import Cell, run
from .curve_laws import Arm, in_order, name_of
from .curve_page import Example
from .judged import labelled_for, tested
from .levels import at, only_level
from .manifest import WHAT_FOR, Manifest, manifest
from .plan import Packs, Target, divided
from .points import (
    CHEAP,
    DEAR,
    DELTA,
    FEW,
    LONG,
    REPLAY,
    SCRATCH,
    TOGETHER,
    UNTRAINED,
    based,
    point,
    scalar_of,
    scalars,
    untouched,
    validating,
    validating_in_words,
)

ARMS = (SCRATCH, LONG, "zero-shot", "aligned", "probe", "head", "lora", "full", REPLAY, TOGETHER, DELTA)
USUAL = (SCRATCH, "aligned", "full")
BASELESS = (SCRATCH, LONG, TOGETHER, DELTA)
ASIDE = 0.1  # of what bases are pre-trained on, for a ledger, where something is replayed
FEWEST = 5  # labels of the smallest size
SIZES = 4  # of a curve, below which nothing describes it but straight lines
MATERIALS = 5  # of test structures, below which intervals are wide whatever the seeds say
SHARE = 0.7  # of a budget that is trained: the rest is reading, testing and starting
LEAST = 2.0  # seconds of a fine-tuning below which a budget is refused
TINY = 1e-12  # an error of nothing, whose logarithm is taken


class Study:
    """The data of a curve, divided and to be packed, and its cells."""

    def __init__(
        self,
        structures: Source,
        objective: Objective,
        out: Path,
        base: str | Path | Model | None,
        part: str | None,
        base_data: Source | None,
        base_objective: Objective | None,
        base_sizes: Sequence[int] | None,
        backbone: Backbone | None,
        arms: Sequence[str] | None,
        cheap: str | None,
        sizes: Sequence[int] | None,
        seeds: int,
        test: Source | None,
        split_key: str | None,
        rates: Sequence[float],
        edges: int,
        named: tuple[Mapping[str, str], Mapping[str, str]],
        base_named: tuple[Mapping[str, str], Mapping[str, str]],
        levels: tuple[str | None, str | None],
        provenance: tuple[Mapping[str, str], Mapping[str, str]],
        quiet: bool,
    ):
        self.out, self.objective, self.part, self.seeds = out, objective, part, seeds
        own, of_base = (checked(said).get("", {}) for said in provenance)
        self.rates, self.edges, self.base_named, self.cheap = rates, edges, base_named, cheap
        label, unit = ({k: v for k, v in pairs.items() if k != cheap} for pairs in named)
        self.named, self.both_named = (label, unit), named  # the second with what is said of the cheap label
        self.bounds: dict[str, Any] = {}
        self.dropped: list[str] = []
        self.usual = arms is None
        usual = USUAL if cheap is None else (*USUAL, DELTA)
        self.arms = list(dict.fromkeys([SCRATCH, *(usual if arms is None else arms)]))
        if (base is None) == (base_data is None):
            asked = "one of the two" if base is None else "one of them, not both"
            raise InputError(
                f"a curve needs a base model, or else data to pre-train one on: give {asked} (--base, --base-data)"
            )
        for arm in self.arms:
            if arm not in ARMS:
                raise InputError(f"there is no arm '{arm}': choose among {', '.join(ARMS)}")
        if isinstance(objective, Parts):
            raise InputError(f"a curve is of one objective, not of {type(objective).__name__}")
        if not objective.labels():
            raise InputError(
                f"{type(objective).__name__} learns no labels that a curve could count: give another objective"
            )
        if "probe" in self.arms and not probes(objective):
            raise InputError(
                "the arm 'probe' learns one number per structure, or an energy with its derivatives, not "
                f"{type(objective).__name__} as it is given here: leave the arm out"
            )
        if TOGETHER in self.arms and base_objective is not None:
            Fidelities({CHEAP: base_objective, DEAR: objective})  # or says why they are not learned together
        self.wanted = [name for name in objective.labels() if name != getattr(objective, "minus", None)]
        self.judged = self.wanted  # what arms are chosen by, the most important first

        if base_data is None and TOGETHER in self.arms:
            raise InputError(f"the arm '{TOGETHER}' learns the base's structures too: give them as base_data")
        if base_data is None and LONG in self.arms:
            raise InputError(
                f"the arm '{LONG}' trains as long as both stages took, but what a finished base took was not measured "
                "here: leave it out, or give base_data"
            )

        if (cheap is not None or DELTA in self.arms) and not isinstance(objective, Property):
            raise InputError(
                f"a difference from a cheap label is learned of a property, not of {type(objective).__name__}"
            )
        if DELTA in self.arms and cheap is None:
            raise InputError("the arm 'delta' learns the difference from a cheap label: name it as cheap (--cheap)")
        if split_key is not None and test is not None:
            raise InputError("test structures are given, and named by a key too: leave one out")
        sources = structures, structures if test is None else test
        structures = at(levels[0], read(structures), "structures")
        if split_key is not None:
            structures, test = _by(split_key, structures)
        elif test is not None:
            test = at(levels[0], read(test), "test structures")
        structures, test = _bonded(structures), None if test is None else _bonded(test)
        pool, tests, self.left_out, self.tolerance = divided("target", Target(structures, objective, test, *self.named))
        self.n_pool, self.n_test = len(pool), len(tests)
        self.data: dict[str, Manifest] = {}
        for side, some, source in (("labels", pool, sources[0]), ("test", tests, sources[1])):
            theory = only_level({WHAT_FOR[side]: some}, objective, label, unit, own)
            self.data[side] = manifest(some, source, labelled_for(objective, some, label, unit).labels, theory)
        if self.n_test < 2:
            raise InputError("one test structure gives no interval: give several (--test)")
        self.groups = independent(tests).tolist()
        self.n_materials = len(set(self.groups))
        if self.n_materials == 1:  # its frames are what other tests would draw from
            self.groups = list(range(self.n_test))
        self.ids = fingerprint(tests)
        self.sizes = chosen_sizes(sizes, len(pool))
        self.pool_atoms, self.test_atoms = pool, tests
        self.known = {} if cheap is None else self._cheap_labels()
        in_tests = compositions_of(tests).any(axis=0)
        summed = scalar_of(objective)[1] == "extensive"  # over atoms, with a reference for each element
        self.new_elements = unlabelled(compositions_of(pool), compositions_of(tests)) if summed else []
        self.varied = not compositions_of(pool)[:, in_tests].all()  # a few labels may lack an element of the tests
        self.packs = Packs(out)
        self.pool, self.test = self.packs.add("pool", pool), self.packs.add("test", tests)

        self.base: Model | None = None
        self.copies: int | None = None  # of test structures that a finished base has seen; None where it is not known
        self.model: str | None = None
        self.base_sizes: list[int] = []
        self.leaks = self.theory_of_base = ""
        self.base_objective: Objective | None = None
        if base is not None:
            self._take(base)
        else:
            assert base_data is not None
            self.backbone = TensorNet(32, 2) if backbone is None else backbone
            self._prepare(base_data, levels[1], base_objective or objective, base_sizes, of_base, tests, quiet)

    def _take(self, base: str | Path | Model) -> None:
        """A model as the base of all seeds, saved beside the study under a name that changes with it."""
        found = base if isinstance(base, Model) else load(base)
        own = found.whole(self.part, list(self.objective.labels()))
        self._check_known(own.outputs, own.backbone.width)
        self._check_units({name: unit for name, (_, unit) in own.card.get("quantities", {}).items()})
        self.backbone, self.theory_of_base = copied(own.backbone), theory(own.card)
        self.base, self.model = found, f"base-{weights_fingerprint(found)}.safetensors"
        name, copies = base if not isinstance(base, Model) else "a model", copies_of_seen(own, self.test_atoms)
        if copies and copies.found:
            raise InputError(
                f"{name}: the base learned from {copies.found} of {copies.of} test structures, so that errors on them "
                "say nothing of others: give test structures that it has not seen (--test), or let bases be "
                "pre-trained without them (--base-data)"
            )
        self.copies = None if copies is None else copies.found
        self.said_of_base = (
            f"{name}: what it was trained on is not compared with the test structures; if it has seen them, its arms "
            "look better than they are"
            if copies is None
            else f"{name}: no test structure is a copy of one that it learned from; whether other structures of the "
            "test materials were among these is not known"
        )

    def _check_known(self, outputs: Mapping[str, Output], width: int) -> None:
        """Refuse arms that would use what the base does not have, or leave them out where none were asked for."""
        for arm in tuple(self.arms):
            try:
                check_known(arm, self.objective, outputs, width)
            except InputError:
                if not self.usual:
                    raise
                self.arms.remove(arm)

    def _check_units(self, given: Mapping[str, str]) -> None:
        """Refuse units of what bases learn that cannot be brought to those of the labels."""
        for name in self.wanted:
            old, new = given.get(name), self.named[1].get(name)
            if name not in UNITS and old and new and ratio_of_units(old, new) is None:
                raise InputError(
                    f"bases give '{name}' in {old}, and these labels are in {new}, which cannot be converted: declare "
                    "one unit for both (--unit, --base-unit)"
                )

    def write(self) -> None:
        """Put data and base into the folder, once nothing is left to be refused."""
        self.packs.write()
        if self.base is not None and self.model is not None and not (self.packs.folder / self.model).exists():
            self.base.save(self.packs.folder / self.model)

    def _prepare(
        self,
        source: Source,
        level: str | None,
        objective: Objective,
        sizes: Sequence[int] | None,
        provenance: Mapping[str, str],
        tests: Sequence[Atoms],
        quiet: bool,
    ) -> None:
        data = at(level, read(source), "structures to pre-train on")
        parts = objective.parts if isinstance(objective, Parts) else {}
        if self.part is not None and self.part not in parts:
            choose = f"choose among {', '.join(parts)}" if parts else "leave it out"
            raise InputError(f"what bases learn here has no part '{self.part}': {choose}")
        width = self.backbone.width
        self._check_units(self.base_named[1])
        learned = [parts[self.part]] if self.part else list(parts.values()) or [objective]
        self._check_known({name: output for one in learned for name, output in one.outputs(width).items()}, width)
        if wanted := {} if isinstance(objective, Parts) else objective.labels():
            label, unit = self.base_named
            optional = [name for name, needed in wanted.items() if not needed]
            try:
                labels = resolve(data, list(wanted), labels=label, units=unit, optional=optional)
            except InputError as error:
                raise InputError(f"structures to pre-train on: {error}") from None
            if not labels.entries:
                raise InputError(f"no structure to pre-train on has any of {', '.join(wanted)}: name their keys")
        kept, found = without(data, tests, tolerance=self.tolerance, quiet=quiet)
        self.leaks = leaked(found, len(data))
        if not len(kept):
            raise InputError("every structure to pre-train on is also in the test set: there is nothing to learn from")
        if wanted:  # parts may be of several levels; pre-training compares the labels of each
            self.theory_of_base = only_level({WHAT_FOR["base"]: kept}, objective, *self.base_named, provenance)
        self.ledger: str | None = None
        aside = ""
        if REPLAY in self.arms:
            sides = split(kept, ASIDE, seed=0)
            aside = f"{len(sides.valid)} of {len(kept)} are set aside to measure what the arm '{REPLAY}' forgets"
            self.ledger = self.packs.add("ledger", Subset(kept, sides.valid))
            kept = Subset(kept, sides.train)
        self.base_sizes = sorted(set(sizes or [len(kept)]))
        if not 0 < self.base_sizes[0] <= self.base_sizes[-1] <= len(kept):
            raise InputError(
                f"base sizes {self.base_sizes} cannot be taken from {len(kept)} structures"
                f"{aside and f' ({aside})'}: ask for fewer"
            )
        self.base_objective, self.base_pack, self.n_base = objective, self.packs.add("base", kept), len(kept)
        own = labelled_for(objective, kept, *self.base_named).labels if wanted else Labels(())
        self.data["base"] = manifest(kept, source, own, self.theory_of_base)
        many = " or ".join(f"{n:,}" for n in self.base_sizes)
        self.said_of_base = f"pre-trained on {many} structures, anew for each seed"
        if not quiet:
            console.print(f"Pre-training on {many} structures; {self.leaks}{aside and f'; {aside}'}")

    def warnings(self) -> Iterator[str]:
        """What will make answers vague, or rest on a guess, however long it is trained."""
        if self.new_elements:
            yield (
                f"No label has {', '.join(self.new_elements)}, but test structures do: energies there rest on a "
                "guessed reference (choose other test structures with --test or --split-key)"
            )
        if (n := len(set(self.groups))) < MATERIALS:
            yield (
                f"Only {n} {'structures' if self.n_materials == 1 else 'materials'} test: intervals may be wide, and "
                "more seeds will not narrow them (give other test structures with --test or --split-key)"
            )
        if len(self.sizes) == 1:
            yield "One size makes no curve: errors will be compared, but no labels counted (give several with --sizes)"
        if many := {n: each for n, each in self.validating.items() if 3 * max(each) > int(n)}:
            yield f"As materials stay whole, more than a third of the labels only validate: {validating_in_words(many)}"

    @cached_property
    def validating(self) -> dict[str, list[int]]:
        """Of each number of labels, how many validate with each seed."""
        return {str(n): [validating(self.pool_atoms, n, s) for s in range(self.seeds)] for n in self.sizes if n >= FEW}

    def units(self) -> dict[str, str]:
        """Of the quantities that will be judged, which all test structures have; the most important first."""
        known = {"energy": ("energy_per_atom", "eV/atom"), "forces": ("forces", "eV/Å"), "stress": ("stress", "eV/Å^3")}
        entries = labelled_for(self.objective, self.test_atoms, *self.named).labels.entries
        judged = (e for e in entries if e.quantity in self.wanted and e.count == e.total)
        found = dict(known.get(e.quantity, (e.quantity, e.unit or "")) for e in judged)
        if isinstance(self.objective, Property) and self.objective.task == "classification":
            found = dict.fromkeys(found, "wrong")
        return {name: found[name] for name in in_order(found, self.wanted)}

    # ------------------------------------------------------------------------------------------------------- cells

    def cases(self) -> list[Arm]:
        """Arms and the sizes of their bases; only one, if possible a trained one, is drawn over all of these."""
        based = [arm for arm in self.arms if arm not in BASELESS]
        trained = [arm for arm in based if arm not in UNTRAINED]
        swept = next((arm for arm in ("full", *trained, *based) if arm in based), None)
        several = len(self.base_sizes) > 1
        found: list[Arm] = []
        for arm in self.arms:
            if arm in BASELESS or not several:
                found.append((arm, None))
            else:
                found += [(arm, m) for m in (self.base_sizes if arm == swept else self.base_sizes[-1:])]
        return found

    def cell(self, case: Arm, n_train: int, seed: int, lr: float) -> Cell:
        arm, m = case
        bound = dict(self.bounds["tuning"])
        if arm in (LONG, TOGETHER):
            bound = both(bound, self.bounds["pretraining"])
        key = {"arm": arm, "n_train": n_train, "seed": seed, "lr": lr}
        arguments: dict[str, Any] = {
            "pool": self.pool, "test": self.test, "ids": self.ids, "objective": self.objective,
            "architecture": self.backbone, "bound": bound, "edges": self.edges, "label": dict(self.named[0]),
            "unit": dict(self.named[1]),
        }  # fmt: skip
        if arm in BASELESS and self.varied and "energy" in self.wanted:
            arguments["guess"] = True
        if arm == DELTA:
            arguments |= {"objective": copied(self.objective, minus=self.cheap)}
            arguments |= {"label": dict(self.both_named[0]), "unit": dict(self.both_named[1])}
        if arm in (REPLAY, TOGETHER) and self.base_sizes:
            arguments["old"] = {
                "data": self.base_pack, "objective": self.base_objective, "label": dict(self.base_named[0]),
                "unit": dict(self.base_named[1]),
            }  # fmt: skip
            if (n := m or self.base_sizes[-1]) < self.n_base:
                arguments["old"]["n"] = n
        if arm in BASELESS:
            return Cell(key, point, arguments)
        if self.base_sizes and self.ledger is not None:
            arguments["ledger"] = self.ledger
        if m is not None:
            key["n_pretraining"] = m
        base, needs = self._base(m, seed)
        return Cell(key, point, {**arguments, **base}, needs)

    def _base(self, m: int | None, seed: int) -> tuple[dict[str, Any], dict[str, Cell]]:
        part = {} if self.part is None else {"part": self.part}
        if self.model is not None:
            return {"model": self.model, **part}, {}
        key = {"n_pretraining": m or self.base_sizes[-1], "seed": seed}
        arguments = {
            "data": self.base_pack, "objective": self.base_objective, "architecture": self.backbone,
            "bound": self.bounds["pretraining"], "edges": self.edges, "label": dict(self.base_named[0]),
            "unit": dict(self.base_named[1]),
        }  # fmt: skip
        return part, {"base": Cell(key, based, arguments)}

    def run(self, fan_out: Mapping[str, Any], halving: bool) -> list[dict[str, Any]]:
        """All points, at learning rates that validation labels of the first seed chose."""
        cases = self.cases()
        trained = [case for case in cases if case[0] not in UNTRAINED]
        search = {
            (case, n): [self.cell(case, n, 0, rate) for rate in self.rates]
            for case in trained
            for n in self.sizes
            if n >= FEW
        }
        found = self._done((cell for tried in search.values() for cell in tried), fan_out)
        rate_of = {at: self._rate([found[cell] for cell in tried]) for at, tried in search.items()}

        def cells(seed: int, cases: Iterable[Arm]) -> Iterator[Cell]:
            for n in self.sizes:
                for case in cases:
                    near = min((at for at in rate_of if at[0] == case and at[1] >= n), default=None, key=lambda a: a[1])
                    yield self.cell(case, n, seed, rate_of[near] if near else self.rates[0])

        if not halving:
            every = [cell for seed in range(self.seeds) for cell in cells(seed, cases)]
            found = self._done(every, fan_out)
            return [found[cell] for cell in every]
        points: list[dict[str, Any]] = []
        for seed in range(self.seeds):
            every = list(cells(seed, cases))
            found = self._done(every, fan_out)
            points += [found[cell] for cell in every]
            cases = self._halved(cases, points) if seed < self.seeds - 1 else cases
        return points

    def _done(self, cells: Iterable[Cell], fan_out: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
        """Points of all cells, each with the name of its folder."""
        return {cell: {**found, "cell": cell.name} for cell, found in run(cells, self.out, **fan_out)}

    def _rate(self, tried: Sequence[Mapping[str, Any]]) -> float:
        losses = [math.inf if p.get("validation loss") is None else p["validation loss"] for p in tried]
        return self.rates[int(np.argmin(losses))]

    def chosen_rates(self, points: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
        """What each trained arm chose with the first seed, for each number of labels that let it choose."""
        own = (p for p in points if p["seed"] == 0 and p["n_train"] >= FEW and p["arm"] not in UNTRAINED)
        return [(p["arm"], p["lr"]) for p in own]

    def _halved(self, cases: Sequence[Arm], points: Sequence[Mapping[str, Any]]) -> list[Arm]:
        """Without the worse half of the trained arms other than scratch, by validation errors; of an arm that has bases
        of several sizes the largest counts, and all stay or go."""
        rivals = {case[0]: case for case in cases if case[0] not in (SCRATCH, LONG, *UNTRAINED)}
        ranked = sorted(rivals, key=lambda arm: validation_error(rivals[arm], points, self.judged))
        gone = ranked[math.ceil(len(ranked) / 2) :]
        self.dropped += [name_of(case) for case in cases if case[0] in gone]
        return [case for case in cases if case[0] not in gone]

    def best(self, points: Sequence[Mapping[str, Any]]) -> Arm | None:
        """The pre-trained arm with the smallest validation errors; nothing was tested to choose it.

        Where nothing validates it is the first one that trains, or else the one that fits most to labels; a difference
        only where there is no other arm.
        """
        cases = [case for case in self.cases() if case[0] not in (SCRATCH, LONG)]
        cases = [case for case in cases if case[0] != DELTA] or cases
        cases = [
            case for case in cases if case[1] in (None, *self.base_sizes[-1:]) and name_of(case) not in self.dropped
        ]
        if trained := [case for case in cases if case[0] not in UNTRAINED]:
            return min(trained, key=lambda case: validation_error(case, points, self.judged))
        return max(cases, key=lambda case: UNTRAINED.index(case[0]), default=None)

    def chosen_by(self, case: Arm, points: Sequence[Mapping[str, Any]]) -> str:
        validated = math.isfinite(validation_error(case, points, self.judged))
        return "validation errors" if validated else "its place among the arms"

    def example(self, case: Arm, points: Sequence[Mapping[str, Any]]) -> Example | None:
        """One model of an arm, of the most labels and the first seed, against its test set."""
        own = [p for p in points if (p["arm"], p["n_pretraining"]) == case and p["errors"]]
        if not own:
            return None
        most = max(own, key=lambda p: (p["n_train"], -p["seed"]))
        folder = self.cell(case, most["n_train"], most["seed"], most["lr"]).folder(self.out)
        model = load(folder / "run/model.safetensors").whole(DEAR if case[0] == TOGETHER else None)
        named = self.both_named if case[0] == DELTA else self.named
        pairs = tested(model, self.test_atoms, *named)
        units = {name: unit for name, unit in most["units"].items() if unit != "wrong"}
        return Example(name_of(case), most["n_train"], self.test_atoms, pairs, units)

    # ---------------------------------------------------------------------------------------------------- baselines

    def baselines(self, units: Mapping[str, str], fan_out: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Errors of what takes no network: shifts and lines, through what the base says where it says anything."""
        name, kind = scalar_of(self.objective)
        quantity = f"{name}_per_atom" if name == "energy" else name
        if kind == "per-atom" or units.get(quantity, "wrong") == "wrong":
            return []
        labels, wanted = (scalars(self.objective, some, *self.named) for some in (self.pool_atoms, self.test_atoms))
        if not np.isfinite(wanted).all():
            return []
        own, tested = compositions_of(self.pool_atoms), compositions_of(self.test_atoms)
        per = tested.sum(axis=1) if name == "energy" else 1
        base = [] if self.cheap else [self._said(seed) for seed in range(self.seeds)]
        said = dict(run(base, self.out, **fan_out))
        found = []
        for seed, n in product(range(self.seeds), self.sizes):
            members = nested(np.arange(len(labels)), [n], seed=seed)[0]
            members = members[np.isfinite(labels[members])]
            if not len(members):
                continue
            cheap = said[base[seed]] if base else self.known
            through = {"cheap": np.array(cheap["pool"])[members], "test_cheap": cheap["test"]} if cheap else {}
            for law, predicted in baselines(labels[members], own[members], tested, kind=kind, **through).items():
                law = AS_IT_IS if base and law == "cheap value" else law
                mae = float(np.mean(np.abs(predicted - wanted) / per))
                found.append({"arm": law, "n_train": n, "seed": seed, "quantity": quantity, "mae": mae})
        return found

    def _cheap_labels(self) -> dict[str, np.ndarray]:
        """In the unit of the expensive ones; an error where a structure has none."""
        if scalar_of(self.objective)[1] == "per-atom":
            return {}
        difference = copied(self.objective, minus=self.cheap)
        sides = {"pool": self.pool_atoms, "test": self.test_atoms}
        found = {
            side: scalars(self.objective, some, *self.named) - scalars(difference, some, *self.both_named)
            for side, some in sides.items()
        }
        if lacking := sum(int(np.count_nonzero(~np.isfinite(values))) for values in found.values()):
            raise InputError(
                f"{lacking} of {self.n_pool + self.n_test} structures have no cheap label '{self.cheap}': name its key "
                f"(--label {self.cheap}=KEY), or leave such structures out"
            )
        return found

    def _said(self, seed: int) -> Cell:
        """What the base of a seed says of all structures without training."""
        given, needs = self._base(None, seed)
        arguments = {
            "pool": self.pool, "test": self.test, "objective": self.objective, "edges": self.edges,
            "label": dict(self.named[0]), "unit": dict(self.named[1]), **given,
        }  # fmt: skip
        return Cell({"seed": seed} if needs else {}, untouched, arguments, needs)

    # ------------------------------------------------------------------------------------------------------- price

    def price(self) -> str:
        """How many cells are left to do, and how long they take."""
        bases = [[self._base(m, seed)[1]["base"]] for m in self.base_sizes for seed in range(self.seeds)]
        every = {"pretraining": bases, "tuning": list(self._alternatives())}
        left = {
            stage: [cells for cells in some if not any(cell.is_done(self.out) for cell in cells)]
            for stage, some in every.items()
        }
        left = {stage: some for stage, some in left.items() if some}
        done = sum(map(len, every.values())) - sum(map(len, left.values()))
        already = f" ({done} are done already)" if done else ""
        if not left:
            return f"Nothing is left to train{already}"
        words = {"pretraining": "pre-training", "tuning": "fine-tuning"}
        cells = " and ".join(f"{len(some)} {words[stage]}s" for stage, some in left.items())
        seconds = [seconds_of(cells[0].arguments["bound"]) for some in left.values() for cells in some]
        if None in seconds:
            each = " and ".join(f"{in_words(self.bounds[stage])} for each {words[stage]}" for stage in left)
            return f"{cells}{already}: {each}"
        hours = sum(each for each in seconds if each) / 3600
        return f"{cells}{already}: at most {hours:.2g} hours of processor time"

    def _alternatives(self) -> Iterator[list[Cell]]:
        """All fine-tunings, each as the cells that it may turn out to be: the learning rate is found on the way."""
        trained = [case for case in self.cases() if case[0] not in UNTRAINED]
        for case, n, seed in product(trained, self.sizes, range(self.seeds)):
            rates = [self.cell(case, n, seed, rate) for rate in self.rates]
            yield from ([cell] for cell in rates) if seed == 0 and n >= FEW else [rates]  # the first seed tries all

    def _both_stages(self) -> int:
        """Fine-tunings that take the time of a pre-training too."""
        arms = sum(arm in (LONG, TOGETHER) for arm in self.arms)
        searched = sum(n >= FEW for n in self.sizes) * (len(self.rates) - 1)
        return arms * (len(self.sizes) * self.seeds + searched)

    def _tunings(self) -> int:
        """Fine-tunings of a budget, with those that search learning rates."""
        trained = [case for case in self.cases() if case[0] not in UNTRAINED]
        fixed = sum(case[0] in (SCRATCH, LONG) for case in trained)
        rivals = sorted(Counter(arm for arm, _ in trained if arm not in (SCRATCH, LONG)).values(), reverse=True)
        total = 0
        for _ in range(self.seeds):
            total += (fixed + sum(rivals)) * len(self.sizes)
            rivals = rivals[: math.ceil(len(rivals) / 2)]
        return total + len(trained) * sum(n >= FEW for n in self.sizes) * (len(self.rates) - 1)

    def within(self, seconds: float, workers: int) -> dict[str, Any]:
        """Bounds of the stages that fit into a time: a third of it for bases, the rest for fine-tunings."""
        work = SHARE * seconds * workers
        bases = len(self.base_sizes) * self.seeds + self._both_stages()
        tunings = self._tunings()
        each = (2 / 3 if bases else 1.0) * work / max(tunings, 1)
        first = work / 3 / max(bases, 1)
        if min(each, first) < LEAST:
            of_bases = f"{first:.1f} s for each of {bases} pre-trainings and " if bases else ""
            raise InputError(
                f"a budget of {seconds:g} s leaves {of_bases}{each:.1f} s for each of {tunings} fine-tunings: "
                "give more time, or fewer sizes, arms, rates or seeds"
            )
        return {
            name: {"processor_time": f"{math.floor(10 * t) / 10:g}s"}
            for name, t in (("pretraining", first), ("tuning", each))
        }


def validation_error(case: Arm, points: Iterable[Mapping[str, Any]], learned: Sequence[str] = ()) -> float:
    """Geometric mean over sizes and seeds of the error that is judged on validation labels; infinite without any, and
    where a run diverged."""
    own = [p for p in points if (p["arm"], p["n_pretraining"]) == case]
    said = [p["validation"] for p in own if p["validation"]]
    if not said or any(p["errors"] is None for p in own):
        return math.inf
    found = [each[in_order(each, learned)[0]] for each in said]
    return math.exp(float(np.mean(np.log(np.maximum(found, TINY)))))


def chosen_sizes(sizes: Sequence[int] | None, most: int) -> list[int]:
    """In ascending order; by default doubled from ten on, or where that is no curve, in equal ratios up to all."""
    if sizes is None:
        doubled = [10 * 2**k for k in range(40) if 10 * 2**k <= most]
        spread = np.unique(np.geomspace(FEWEST, most, SIZES).round().astype(int)).tolist()
        return doubled if len(doubled) >= SIZES else spread
    found = sorted(set(sizes))
    if not found or found[0] < FEWEST:
        raise InputError(f"sizes {list(sizes)} begin below {FEWEST} labels: a model needs some")
    if found[-1] > most:
        raise InputError(f"there are {most} labels to train on, not {found[-1]}: ask for fewer")
    return found


def _bonded(source: Source) -> Sequence[Atoms]:
    """Without isolated atoms, which are references of energies, and no labels that a curve could count."""
    structures = read(source)
    if not (lone := isolated_atoms(structures)):
        return structures
    console.print(f"{len(lone)} isolated atoms are no structures of a curve, and are left out")
    return Subset(structures, np.setdiff1d(np.arange(len(structures)), lone))


def _by(key: str, structures: Sequence[Atoms]) -> tuple[Sequence[Atoms], Sequence[Atoms]]:
    name, _, value = key.partition("=")
    found = by_key(structures, name, value or None, fraction=0)
    if found.test is None or not len(found.test):
        raise InputError(f"'{key}' names no test structures")
    rest = np.union1d(found.train, found.valid)
    return Subset(structures, rest), Subset(structures, found.test)
