"""From files to labelled, split and packed structures."""

from .columns import isolated_atoms
from .join import joined
from .labels import Label, Labelled, Labels, available, resolve
from .leakage import Leak, leaks, without
from .pack import PackedSet, is_packed, pack
from .read import read, stream
from .sequences import Joined, Subset, original
from .split import Split, by_key, found_split_keys, nested, split

__all__ = [
    "Joined",
    "Label",
    "Labelled",
    "Labels",
    "Leak",
    "PackedSet",
    "Split",
    "Subset",
    "available",
    "by_key",
    "found_split_keys",
    "is_packed",
    "isolated_atoms",
    "joined",
    "leaks",
    "nested",
    "original",
    "pack",
    "read",
    "resolve",
    "split",
    "stream",
    "without",
]
