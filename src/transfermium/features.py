"""What a model sees in structures, as a table of numbers: for regressions of one's own, and for probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor

from . import distributed
from .data.read import Source, read
from .errors import InputError
from .evaluate import parts, shared, tell_unseen
from .graph import to_graph
from .model import SMOOTH, Model, check_file, load
from .train import chosen_device


class FeatureTable(NamedTuple):
    """One row for each structure (or atom), one named column for each feature."""

    names: list[str]
    values: np.ndarray  # (n_structures or n_atoms, n_features)


def features(
    model: str | Path | Model,
    structures: Source,
    out: str | Path | None = None,
    *,
    per_atom: bool = False,
    edges: int = 10_000,
    device: str = "auto",
    verbose: bool = True,
) -> FeatureTable:
    """What each layer of the backbone knows of structures: invariant under rotation and the order of atoms.

    Layers are those of `Model.features`. Those of a backbone that obeys no rotation depend on the orientation.

    Args:
        out: a .parquet or .csv file, with a column "structure" (and, of atoms, "atom") before the features.
        per_atom: a row for each atom; otherwise means and standard deviations over the atoms of each structure.

    Raises:
        InputError: for structures or files that cannot be used.
    """
    distributed.join()
    model = model if isinstance(model, Model) else load(model)
    given = read(structures)
    ending = Path(out).suffix.lower() if out is not None else ".parquet"
    check_file(out)
    if ending not in (".parquet", ".csv"):
        raise InputError(f"{out} ends in '{ending}', but features are written to .parquet or .csv")
    tell_unseen(model, given, verbose)
    model = model.to(chosen_device(device)).eval()

    rows: dict[int, list[np.ndarray]] = {}
    names: list[str] = []

    def work(members: list[int]) -> dict[int, list[np.ndarray]]:
        chosen = [given[i] for i in members]
        found = layers_of(model, chosen)
        names[:] = [f"{layer} {k}" for layer, values in found.items() for k in range(values.shape[1])]
        joined = torch.cat(list(found.values()), dim=1).double().cpu().numpy()
        return dict(
            zip(members, map(list, np.split(joined, np.cumsum([len(atoms) for atoms in chosen])[:-1])), strict=True)
        )

    for some in shared(parts(model, given, edges), work, given, "features", not verbose):
        rows |= some
    atoms = [np.array(rows[i]) for i in range(len(given))]
    if per_atom:
        table = FeatureTable(names, np.concatenate(atoms))
    else:
        means, spreads = [own.mean(axis=0) for own in atoms], [np.sqrt(own.var(axis=0) + SMOOTH) for own in atoms]
        both = [f"{statistic} {name}" for statistic in ("mean", "std") for name in names]
        table = FeatureTable(both, np.concatenate([means, spreads], axis=1))
    if out is not None and distributed.rank() == 0:
        _write(Path(out), table, [len(own) for own in atoms] if per_atom else None)
    return table


@torch.no_grad()
def layers_of(model: Model, structures: Sequence[ase.Atoms]) -> dict[str, Tensor]:
    """Invariants of each layer: (n_atoms, some width)."""
    weight = next(model.parameters())
    graph = to_graph(structures, model.backbone.edges).to(weight.device, weight.dtype)
    found = model.features(graph, ("layers",)).layers
    assert found is not None
    return found


def _write(path: Path, table: FeatureTable, sizes: Sequence[int] | None) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    n = len(table.values)
    index = {"structure": np.arange(n)}
    if sizes is not None:
        index = {"structure": np.repeat(np.arange(len(sizes)), sizes)}
        index["atom"] = np.concatenate([np.arange(size) for size in sizes])
    columns = {name: table.values[:, k] for k, name in enumerate(table.names)}
    content = pa.table({**index, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".csv":
        pa.csv.write_csv(content, path)
    else:
        pa.parquet.write_table(content, path)
