"""What a model sees in structures, as a table of numbers: for regressions of one's own, and for probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor, nn

from . import distributed
from .data.read import Source, read
from .errors import InputError
from .evaluate import parts, shared, tell_unseen
from .graph import to_graph
from .model import Model, load
from .train import chosen_device

Layers = dict[str, list[Tensor]]  # name of a layer to what it gave


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

    Layers are the element and what the structure says beside it, the blocks of each `nn.ModuleList` of the backbone,
    and its final scalars. Of vectors and tensors (n_atoms, components, width) the norm over components is taken.

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
    if ending not in (".parquet", ".csv"):
        raise InputError(f"{out} ends in '{ending}', but features are written to .parquet or .csv")
    tell_unseen(model, given, verbose)
    model = model.to(chosen_device(device)).eval()

    rows: dict[int, list[np.ndarray]] = {}
    names: list[str] = []

    def work(members: list[int]) -> dict[int, list[np.ndarray]]:
        found, sizes = _layers(model, [given[i] for i in members]), [len(given[i]) for i in members]
        names[:] = [f"{layer} {k}" for layer, values in found.items() for k in range(values.shape[1])]
        joined = torch.cat(list(found.values()), dim=1).double().cpu().numpy()
        return dict(zip(members, map(list, np.split(joined, np.cumsum(sizes)[:-1])), strict=True))

    for some in shared(parts(model, given, edges), work, given, "features", not verbose):
        rows |= some
    atoms = [np.array(rows[i]) for i in range(len(given))]
    if per_atom:
        table = FeatureTable(names, np.concatenate(atoms))
    else:
        means, spreads = ([statistic(own, axis=0) for own in atoms] for statistic in (np.mean, np.std))
        both = [f"{statistic} {name}" for statistic in ("mean", "std") for name in names]
        table = FeatureTable(both, np.concatenate([means, spreads], axis=1))
    if out is not None and distributed.rank() == 0:
        _write(Path(out), table, [len(own) for own in atoms] if per_atom else None)
    return table


@torch.no_grad()
def _layers(model: Model, structures: Sequence[ase.Atoms]) -> dict[str, Tensor]:
    """Invariant features of each layer: (n_atoms, some width)."""
    graph = to_graph(structures, model.backbone.edges).to(
        next(model.parameters()).device, next(model.parameters()).dtype
    )
    with _watched(model.backbone) as seen:
        final = model.backbone(graph).scalars
    found = {}
    for name, given in [*seen.items(), ("final", [final])]:
        own = [_invariant(x) for x in given if len(x) == graph.n_atoms and x.dim() in (2, 3)]
        if own:
            found[name] = torch.cat(own, dim=1)
    return found


def _invariant(x: Tensor) -> Tensor:
    """Scalars as they are, norms of all else: (n_atoms, width)."""
    if x.dim() == 2:
        return x
    return x.squeeze(1) if x.shape[1] == 1 else torch.linalg.vector_norm(x, dim=1)


@contextmanager
def _watched(backbone: nn.Module) -> Iterator[Layers]:
    """What the layers of a backbone give while it is called."""
    seen: Layers = {}

    def watch(name: str, module: nn.Module) -> Any:
        def keep(module: nn.Module, arguments: Any, result: Any) -> None:
            given = result if isinstance(result, tuple) else (result,)
            seen[name] = [part for part in given if isinstance(part, Tensor)]

        return module.register_forward_hook(keep)

    handles = []
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList):
            handles += [watch(f"{name} {k}", block) for k, block in enumerate(child)]
        elif name == "node_inputs":
            handles.append(watch("element", child))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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
