"""The operation, its inputs, and how kernels become something that autograd can differentiate twice."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

N, E, C, KNOTS, BOX = 768, 40_000, 64, 515, 192
FIRST, SECOND = ("phi", "v", "W", "u"), ("phi", "v", "W", "u", "gs", "gv")


class Graph(NamedTuple):
    """Directed edges sorted by receiver; those of atom i are pointers[i]:pointers[i + 1]."""

    senders: Tensor
    receivers: Tensor
    pointers: Tensor


Message = Callable[[Tensor, Tensor, Tensor, Tensor, Graph], tuple[Tensor, Tensor]]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Graph]:
    """A liquid-like random graph, and every array of the operation."""
    rng = np.random.default_rng(0)
    receivers = np.sort(rng.integers(N, size=E))
    senders = receivers // BOX * BOX + rng.integers(BOX, size=E)
    pointers = np.concatenate([[0], np.bincount(receivers, minlength=N).cumsum()])
    graph = Graph(*(torch.from_numpy(x.astype(np.int64)) for x in (senders, receivers, pointers)))
    directions = rng.normal(size=(E, 3))
    arrays = {
        "phi": rng.normal(size=(N, 3 * C)),
        "v": rng.normal(size=(N, 3, C)),
        "W": rng.normal(size=(E, 3 * C)),
        "u": directions / np.linalg.norm(directions, axis=1, keepdims=True),
        "gs": rng.normal(size=(N, C)),  # gradient that arrives from above
        "gv": rng.normal(size=(N, 3, C)),
        "table": rng.normal(size=(KNOTS, 3 * C)),
        "x": rng.uniform(size=E) * (KNOTS - 3),  # distance in units of the knot spacing
        "basis": rng.normal(size=(E, 21)),
        "weight": rng.normal(size=(21, 3 * C)),
    }
    return {name: torch.from_numpy(x.astype(np.float32)).to(dtype) for name, x in arrays.items()}, graph


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any], second: Callable[..., Any]) -> Message:
    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, phi: Tensor, v: Tensor, W: Tensor, u: Tensor, gs: Tensor, gv: Tensor, graph: Graph
        ) -> Any:
            ctx.save_for_backward(phi, v, W, u, gs, gv)
            ctx.graph = graph
            ctx.set_materialize_grads(False)
            return tuple(backward(phi, v, W, u, gs, gv, graph))

        @staticmethod
        def backward(ctx: Any, *h: Tensor | None) -> Any:
            return *second(*ctx.saved_tensors, *h, ctx.graph), None

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, phi: Tensor, v: Tensor, W: Tensor, u: Tensor, graph: Graph) -> Any:
            ctx.save_for_backward(phi, v, W, u)
            ctx.graph = graph
            return forward(phi, v, W, u, graph)

        @staticmethod
        def backward(ctx: Any, gs: Tensor, gv: Tensor) -> Any:
            return *Gradient.apply(*ctx.saved_tensors, gs, gv, ctx.graph), None

    return First.apply


def outputs_of_second(full: bool, phi: Tensor, v: Tensor, W: Tensor, u: Tensor, gs: Tensor, gv: Tensor) -> list[Any]:
    """Zeros for what depends on the gradient of u alone, or on all four gradients."""
    return [torch.zeros_like(x) if full or i in (0, 2, 5) else None for i, x in enumerate((phi, v, W, u, gs, gv))]
