"""Formulas of edges or atoms as differentiable functions of tensors: kernels on a CPU, plain torch elsewhere."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..graph import AtomGraph, Cutoff
from . import kernels, spline
from .expression import Expression, gradients, radial, sort, sqrt, symbol
from .kernels import Array, Kernel, Output
from .spline import Grid

_use_kernels = ContextVar("use_kernels", default=True)
_weights_are_fixed = ContextVar("weights_are_fixed", default=False)
_tables: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Table]] = weakref.WeakKeyDictionary()
_compiling = threading.RLock()


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Evaluate formulas with plain torch operations inside this context, also where kernels could."""
    token = _use_kernels.set(False)
    try:
        yield
    finally:
        _use_kernels.reset(token)


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """Take weights as constants inside this context, so that what depends on them alone is computed once.

    It is computed again when a parameter or buffer has other values. Other attributes of modules must stay.
    """
    token = _weights_are_fixed.set(True)
    try:
        yield
    finally:
        _weights_are_fixed.reset(token)


def have_kernels(*tensors: Tensor) -> bool:
    """Whether these tensors are worked on by compiled kernels: float32 on a CPU, with llvmlite installed.

    While torch traces, compiles or transforms functions, it is shown the reference. So it is under autocast: the slopes
    of splines need all digits.
    """
    real = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    single = all(t.dtype == torch.float32 for t in tensors)
    return real and single and _use_kernels.get() and kernels.available() and not _looked_into()


def _looked_into() -> bool:
    """Whether torch wants to see single operations: to compile, cast, trace, dispatch or transform them."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


class Radii(NamedTuple):
    """Where radial functions are evaluated: on every edge, or on the grid of their splines."""

    lengths: Tensor  # (n,), Å
    basis: Tensor  # (n, n_basis)
    envelope: Tensor  # (n, 1), one to zero at the cutoff


class Neighborhood:
    """The edges of a graph, ready for the sums of one forward pass.

    Args:
        graph: edges sorted by receiver.
        cutoff: of the graph.
        basis: lengths (n,) to radial functions (n, n_basis), evaluated once for all layers.
    """

    def __init__(self, graph: AtomGraph, cutoff: Cutoff, basis: Callable[[Tensor], Tensor]):
        self.vectors = graph.edge_vectors()  # (n_edges, 3), Å
        self.senders = graph.senders.long().contiguous()
        self.receivers = graph.receivers.long()
        self.n_atoms = graph.n_atoms
        self.cutoff = cutoff
        self.basis = basis
        self._bounds: dict[int, list[int]] = {}

    def sum(
        self,
        formula: EdgeFormula,
        filters: Callable[[Radii], Tensor],
        senders: Sequence[Tensor] = (),
        receivers: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """What all neighbours contribute to each atom: (n_atoms, components, channels) for each output.

        Args:
            formula: of one edge.
            filters: radial functions, (n, functions · channels) for n lengths. They must be zero from the cutoff on, as
                what is multiplied by `Radii.envelope` is.
            senders: features of the neighbours, (n_atoms, components, channels) each.
            receivers: features of the atom itself, likewise.
        """
        if have_kernels(self.vectors, *senders, *receivers):
            table = self._table(formula, filters)
            if have_kernels(table):
                return _Formula.apply(formula.kernels, self, self.vectors, table, *senders, *receivers)
        return self._reference(formula, filters(self.radii), senders, receivers)

    @functools.cached_property
    def grid(self) -> Grid:
        """Of the splines."""
        with torch.no_grad():
            return spline.grid(self.cutoff.radius, self.basis(self.vectors.new_ones(1)).shape[1])

    @functools.cached_property
    def lengths(self) -> Tensor:
        """Of the edges, in Å: (n_edges,)."""
        return torch.linalg.vector_norm(self.vectors, dim=1)

    @functools.cached_property
    def radii(self) -> Radii:
        """Where radial functions are evaluated on every edge."""
        return self._radii(self.lengths)

    @functools.cached_property
    def samples(self) -> Radii:
        """Where radial functions are evaluated on the grid of splines."""
        return self._radii(self.grid.samples(self.vectors.device))

    def _radii(self, lengths: Tensor) -> Radii:
        radii = Radii(lengths, self.basis(lengths), self.cutoff.envelope(lengths).unsqueeze(1))
        return Radii(*(x.to(self.vectors.dtype) for x in radii))

    def _table(self, formula: EdgeFormula, filters: Callable[[Radii], Tensor]) -> Tensor:
        """Spline coefficients of radial functions; inside `fixed_weights` kept for as long as the weights stay."""
        owner, basis = (getattr(f, "__self__", f) for f in (filters, self.basis))
        if not (_weights_are_fixed.get() and isinstance(owner, nn.Module) and isinstance(basis, nn.Module)):
            return spline.coefficients(filters(self.samples).unflatten(1, (formula.filters, -1)))
        weights = [w for module in (owner, basis) for w in (*module.parameters(), *module.buffers())]
        functions = [getattr(f, "__func__", None) for f in (filters, self.basis)]
        kept = _tables.setdefault(owner, {})
        key = (*functions, formula.filters, self.grid)
        known = kept.get(key)
        if known is None or not known.is_of(basis, weights):
            with torch.inference_mode(False), torch.no_grad():
                values = filters(self._radii(self.grid.samples(self.vectors.device)))
                table = spline.coefficients(values.unflatten(1, (formula.filters, -1)))
                known = kept[key] = _Table(table, weakref.ref(basis), [w.detach().clone() for w in weights])
        return known.coefficients

    def _reference(
        self, formula: EdgeFormula, values: Tensor, senders: Sequence[Tensor], receivers: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        filters = values.unflatten(1, (formula.filters, -1)).unbind(1)
        sender = [x for t in senders for x in t.index_select(0, self.senders).unbind(1)]
        receiver = [x for t in receivers for x in t.index_select(0, self.receivers).unbind(1)]
        directions = (self.vectors / self.lengths.unsqueeze(1)).unsqueeze(2).unbind(1)
        outputs = formula.of(sender, receiver, filters, directions, self.lengths.unsqueeze(1))
        _check(outputs, formula.outputs)
        # component by component, so that nothing is copied once more per edge
        sums = [x.new_zeros(self.n_atoms, x.shape[1]).index_add(0, self.receivers, x) for x in outputs]
        return _grouped(sums, formula.outputs)

    @functools.cached_property
    def starts(self) -> Tensor:
        """Where the edges of each atom begin, and the end of the last: (n_atoms + 1,).

        Raises `ValueError` for edges that are not sorted, and `IndexError` for such as have no atom.
        """
        if len(self.senders) != len(self.receivers) or len(self.vectors) != len(self.receivers):
            raise ValueError("the edges of a graph must have a sender and a receiver each")
        if not bool((self.receivers[1:] >= self.receivers[:-1]).all()):
            raise ValueError("the edges of a graph must be sorted by receiver")
        for atoms in (self.senders, self.receivers):
            if len(atoms) and not (int(atoms.min()) >= 0 and int(atoms.max()) < self.n_atoms):
                raise IndexError(f"the edges of a graph must join atoms from 0 to {self.n_atoms - 1}")
        counts = torch.bincount(self.receivers, minlength=self.n_atoms)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def bounds(self, parts: int) -> list[int]:
        """Cut the atoms into parts with about as many edges each."""
        if parts not in self._bounds:
            starts = self.starts.numpy()
            inner = np.searchsorted(starts, np.linspace(0, starts[-1], parts + 1)[1:-1])
            self._bounds[parts] = [0, *(int(i) for i in inner), self.n_atoms]
        return self._bounds[parts]


class _Table(NamedTuple):
    """Spline coefficients, and what they were computed from."""

    coefficients: Tensor
    basis: weakref.ref[nn.Module]
    weights: list[Tensor]

    def is_of(self, basis: nn.Module, weights: Sequence[Tensor]) -> bool:
        """Whether they are those of this basis and these weights, by value: what is done to `.data` shows nowhere."""
        pairs = zip(self.weights, weights, strict=False)
        return self.basis() is basis and len(self.weights) == len(weights) and all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class EdgeFormula:
    """What one neighbour contributes to an atom.

    Args:
        of: (sender, receiver, filters, direction, length) to the components of all outputs; `sender` and `receiver` are
            the components of the features of both atoms, `filters` the radial functions, `direction` the three
            components of the unit vector from receiver to sender, `length` that of the edge in Å.
        outputs: number of components of each output.
        filters: number of radial functions.
        senders, receivers: number of components of each tensor of features.
    """

    def __init__(
        self,
        of: Callable[..., Sequence[Any]],
        outputs: Sequence[int],
        filters: int,
        senders: Sequence[int] = (),
        receivers: Sequence[int] = (),
    ):
        self.of = of
        self.outputs = tuple(outputs)
        self.filters = filters
        features = [Array(f"senders{k}", "sender", n) for k, n in enumerate(senders)]
        features += [Array(f"receivers{k}", "receiver", n) for k, n in enumerate(receivers)]
        arrays = [Array("vectors", "edge", 3), Array("table", "table", filters), *features]

        def expressions() -> list[Expression]:
            x, y, z = _symbols(arrays[0])
            length = sqrt(x * x + y * y + z * z)
            direction = [v * (1.0 / length) for v in (x, y, z)]
            sender = [x for array in features if array.place == "sender" for x in _symbols(array)]
            receiver = [x for array in features if array.place == "receiver" for x in _symbols(array)]
            return list(of(sender, receiver, [radial(k, length) for k in range(filters)], direction, length))

        self.kernels = _Kernels(expressions, arrays, self.outputs)


class AtomFormula:
    """Numbers of one atom and channel computed from others: tensors (n, components, channels) to such tensors.

    Args:
        of: components of all inputs, in one sequence, to the components of all outputs.
        inputs, outputs: number of components of each.
    """

    def __init__(self, of: Callable[[Sequence[Any]], Sequence[Any]], inputs: Sequence[int], outputs: Sequence[int]):
        self.of = of
        self.outputs = tuple(outputs)
        arrays = [Array(f"atoms{k}", "receiver", n) for k, n in enumerate(inputs)]
        self.kernels = _Kernels(
            lambda: list(of([x for array in arrays for x in _symbols(array)])), arrays, self.outputs, over_edges=False
        )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if have_kernels(*inputs):
            return _Formula.apply(self.kernels, None, *inputs)
        outputs = self.of([x for t in inputs for x in t.unbind(1)])
        _check(outputs, self.outputs)
        return _grouped(outputs, self.outputs)


class _Kernels:
    """Kernels of a formula and of its first and second derivatives, compiled when first needed."""

    def __init__(
        self,
        expressions: Callable[[], list[Expression]],
        inputs: Sequence[Array],
        outputs: Sequence[int],
        over_edges: bool = True,
    ):
        self.make = expressions
        self.inputs = {array.name: array for array in inputs}
        self.outputs = [Array(f"outputs{k}", "receiver", n) for k, n in enumerate(outputs)]
        self.cotangents = {f"cotangents{k}": Array(f"cotangents{k}", "receiver", n) for k, n in enumerate(outputs)}
        self.arrays = {**self.inputs, **self.cotangents}
        self.arrays |= {f"{name}.tangent": a._replace(name=f"{name}.tangent") for name, a in self.inputs.items()}
        self.over_edges = over_edges
        self.compiled: dict[Any, Kernel] = {}

    @functools.cached_property
    def expressions(self) -> list[Expression]:
        expressions = self.make()
        _check(expressions, [array.components for array in self.outputs])
        return expressions

    def value(self, channels: int, grid: Grid | None) -> Kernel:
        """The formula itself."""

        def outputs() -> list[Output]:
            expressions = iter(self.expressions)
            return [Output(a, tuple(next(expressions) for _ in range(a.components))) for a in self.outputs]

        return self._kernel((), outputs, channels, grid)

    def gradient(self, given: tuple[str, ...], wanted: tuple[str, ...], channels: int, grid: Grid | None) -> Kernel:
        """Σ cotangent · output over the cotangents that are given, derived with respect to the arrays `wanted`."""
        return self._kernel((given, wanted), lambda: self._derived(self._first(given), wanted), channels, grid)

    def second(
        self,
        given: tuple[str, ...],
        tangents: tuple[str, ...],
        wanted: tuple[str, ...],
        channels: int,
        grid: Grid | None,
    ) -> Kernel:
        """Σ tangent · gradient, derived with respect to the arrays `wanted`, the cotangents among them."""

        def outputs() -> list[Output]:
            leaves = [x for name in tangents for x in _symbols(self.inputs[name])]
            directions = [x for name in tangents for x in _symbols(self.arrays[f"{name}.tangent"])]
            inner: dict[Expression, Expression] = {}
            for g, direction in zip(gradients(self._first(given), leaves), directions, strict=True):
                inner[g] = inner[g] + direction if g in inner else direction
            return self._derived(inner, wanted)

        return self._kernel((given, tangents, wanted), outputs, channels, grid)

    def _first(self, given: Sequence[str]) -> dict[Expression, Expression]:
        roots: dict[Expression, Expression] = {}
        expressions = iter(self.expressions)
        for name, array in self.cotangents.items():
            for cotangent in _symbols(array):
                x = next(expressions)
                if name in given:
                    roots[x] = roots[x] + cotangent if x in roots else cotangent
        return roots

    def _derived(self, of: dict[Expression, Expression], wanted: Sequence[str]) -> list[Output]:
        radials = [x for x in sort(of) if x.op == "radial"]
        leaves = {name: radials if name == "table" else _symbols(self.arrays[name]) for name in wanted}
        results = iter(gradients(of, [x for xs in leaves.values() for x in xs]))
        return [
            Output(self.arrays[name], tuple(next(results) for _ in xs), tuple(radials) if name == "table" else ())
            for name, xs in leaves.items()
        ]

    def _kernel(
        self, kind: tuple[Any, ...], make: Callable[[], list[Output]], channels: int, grid: Grid | None
    ) -> Kernel:
        key = (*kind, channels, grid)
        if key not in self.compiled:
            with _compiling:
                if key not in self.compiled:  # another thread may have been first
                    self.compiled[key] = self._compile(make(), channels, grid)
        return self.compiled[key]

    def _compile(self, outputs: list[Output], channels: int, grid: Grid | None) -> Kernel:
        used = sort(x for output in outputs for x in (*output.values, *(r.args[0] for r in output.radials)))
        names = {x.value[0] for x in used if x.op == "input"} | {"table" for x in used if x.op == "radial"}
        inputs = tuple(array for name, array in self.arrays.items() if name in names)
        return Kernel(inputs, tuple(outputs), channels, grid, self.over_edges)


class _Formula(torch.autograd.Function):
    """A formula summed over the neighbours of each atom, or (without edges) of the atoms themselves."""

    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, edges: Neighborhood | None, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.edges = kernels, edges
        ctx.save_for_backward(*inputs)
        kernel = kernels.value(inputs[-1].shape[2], _grid(edges))
        return tuple(_run(kernel, dict(zip(kernels.inputs, inputs, strict=True)), edges).values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        given = {n: t for n, t in zip(ctx.kernels.cotangents, cotangents, strict=True) if t is not None}
        wanted = tuple(name for name, need in zip(ctx.kernels.inputs, _needed(ctx)[2:], strict=True) if need)
        arguments = (*given.values(), *ctx.saved_tensors)
        return None, None, *_Gradient.apply(ctx.kernels, ctx.edges, tuple(given), wanted, *arguments)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: _Kernels,
        edges: Neighborhood | None,
        given: tuple[str, ...],
        wanted: tuple[str, ...],
        *tensors: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.edges, ctx.given = kernels, edges, given
        ctx.save_for_backward(*tensors)
        results: dict[str, Tensor] = {}
        if given and wanted:
            kernel = kernels.gradient(given, wanted, tensors[-1].shape[2], _grid(edges))
            results = _run(kernel, dict(zip((*given, *kernels.inputs), tensors, strict=True)), edges)
        return tuple(results.get(name) for name in kernels.inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        kernels, edges, names = ctx.kernels, ctx.edges, (*ctx.given, *ctx.kernels.inputs)
        tensors = dict(zip(names, ctx.saved_tensors, strict=True))
        along = {name: t for name, t in zip(kernels.inputs, tangents, strict=True) if t is not None}
        if "table" in along:
            raise NotImplementedError("gradients of weights cannot be differentiated again: use messages.reference()")
        wanted = tuple(name for name, need in zip(names, _needed(ctx)[4:], strict=True) if need)
        results: dict[str, Tensor] = {}
        if along and wanted:
            channels = ctx.saved_tensors[-1].shape[2]
            kernel = kernels.second(ctx.given, tuple(along), wanted, channels, _grid(edges))
            results = _run(kernel, {**tensors, **{f"{name}.tangent": t for name, t in along.items()}}, edges)
        return None, None, None, None, *(results.get(name) for name in names)


def _run(kernel: Kernel, tensors: dict[str, Tensor], edges: Neighborhood | None) -> dict[str, Tensor]:
    """Results of a kernel by the name of their array."""
    n_atoms = edges.n_atoms if edges is not None else len(next(iter(tensors.values())))
    results = kernel(edges, [tensors[array.name] for array in kernel.inputs], n_atoms)
    return {output.array.name: result for output, result in zip(kernel.outputs, results, strict=True)}


def _grid(edges: Neighborhood | None) -> Grid | None:
    return None if edges is None else edges.grid


def _symbols(array: Array) -> list[Expression]:
    return [symbol(array.name, k, per_edge=array.place == "edge") for k in range(array.components)]


def _check(outputs: Sequence[Any], sizes: Sequence[int]) -> None:
    if len(outputs) != sum(sizes):
        raise ValueError(f"a formula gave {len(outputs)} components, but its outputs have {sum(sizes)}")


def _grouped(components: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    parts = iter(components)
    return tuple(torch.stack([next(parts) for _ in range(n)], dim=1) for n in sizes)


def _needed(ctx: Any) -> list[bool]:
    """Which inputs of a function have a gradient that this backward pass will use."""
    nodes = iter(node for node, _ in ctx.next_functions if node is not None)
    return [wanted and _will_run(next(nodes)) for wanted in ctx.needs_input_grad]


def _will_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):  # a leaf, or a torch without this function
        return True
