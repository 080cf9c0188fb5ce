"""Splits: which structures train, choose the checkpoint and test, without the same material on two sides."""

import difflib
import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..errors import InputError
from ..graph import is_isolated_atom
from .labels import word
from .sequences import Subset

IDS = (  # of a material or a trajectory, the coarser first
    "material_id", "material", "mp_id", "mpid", "mbid", "jid", "icsd_id", "oqmd_id", "alexandria_id", "mptrj_traj_id",
    "internal_id", "qm7_id", "molecule_id", "molecule", "smiles", "system", "system_id", "group_id", "traj_id",
    "trajectory_id", "trajectory",
)  # fmt: skip
TRAIN = {"train", "training", "tr"}
VALID = {"val", "valid", "validation", "dev"}
TEST = {"test", "testing", "holdout"}


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of the structures to train on, to choose the checkpoint by and, perhaps, to test on.

    Attributes:
        by: what kept structures together: "random", "composition", "prototype" or keys of info.
        reason: one sentence for the user.
        groups: number of groups; of structures when the split is random.
        total: number of structures that were split, also those on no side; 0 where nobody said.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray | None = None
    by: str = "random"
    reason: str = ""
    groups: int = 0
    total: int = 0

    def save(self, path: str | Path) -> None:
        """Write the split as JSON."""
        content = {name: _plain(value) for name, value in vars(self).items()}
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                train=_indices(content["train"]),
                valid=_indices(content["valid"]),
                test=None if content["test"] is None else _indices(content["test"]),
                by=content["by"],
                reason=content["reason"],
                groups=content["groups"],
                total=content.get("total", 0),
            )
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such split") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a split written by transfermium ({type(error).__name__}: {error})"
            ) from error


def split(structures: Sequence[Atoms], fraction: float = 0.1, *, by: str = "auto", seed: int = 0) -> Split:
    """Set apart at least `fraction` of the structures for validation.

    `by` is "random", "composition" (reduced formula), "prototype" (formula without the names of the elements, number of
    atoms and, where info has it, spacegroup), any key of info, or "auto": by the ids of materials or trajectories where
    several structures share one, else by composition where it repeats, else random.

    Groups are never divided, and one at least stays in training. They are drawn at random; groups that hold the only
    structures with some element, or are larger than the whole validation set needs to be, come last. Lone atoms marked
    `config_type=IsolatedAtom` always stay in training.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the fraction for validation is {fraction}, but must lie between 0 and 1")
    facts = [_Facts.of(atoms) for atoms in structures]
    members = [i for i, fact in enumerate(facts) if not fact.isolated]
    if len(members) < 2:
        raise InputError(f"{len(members)} structures cannot be split; give validation data of its own")

    groups: list[Hashable]
    if by == "auto":
        by, groups, reason = _automatic([facts[i] for i in members], fraction)
    elif by == "random":
        groups, reason = [*members], "random, as asked"
    elif by in ("composition", "prototype"):
        groups, reason = [getattr(facts[i], by) for i in members], f"by {by}, as asked"
    else:
        groups, reason = _by_info(facts, members, by)
    n_groups = len(set(groups))
    if n_groups == 1:
        raise InputError(f"all {len(members)} structures share one {by}; split them at random (by=random)")

    chosen = _choose(groups, [facts[i].elements for i in members], fraction, np.random.default_rng(seed))
    valid = np.array([i for i, group in zip(members, groups, strict=True) if group in chosen])
    train = np.setdiff1d(np.arange(len(facts)), valid)

    of_groups = "" if by == "random" else f", {len(chosen)} of {n_groups} groups"
    reason = f"{reason}: {len(valid)} of {len(facts)} structures validate{of_groups}"
    if len(members) < len(facts):
        reason += f"; {len(facts) - len(members)} isolated atoms stay in training"
    new = _elements(facts, valid) - _elements(facts, train)
    if new:
        reason += f"; only validation has {', '.join(chemical_symbols[z] for z in sorted(new))}"
    return Split(train, valid, None, by, reason, n_groups, len(facts))


def by_key(
    structures: Sequence[Atoms],
    key: str,
    value: Any = None,
    *,
    fraction: float = 0.1,
    by: str = "auto",
    seed: int = 0,
) -> Split:
    """Split as a key of info says.

    With `value`, structures that have it are the test set (`test_fold`, 0) and the others train. Without, the words
    train, val and test (or their usual variants) decide. Where there is no val, `fraction` of the training structures
    is set apart by `split`, in groups as `by` says; a fraction of 0 sets nothing apart. Structures without the key are
    left out, and counted in the reason.
    """
    found = [atoms.info.get(key) for atoms in structures]
    present = [i for i, entry in enumerate(found) if entry is not None]
    if not present:
        raise InputError(_no_key(key, {name for atoms in structures for name in atoms.info}))
    values = sorted({word(found[i]) for i in present})
    if value is not None:
        if word(value) not in values:
            raise InputError(f"no structure has {key}={value}; its values are {', '.join(values[:10])}")
        roles = ["test" if word(found[i]) == word(value) else "train" for i in present]
    else:
        roles = [_role(found[i]) for i in present]
        if "" in roles:
            raise InputError(
                f"{key!r} has the values {', '.join(values[:10])}, not train, val and test; "
                f"say which value is the test set"
            )

    sides = {
        name: np.array([i for i, role in zip(present, roles, strict=True) if role == name], int)
        for name in ("train", "valid", "test")
    }
    reason = f"by {key!r}{'' if value is None else f', with {value} as test'}"
    if len(present) < len(found):
        reason += f"; {len(found) - len(present)} structures without it are left out"
    if not len(sides["train"]):
        raise InputError(f"{key!r} leaves no structures to train on; its values are {', '.join(values[:10])}")
    if not len(sides["valid"]) and fraction > 0:
        inner = split(Subset(structures, sides["train"]), fraction, by=by, seed=seed)
        sides["valid"], sides["train"] = sides["train"][inner.valid], sides["train"][inner.train]
        reason += f"; validation from its training part, {inner.reason}"
    test = sides["test"] if len(sides["test"]) else None
    return Split(sides["train"], sides["valid"], test, key, reason, len(values), len(found))


def nested(indices: Sequence[int] | np.ndarray, sizes: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Random subsets of these sizes, each contained in every larger one: the training sets of a learning curve."""
    order = np.random.default_rng(seed).permutation(np.asarray(indices, int))
    for size in sizes:
        if not 0 < size <= len(order):
            raise InputError(f"a subset of {size} cannot be taken from {len(order)} structures")
    return [order[:size] for size in sizes]


def found_split_keys(structures: Sequence[Atoms]) -> dict[str, list[Any]]:
    """Keys of info that look like a ready-made split (split, test_fold, cv_fold...) → their values."""
    found: dict[str, set[Any]] = {}
    for atoms in structures:
        for key, value in atoms.info.items():
            if key.lower().endswith(("split", "fold")) and isinstance(value, str | int | np.integer):
                found.setdefault(key, set()).add(value if isinstance(value, str) else int(value))
    return {key: sorted(values, key=lambda value: (isinstance(value, str), value)) for key, values in found.items()}


# ---------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class _Facts:
    """What a split needs to know of a structure, so that each is fetched once."""

    info: Mapping[str, Any]
    elements: frozenset[int]
    composition: Hashable
    prototype: Hashable
    isolated: bool

    @classmethod
    def of(cls, atoms: Atoms) -> "_Facts":
        numbers, counts = np.unique(atoms.numbers, return_counts=True)
        counts = counts // np.gcd.reduce(counts)
        composition = tuple(zip(numbers.tolist(), counts.tolist(), strict=True))
        prototype = (tuple(sorted(counts.tolist())), len(atoms), str(atoms.info.get("spacegroup")))
        return cls(dict(atoms.info), frozenset(numbers.tolist()), composition, prototype, is_isolated_atom(atoms))


def _automatic(facts: Sequence[_Facts], fraction: float) -> tuple[str, list[Hashable], str]:
    """Choose the groups: (by, group of each structure, reason)."""
    alone: list[Hashable] = list(range(len(facts)))
    shared = [key for key in IDS if _repeats([_id(fact, key) for fact in facts])]
    if shared:
        groups: list[Hashable] = [_first_id(fact, shared) or fact.composition for fact in facts]
        by = "+".join(shared)
        lacking = sum(_first_id(fact, shared) is None for fact in facts)
        reason = f"by {by}, which several structures share" + (
            f" ({lacking} without: by composition)" if lacking else ""
        )
    else:
        groups = [fact.composition for fact in facts]
        by, reason = "composition", "by composition, as several structures share one"

    largest = Counter(groups).most_common(1)[0][1]
    if largest == 1:
        return "random", alone, "random, as no two structures share an id or composition"
    if largest == len(facts):
        return "random", alone, f"random, as all structures share one {by}"
    if len(facts) - largest < _target(len(facts), fraction):
        return "random", alone, f"random, as {largest} structures share one {by} and the others are too few to validate"
    return by, groups, reason


def _by_info(facts: Sequence[_Facts], members: Sequence[int], key: str) -> tuple[list[Hashable], str]:
    """Group by a key of info; structures without it are groups of their own."""
    groups: list[Hashable] = [_id(facts[i], key) or i for i in members]
    lacking = sum(isinstance(group, int) for group in groups)
    if lacking == len(members):
        raise InputError(_no_key(key, {name for fact in facts for name in fact.info}))
    return groups, f"by {key!r}, as asked" + (f" ({lacking} without it are groups of their own)" if lacking else "")


def _choose(
    groups: Sequence[Hashable], elements: Sequence[frozenset[int]], fraction: float, rng: np.random.Generator
) -> set[Hashable]:
    """Draw whole groups until they hold at least `fraction` of all structures; at least one group is left."""
    sizes = Counter(groups)
    contents: dict[Hashable, frozenset[int]] = {}
    for group, present in zip(groups, elements, strict=True):
        contents[group] = contents.get(group, frozenset()) | present
    left = Counter(z for present in contents.values() for z in present)  # groups in training with this element

    target = _target(len(groups), fraction)
    names = list(sizes)
    order = [names[i] for i in rng.permutation(len(names))]
    small = [name for name in order if sizes[name] <= target]
    large = sorted((name for name in order if sizes[name] > target), key=sizes.__getitem__)
    chosen: set[Hashable] = set()
    held = 0
    for candidates, only_spare in product((small, large), (True, False)):
        for name in candidates:
            if held >= target or len(chosen) == len(names) - 1:
                return chosen
            if name in chosen or (only_spare and any(left[z] == 1 for z in contents[name])):
                continue
            chosen.add(name)
            held += sizes[name]
            left.subtract(contents[name])
    return chosen


def _target(n: int, fraction: float) -> int:
    return max(1, math.ceil(fraction * n - 1e-9))  # 0.1 × 30 is a little more than 3


def _elements(facts: Sequence[_Facts], indices: np.ndarray) -> frozenset[int]:
    return frozenset().union(*(facts[int(i)].elements for i in indices))


def _id(fact: _Facts, key: str) -> tuple[str, str] | None:
    value = fact.info.get(key)
    if isinstance(value, np.ndarray | list | tuple | dict):
        raise InputError(f"info {key!r} is no id but a {type(value).__name__}; split by another key")
    return None if value is None else (key, word(value))


def _first_id(fact: _Facts, keys: Sequence[str]) -> tuple[str, str] | None:
    return next((found for key in keys if (found := _id(fact, key)) is not None), None)


def _repeats(ids: Sequence[Hashable]) -> bool:
    return any(count > 1 for name, count in Counter(ids).items() if name is not None)


def _role(value: Any) -> str:
    word = str(value).lower()
    return "train" if word in TRAIN else "valid" if word in VALID else "test" if word in TEST else ""


def _no_key(key: str, names: set[str]) -> str:
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"no structure has {key!r} in its info; there are {', '.join(sorted(names)) or 'no keys'}{hint}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _indices(values: Any) -> np.ndarray:
    return np.array(values, dtype=int).reshape(-1)
