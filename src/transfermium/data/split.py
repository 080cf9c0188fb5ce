"""Splits: which structures train, choose the checkpoint and test, without the same material on two sides."""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product, repeat
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..errors import InputError
from ..model import writing
from .columns import blocks, counts_of, elements, info_names, isolated_atoms, listed
from .columns import codes as column_codes
from .labels import word
from .sequences import Subset, spoken

IDS = (  # of a material or a trajectory, the coarser first
    "material_id", "material", "mp_id", "mpid", "mbid", "jid", "icsd_id", "oqmd_id", "alexandria_id", "mptrj_traj_id",
    "internal_id", "qm7_id", "molecule_id", "molecule", "smiles", "system", "system_id", "group_id", "traj_id",
    "trajectory_id", "trajectory",
)  # fmt: skip
OF_RUNS = ("mptrj_traj_id", "internal_id", *IDS[IDS.index("system") :])  # perhaps of one material
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
        with writing(Path(path)) as file:
            for opening, (name, value) in zip(chain("{", repeat(", ")), vars(self).items(), strict=False):
                file.write(f'{opening}"{name}": '.encode())
                if isinstance(value, np.ndarray):  # may be long, and longer as Python's integers
                    parts = (value[i : i + 8192] for i in range(0, len(value), 8192))
                    texts = chain("[", _separated(json.dumps(part.tolist())[1:-1] for part in parts), "]")
                    file.writelines(text.encode() for text in texts)
                else:
                    file.write(json.dumps(value).encode())
            file.write(b"}\n")

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
    total = len(structures)
    members = np.setdiff1d(np.arange(total), isolated_atoms(structures))
    if len(members) < 2:
        raise InputError(f"{len(members)} structures cannot be split; give validation data of its own")

    some = structures if len(members) == total else Subset(structures, members)
    if by == "auto":
        by, groups, reason = _automatic(some, fraction)
    elif by == "random":
        groups, reason = np.arange(len(members)), "random, as asked"
    elif by in ("composition", "prototype"):
        groups, reason = formulas(some, prototype=by == "prototype"), f"by {by}, as asked"
    else:
        groups, reason = _by_info(some, by)
    groups = _numbered(groups)
    n_groups = int(groups.max()) + 1
    if n_groups == 1:
        raise InputError(f"all {len(members)} structures share one {by}; split them at random (by=random)")

    present = elements(some)
    chosen = _choose(groups, present, fraction, np.random.default_rng(seed))
    valid, train = members[chosen[groups]], np.setdiff1d(np.arange(total), members[chosen[groups]])

    of_groups = "" if by == "random" else f", {int(chosen.sum())} of {n_groups} groups"
    reason = f"{reason}: {len(valid)} of {total} structures validate{of_groups}"
    if len(members) < total:
        reason += f"; {total - len(members)} isolated atoms stay in training"
    new = listed(present[chosen[groups]]) - listed(present[~chosen[groups]])
    if new and len(members) < total:
        new -= {z for i in np.setdiff1d(train, members) for z in structures[int(i)].numbers.tolist()}
    if new:
        reason += f"; only validation has {', '.join(chemical_symbols[z] for z in sorted(new))}"
    return Split(train, valid, None, by, reason, n_groups, total)


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
    codes, found = column_codes(structures, key, word)
    if not found:
        raise InputError(_no_key(key, info_names(structures)))
    values = sorted(word(entry) for entry in found)
    if value is not None:
        if word(value) not in values:
            raise InputError(f"no structure has {key}={value}; its values are {', '.join(values[:10])}")
        roles = ["test" if word(entry) == word(value) else "train" for entry in found]
    else:
        roles = [_role(entry) for entry in found]
        if "" in roles:
            raise InputError(
                f"{key!r} has the values {', '.join(values[:10])}, not train, val and test; "
                f"say which value is the test set"
            )

    role_of = np.array([*roles, ""])[codes]  # the last is that of a structure without the key
    sides = {name: np.flatnonzero(role_of == name) for name in ("train", "valid", "test")}
    reason = f"by {key!r}{'' if value is None else f', with {value} as test'}"
    if lacking := int((codes < 0).sum()):
        reason += f"; {lacking} structures without it are left out"
    if not len(sides["train"]):
        raise InputError(f"{key!r} leaves no structures to train on; its values are {', '.join(values[:10])}")
    if not len(sides["valid"]) and fraction > 0:
        inner = split(Subset(structures, sides["train"]), fraction, by=by, seed=seed)
        sides["valid"], sides["train"] = sides["train"][inner.valid], sides["train"][inner.train]
        reason += f"; validation from its training part, {inner.reason}"
    test = sides["test"] if len(sides["test"]) else None
    return Split(sides["train"], sides["valid"], test, key, reason, len(values), len(codes))


def nested(indices: Sequence[int] | np.ndarray, sizes: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Random subsets of these sizes, each contained in every larger one: the training sets of a learning curve."""
    order = np.random.default_rng(seed).permutation(np.asarray(indices, int))
    for size in sizes:
        if not 0 < size <= len(order):
            raise InputError(f"a subset of {size} cannot be taken from {len(order)} structures")
    return [order[:size] for size in sizes]


def materials(structures: Sequence[Atoms]) -> np.ndarray:
    """Numbers that are equal for structures of one material: of one id, if they have any; else each is its own."""
    groups = np.full(len(structures), -1)
    for key in IDS:
        codes = _ids(structures, key)
        if codes is not None:
            groups = np.where((groups < 0) & (codes >= 0), codes + groups.max() + 1, groups)
    alone = groups < 0
    groups[alone] = groups.max() + 1 + np.arange(alone.sum())
    return groups


def independent(structures: Sequence[Atoms]) -> np.ndarray:
    """Numbers of materials, as far as structures have ids; others belong together where they share a composition."""
    groups, known = materials(structures), np.zeros(len(structures), bool)
    for key in IDS:
        codes = _ids(structures, key)
        if codes is not None:
            known |= codes >= 0
    if known.all():
        return groups
    return np.where(known, groups, groups.max() + 1 + _numbered(formulas(structures)))


def found_split_keys(structures: Sequence[Atoms]) -> dict[str, list[Any]]:
    """Keys of info that look like a ready-made split (split, test_fold, cv_fold...) → their values."""
    found: dict[str, set[Any]] = {}
    for block in blocks(structures):
        for key in (name for place, name in block.present() if place == "info"):
            if key.lower().endswith(("split", "fold")):
                values = [value for value in block.info(key) if isinstance(value, str | int | np.integer)]
                if values:
                    found.setdefault(key, set()).update(v if isinstance(v, str) else int(v) for v in values)
    return {key: sorted(values, key=lambda value: (isinstance(value, str), value)) for key, values in found.items()}


# ---------------------------------------------------------------------------------------------------------- groups


def _automatic(structures: Sequence[Atoms], fraction: float) -> tuple[str, np.ndarray, str]:
    """Choose the groups: (by, group of each structure, reason)."""
    n = len(structures)
    alone = np.arange(n)
    ids = {key: codes for key in IDS if (codes := _ids(structures, key)) is not None}
    shared = [key for key, codes in ids.items() if np.bincount(codes[codes >= 0], minlength=1).max() > 1]
    if shared:
        by = "+".join(shared)
        groups = np.full(n, -1)
        for key in shared:
            groups = np.where(groups < 0, np.where(ids[key] < 0, -1, ids[key] + groups.max() + 1), groups)
        lacking = int((groups < 0).sum())
        if lacking:
            groups = np.where(groups < 0, _numbered(formulas(structures)) + groups.max() + 1, groups)
        reason = f"by {by}, which several structures share" + (
            f" ({lacking} without: by composition)" if lacking else ""
        )
    else:
        groups = _numbered(formulas(structures))
        by, reason = "composition", "by composition, as several structures share one"

    largest = int(np.bincount(groups).max())
    if largest == 1:
        return "random", alone, "random, as no two structures share an id or composition"
    if largest == n:
        return "random", alone, f"random, as all structures share one {by}"
    if n - largest < _target(n, fraction):
        return "random", alone, f"random, as {largest} structures share one {by} and the others are too few to validate"
    return by, groups, reason


def _by_info(structures: Sequence[Atoms], key: str) -> tuple[np.ndarray, str]:
    """Group by a key of info; structures without it are groups of their own."""
    codes = _ids(structures, key)
    if codes is None:
        raise InputError(_no_key(key, info_names(structures)))
    lacking = codes < 0
    groups = np.where(lacking, np.cumsum(lacking) + codes.max(), codes)
    of_their_own = f" ({int(lacking.sum())} without it are groups of their own)" if lacking.any() else ""
    return groups, f"by {key!r}, as asked{of_their_own}"


def _ids(structures: Sequence[Atoms], key: str) -> np.ndarray | None:
    """Numbers that are equal for the same id, -1 where there is none; None when no structure has one."""

    def spelled(value: Any) -> str:
        if isinstance(value, np.ndarray | list | tuple | dict):
            raise InputError(f"info {key!r} is no id but a {type(value).__name__}; split by another key")
        return word(value)

    codes, found = column_codes(structures, key, spelled)
    return codes if found else None


def formulas(structures: Sequence[Atoms], prototype: bool = False) -> np.ndarray:
    """Numbers that are equal for the same reduced formula, in any set; for a prototype, whatever its elements are."""
    result = np.empty(len(structures), np.uint64)
    start = 0
    for block in blocks(structures):
        counts = counts_of(block)
        if not block.n_atoms.all():
            where = spoken(structures, start + int(np.argmin(block.n_atoms)))
            raise InputError(f"{where} has no atoms; remove it")
        counts //= np.gcd.reduce(counts, axis=1)[:, None]
        if prototype:
            groups = [hash(str(group)) & (2**63 - 1) for group in block.info("spacegroup")]
            counts.sort(axis=1)
            counts[:, :2] = np.stack([block.n_atoms, groups], axis=1)  # never so many elements that these are in use
        weights = np.random.default_rng(0).integers(2**64, size=counts.shape[1], dtype=np.uint64)
        result[start : start + len(block)] = counts.astype(np.uint64) @ weights  # of 64 bits: no two formulas share one
        start += len(block)
    return result


def _numbered(groups: np.ndarray) -> np.ndarray:
    """The same groups numbered in the order in which they first appear."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), int)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[inverse]


def _choose(groups: np.ndarray, present: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw whole groups until they hold at least `fraction` of all structures; at least one group is left.

    `present` are the elements of each structure as packed bits. Returns which groups were drawn: (n_groups,).
    """
    sizes = np.bincount(groups)
    order = np.argsort(groups, kind="stable")
    contents = np.bitwise_or.reduceat(present[order], np.cumsum(sizes) - sizes, axis=0)  # (n_groups, BITS)
    left = sum(
        np.unpackbits(part, axis=1).sum(axis=0, dtype=int) for part in np.array_split(contents, len(sizes) // 8192 + 1)
    )

    target = _target(len(groups), fraction)
    order = rng.permutation(len(sizes))
    small, large = order[sizes[order] <= target], order[sizes[order] > target]
    large = large[np.argsort(sizes[large], kind="stable")]

    def drawn(*candidates: np.ndarray) -> np.ndarray:
        """Those after the others, and of each first what leaves another group with every element."""
        chosen, remain = np.zeros(len(sizes), bool), left.copy()
        held = n_chosen = 0
        for some, only_spare in product(candidates, (True, False)):
            for group in some:
                if held >= target or n_chosen == len(sizes) - 1:
                    return chosen
                own = np.unpackbits(contents[group]).astype(bool)
                if chosen[group] or (only_spare and (remain[own] == 1).any()):
                    continue
                chosen[group] = True
                n_chosen += 1
                held += int(sizes[group])
                remain[own] -= 1
        return chosen

    chosen = drawn(small, large)
    if sizes[chosen].sum() > len(groups) / 2 and len(large):
        chosen = min(chosen, drawn(large), key=lambda one: sizes[one].sum())  # a large one is enough alone
    return chosen


def _target(n: int, fraction: float) -> int:
    return max(1, math.ceil(fraction * n - 1e-9))  # 0.1 × 30 is a little more than 3


def _role(value: Any) -> str:
    word = str(value).lower()
    return "train" if word in TRAIN else "valid" if word in VALID else "test" if word in TEST else ""


def _no_key(key: str, names: set[str]) -> str:
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"no structure has {key!r} in its info; there are {', '.join(sorted(names)) or 'no keys'}{hint}"


def _separated(parts: Iterable[str]) -> Iterator[str]:
    for opening, part in zip(chain([""], repeat(", ")), parts, strict=False):
        yield opening + part


def _indices(values: Any) -> np.ndarray:
    found = np.array(values).reshape(-1)
    if len(found) and found.dtype.kind not in "iu":
        raise ValueError(f"{found[0]} is no index")
    return found.astype(int)
