"""What one neighbour contributes, as a formula: written once, differentiated symbolically, evaluated anywhere.

A formula is an ordinary function of numbers. Called with tensors it is the reference; called with `Expression`s it
leaves a graph that `gradients` differentiates, as often as wanted, and that kernels are compiled from. Numbers are of
two kinds: those that differ from channel to channel, and those of the edge as a whole (length, direction, sums).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

_known: dict[Hashable, Expression] = {}


class Expression:
    """One operation on others; equal expressions are the same object."""

    __slots__ = ("args", "op", "per_edge", "value")

    op: str
    args: tuple[Expression, ...]
    value: Any  # of a constant, or which input it is
    per_edge: bool  # the same for all channels

    def __add__(self, other: Expression | float) -> Expression:
        other = _expression(other)
        if self.op == other.op == "constant":
            return constant(self.value + other.value)
        if other.op == "constant" and other.value == 0:
            return self
        if self.op == "constant" and self.value == 0:
            return other
        return _make("add", (self, other))

    def __mul__(self, other: Expression | float) -> Expression:
        other = _expression(other)
        if self.op == "constant":
            self, other = other, self
        if other.op == "constant":
            if self.op == "constant":
                return constant(self.value * other.value)
            if other.value in (0, 1):
                return self if other.value else other
            if self.op == "mul" and self.args[1].op == "constant":
                return self.args[0] * constant(self.args[1].value * other.value)
        return _make("mul", (self, other))

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Expression:
        return self * -1.0

    def __sub__(self, other: Expression | float) -> Expression:
        return self + _expression(other) * -1.0

    def __rsub__(self, other: float) -> Expression:
        return constant(other) + self * -1.0

    def __truediv__(self, other: Expression | float) -> Expression:
        other = _expression(other)
        return self * (constant(1 / other.value) if other.op == "constant" else _make("inverse", (other,)))

    def __rtruediv__(self, other: float) -> Expression:
        return _make("inverse", (self,)) * other


def constant(value: float) -> Expression:
    return _make("constant", (), float(value), per_edge=True)


def symbol(array: str, component: int, per_edge: bool = False) -> Expression:
    """One component of an input array."""
    return _make("input", (), (array, component), per_edge)


def radial(function: int, length: Expression, order: int = 0) -> Expression:
    """A radial function (its derivative of some order) at a length."""
    return _make("radial", (length,), (function, order), per_edge=False)


@overload
def sigmoid(x: Tensor) -> Tensor: ...
@overload
def sigmoid(x: Expression) -> Expression: ...
def sigmoid(x: Any) -> Any:
    return torch.sigmoid(x) if isinstance(x, Tensor) else _make("sigmoid", (x,))


@overload
def softplus(x: Tensor) -> Tensor: ...
@overload
def softplus(x: Expression) -> Expression: ...
def softplus(x: Any) -> Any:
    return F.softplus(x) if isinstance(x, Tensor) else _make("softplus", (x,))


@overload
def sqrt(x: Tensor) -> Tensor: ...
@overload
def sqrt(x: Expression) -> Expression: ...
def sqrt(x: Any) -> Any:
    return torch.sqrt(x) if isinstance(x, Tensor) else _make("sqrt", (x,))


@overload
def total(x: Tensor) -> Tensor: ...
@overload
def total(x: Expression) -> Expression: ...
def total(x: Any) -> Any:
    """Sum over channels."""
    return x.sum(dim=-1, keepdim=True) if isinstance(x, Tensor) else _make("total", (x,), per_edge=True)


@overload
def head_total(x: Tensor, heads: int) -> Tensor: ...
@overload
def head_total(x: Expression, heads: int) -> Expression: ...
def head_total(x: Any, heads: int) -> Any:
    """Sum over the channels of each attention head, given to all of its channels; heads are equal runs of channels."""
    if not isinstance(x, Tensor):
        return _make("head_total", (x,), heads, per_edge=False)
    sums = x.unflatten(-1, (heads, -1)).sum(dim=-1, keepdim=True)
    return sums.expand(*sums.shape[:-1], x.shape[-1] // heads).flatten(-2)


def gradients(of: Mapping[Expression, Expression], wanted: Sequence[Expression]) -> list[Expression]:
    """Derivatives of Σ cotangent · expression, summed over channels, with respect to `wanted` (reverse mode).

    Args:
        of: expression to its cotangent.
        wanted: expressions without arguments, and radial functions, whose own dependence on the length is kept.
    """
    order = sort(of)
    collected: dict[Expression, list[Expression]] = {}
    for expression, cotangent in of.items():
        collected.setdefault(expression, []).append(cotangent)
    for expression in reversed(order):
        if expression not in collected:
            continue
        cotangent = _joined(expression, collected[expression])
        if expression.op == "head_total":  # not a product: the cotangents of a head are added up too
            collected.setdefault(expression.args[0], []).append(head_total(cotangent, expression.value))
        for argument, local in _locals(expression):
            collected.setdefault(argument, []).append(cotangent * local)
    return [_joined(expression, collected.get(expression, [])) for expression in wanted]


def sort(roots: Iterable[Expression]) -> list[Expression]:
    """All expressions that these depend on, and these, arguments first."""
    done: dict[Expression, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        expression, ready = stack.pop()
        if expression in done:
            continue
        if ready:
            done[expression] = None
            continue
        stack.append((expression, True))
        stack += [(argument, False) for argument in reversed(expression.args)]
    return list(done)


def _locals(x: Expression) -> list[tuple[Expression, Expression]]:
    """Arguments, each with the partial derivative of x."""
    one = constant(1)
    rules: dict[str, Callable[[], list[tuple[Expression, Expression]]]] = {
        "constant": lambda: [],
        "input": lambda: [],
        "add": lambda: [(x.args[0], one), (x.args[1], one)],
        "mul": lambda: [(x.args[0], x.args[1]), (x.args[1], x.args[0])],
        "inverse": lambda: [(x.args[0], -(x * x))],
        "sqrt": lambda: [(x.args[0], 0.5 / x)],
        "sigmoid": lambda: [(x.args[0], x * (1.0 - x))],
        "softplus": lambda: [(x.args[0], sigmoid(x.args[0]))],
        "total": lambda: [(x.args[0], one)],
        "head_total": lambda: [],  # see below
        "radial": lambda: [(x.args[0], radial(x.value[0], x.args[0], x.value[1] + 1))],
    }
    return rules[x.op]()


def _joined(expression: Expression, cotangents: Sequence[Expression]) -> Expression:
    """The sum of cotangents; for something that all channels share, over the channels too."""
    if not expression.per_edge:
        return sum(cotangents, constant(0))
    shared = [c for c in cotangents if c.per_edge]
    own = [c for c in cotangents if not c.per_edge]
    return sum(shared, total(sum(own, constant(0))) if own else constant(0))


def _expression(x: Expression | float) -> Expression:
    return x if isinstance(x, Expression) else constant(x)


def _make(op: str, args: tuple[Expression, ...], value: Any = None, per_edge: bool | None = None) -> Expression:
    key = (op, *map(id, args), value)
    if key not in _known:
        new = _known[key] = Expression.__new__(Expression)
        new.op, new.args, new.value = op, args, value
        new.per_edge = all(a.per_edge for a in args) if per_edge is None else per_edge
    return _known[key]
