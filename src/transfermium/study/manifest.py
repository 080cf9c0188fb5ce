"""What a study was made of: each of its sets in plain values, as JSON and pages show them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..data import Labels
from ..data.columns import count_elements
from ..data.read import Source
from ..run import fingerprint

WHAT_FOR = {"labels": "to train on", "test": "to test on", "base": "to pre-train on"}  # sets of a study

Manifest = dict[str, Any]


def manifest(structures: Sequence[Atoms], source: Source | None, labels: Labels, level: str) -> Manifest:
    """One set: how many structures of which elements, where they came from, and their labels.

    Args:
        source: as it was given; of files only their names are kept, as folders are of one machine.
        labels: none for structures that are learned from without any.
        level: of theory, in words.
    """
    sources = source if isinstance(source, list | tuple) else [source]
    files = [os.path.basename(os.fspath(one)) for one in sources if isinstance(one, str | os.PathLike)]
    counts = count_elements(structures)
    return {
        "structures": len(structures),
        "atoms": int(counts.sum()),
        "elements": [chemical_symbols[z] for z in np.flatnonzero(counts)],
        "level of theory": level,
        "files": files,
        "fingerprint": fingerprint(structures),
        **labels.to_json(),
    }


def labels_of(known: Manifest) -> Labels:
    """The labels of one set."""
    return Labels.from_json(known)
