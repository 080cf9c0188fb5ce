"""Formulas compiled for this CPU: one pass over the edges, nothing stored per edge and channel.

The loops are written as LLVM assembly and compiled in memory by llvmlite; no compiler need be installed. An edge is
worked on while what it needs is in the registers: shared numbers first, then blocks of channels as vectors. Sums over
channels that a formula uses again split its channel loop in two.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .expression import Expression, sort, symbol
from .spline import SPLINES, Grid

Place = Literal["receiver", "sender", "edge", "table"]
FLAGS = "reassoc nsz arcp contract"
WORTH_A_THREAD = 2_000_000  # operations, some tenth of a millisecond


class Array(NamedTuple):
    """An array that a kernel reads or adds to: (n, components, channels), or (n_edges, components)."""

    name: str
    place: Place
    components: int


class Output(NamedTuple):
    """What is added to an array, component by component."""

    array: Array
    values: tuple[Expression, ...]
    radials: tuple[Expression, ...] = ()  # of a table: the radial function that each value is the cotangent of


@dataclass
class Kernel:
    """A compiled pass over the edges (or over the rows alone, for formulas of one atom)."""

    inputs: tuple[Array, ...]
    outputs: tuple[Output, ...]
    channels: int
    grid: Grid | None
    over_edges: bool = True

    def __post_init__(self) -> None:
        source = _Source(self.inputs, self.outputs, self.channels, self.grid, self.over_edges)
        self._operations = len(source.order)
        self._function, self._parallel = _compiled(source.text(), 2 + len(self.inputs) + len(self.outputs))

    def __call__(self, edges: Any, tensors: Sequence[Tensor], n_rows: int) -> list[Tensor]:
        """Run over all edges.

        Sums over senders and radial tables take as many copies of their result as there are threads.

        Args:
            edges: `senders` and `starts` of the edges, and `bounds` that cut the atoms into parts with equal work; None
                for rows alone.
            tensors: one float32 tensor per input.
            n_rows: atoms.

        Raises:
            ValueError: for tensors of other shapes, before any memory is touched.
            TypeError: for tensors of another type or device.
        """
        n_edges = 0 if edges is None else len(edges.senders)
        counts = {"edge": n_edges, "table": self.grid.n_coefficients if self.grid else 0}
        for array, tensor in zip(self.inputs, tensors, strict=True):
            shape = self._shape(array, counts.get(array.place, n_rows))
            if tensor.shape != shape:
                raise ValueError(f"'{array.name}' has shape {tuple(tensor.shape)}, but must have {shape}")
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise TypeError(f"'{array.name}' is {tensor.dtype} on {tensor.device}, but must be float32 on the CPU")
        work = (n_edges if self.over_edges else n_rows) * self.channels * self._operations
        threads = min(torch.get_num_threads(), 1 + work // WORTH_A_THREAD)
        bounds = [0, n_rows]
        if threads > 1:
            bounds = edges.bounds(threads) if edges is not None else [n_rows * k // threads for k in range(threads + 1)]
        shapes = [self._shape(output.array, counts.get(output.array.place, n_rows)) for output in self.outputs]
        results, own = [], []
        for output, shape in zip(self.outputs, shapes, strict=True):
            shared = threads > 1 and output.array.place in ("sender", "table")  # each thread adds to its own
            empty = output.array.place == "edge" or not self.over_edges
            make = torch.empty if empty else torch.zeros
            result = make((threads, *shape) if shared else shape, dtype=torch.float32)
            results.append(result)
            own.append(shared)
        if edges is not None and not edges.starts.dtype == edges.senders.dtype == torch.int64:
            raise TypeError("senders and starts of edges must be int64")
        pointers = [0, 0] if edges is None else [edges.starts.data_ptr(), edges.senders.data_ptr()]
        kept = [t.contiguous() for t in tensors]
        pointers += [t.data_ptr() for t in kept]
        outs = [
            [(r[part] if o else r).data_ptr() for r, o in zip(results, own, strict=True)] for part in range(threads)
        ]
        if threads == 1:
            self._function(*bounds, *pointers, *outs[0])
        elif (team := _team()) is not None and not _forked:
            words = [threads, *bounds, *(word for part in outs for word in (*pointers, *part))]
            team.run(self._parallel, (ctypes.c_int64 * len(words))(*words), threads, 0)
        else:
            parts = zip(bounds, bounds[1:], outs, strict=False)
            jobs = [_pool(threads).submit(self._function, a, b, *pointers, *part) for a, b, part in parts]
            for job in jobs:
                job.result()
        return [r.sum(0) if o else r for r, o in zip(results, own, strict=True)]

    def _shape(self, array: Array, n: int) -> tuple[int, ...]:
        return (n, array.components) if array.place == "edge" else (n, array.components, self.channels)


@functools.cache
def available() -> bool:
    """Whether kernels can be compiled here; without them the reference does everything.

    Warns when llvmlite is installed and does not do what it should.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return False
    try:
        row = Array("x", "receiver", 1)
        trial = Kernel((row,), (Output(row, (symbol("x", 0) * 2.0,)),), channels=17, grid=None, over_edges=False)
        (doubled,) = trial(None, [torch.ones(1, 1, 17)], 1)
        if torch.equal(doubled, torch.full((1, 1, 17), 2.0)):
            return True
        reason = "its results are wrong"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    warnings.warn(
        f"llvmlite cannot compile here ({reason}): everything is computed by plain torch, several times slower. "
        "Install another version of llvmlite",
        stacklevel=2,
    )
    return False


class Team(NamedTuple):
    """OpenMP's threads: those of torch, so that neither waits for cores on which the other's spin."""

    run: Any  # (function, data, threads, 0): the function is called by each thread
    thread: int  # addresses of functions without argument: which thread this is,
    threads: int  # and how many there are


@functools.cache
def _team() -> Team | None:
    """The OpenMP library that torch has loaded, if it is GCC's."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            which = (library.omp_get_thread_num, library.omp_get_num_threads)
            return Team(library.GOMP_parallel, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in which))
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for where torch has another OpenMP."""
    return ThreadPoolExecutor(threads)


def _after_fork() -> None:
    """Threads do not survive a fork, and OpenMP waits for its own."""
    global _forked
    _forked = True
    _pool.cache_clear()


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _machine() -> Any:
    """Target machine of this CPU; an engine owns the one it is given."""
    import llvmlite.binding as llvm  # not before it is needed: imports should be quick

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )


@functools.cache
def vector_width() -> int:
    """Numbers that one instruction works on."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


_engines: list[Any] = []  # keep compiled code alive


def _compiled(source: str, n_arrays: int) -> tuple[Any, int]:
    """The kernel as a function of first row, last row and arrays; and the address of the one for a team of threads."""
    import llvmlite.binding as llvm

    machine = _machine()
    if (team := _team()) is not None:
        llvm.add_symbol("omp_get_thread_num", team.thread)
        llvm.add_symbol("omp_get_num_threads", team.threads)
        source += _for_a_team(n_arrays)
    module = llvm.parse_assembly(source)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.slp_vectorization = False
    options.loop_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * n_arrays)
    parallel = engine.get_function_address("parallel") if team is not None else 0
    return kind(engine.get_function_address("kernel")), int(parallel)


def _for_a_team(n_arrays: int) -> str:
    """What each thread does: the parts that are its own, of [parts, bounds (parts + 1), arrays of each part]."""
    loads = [
        f"  %at{k} = add i64 %first, {k}\n  %p{k} = getelementptr i64, ptr %work, i64 %at{k}\n"
        f"  %a{k} = load ptr, ptr %p{k}\n"
        for k in range(n_arrays)
    ]
    arrays = "".join(f", ptr %a{k}" for k in range(n_arrays))
    return f"""
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
define void @parallel(ptr %work) {{
entry:
  %thread = call i32 @omp_get_thread_num()
  %own = sext i32 %thread to i64
  %threads = call i32 @omp_get_num_threads()
  %stride = sext i32 %threads to i64
  %parts = load i64, ptr %work
  %bounds = getelementptr i64, ptr %work, i64 1
  %arrays = add i64 %parts, 2
  br label %test
test:
  %part = phi i64 [ %own, %entry ], [ %next, %body ]
  %more = icmp slt i64 %part, %parts
  br i1 %more, label %body, label %done
body:
  %pb = getelementptr i64, ptr %bounds, i64 %part
  %begin = load i64, ptr %pb
  %pe = getelementptr i64, ptr %pb, i64 1
  %end = load i64, ptr %pe
  %skip = mul i64 %part, {n_arrays}
  %first = add i64 %arrays, %skip
{"".join(loads)}  call void @kernel(i64 %begin, i64 %end{arrays})
  %next = add i64 %part, %stride
  br label %test
done:
  ret void
}}
"""


class _Source:
    """LLVM assembly of one kernel."""

    def __init__(
        self, inputs: Sequence[Array], outputs: Sequence[Output], channels: int, grid: Grid | None, over_edges: bool
    ):
        self.inputs = {array.name: array for array in inputs}
        self.outputs = outputs
        self.channels = channels
        self.grid = grid
        self.over_edges = over_edges
        self.lines: list[str] = []
        self.count = 0
        tables = [array for array in (*inputs, *(o.array for o in outputs)) if array.place == "table"]
        self.functions = tables[0].components if tables else 0

        roots = [value for output in outputs for value in output.values]
        spread = [radial for output in outputs for radial in output.radials]
        self.order = sort([*roots, *(radial.args[0] for radial in spread)])
        self.orders: dict[Expression, set[int]] = {}  # derivatives that are needed of the splines at a length
        for x in [x for x in self.order if x.op == "radial"] + spread:
            self.orders.setdefault(x.args[0], set()).add(x.value[1])
        self.phase: dict[Expression, int] = {}
        for x in self.order:
            below = max((self.phase[a] for a in x.args), default=0)
            self.phase[x] = below + (x.op == "total")
        heads = {x.value for x in self.order if x.op == "head_total"}
        if any(channels % n for n in heads) or len(heads) > 1:
            raise ValueError(f"{channels} channels cannot be divided among {', '.join(map(str, heads))} heads")
        self.width = channels // heads.pop() if heads else vector_width()  # a block of channels holds a whole head
        self.scalars: dict[Expression, str] = {}
        self.splines: dict[Expression, _Spline] = {}

    # -- text ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        arrays = [*self.inputs, *(o.array.name + ".out" for o in self.outputs)]
        arguments = ", ".join(f"ptr noalias %{name}" for name in arrays)
        head = f"define void @kernel(i64 %begin, i64 %end, ptr noalias %starts, ptr noalias %sender_of, {arguments}) {{"
        self._loop("row", "%begin", "%end", self._row)
        return "\n".join([head, "entry:", *self.lines, "  ret void", "}", *self._declarations()])

    def _declarations(self) -> list[str]:
        widths = sorted({4, 8, 16, self.width})
        kinds = ["float", *[f"<{w} x float>" for w in widths]]
        names = ["f32", *[f"v{w}f32" for w in widths]]
        lines = []
        for kind, name in zip(kinds, names, strict=True):
            lines.append(f"declare {kind} @llvm.sqrt.{name}({kind})")
            for function in ("minnum", "maxnum"):
                lines.append(f"declare {kind} @llvm.{function}.{name}({kind}, {kind})")
            lines.append(f"declare {kind} @llvm.floor.{name}({kind})")
            lines.append(f"declare {kind} @llvm.fabs.{name}({kind})")
            if kind != "float":
                lines.append(f"declare float @llvm.vector.reduce.fadd.{name}(float, {kind})")
        return lines

    def _row(self, row: str) -> None:
        if not self.over_edges:
            self._body(row, row, row)
            return
        begin = self._load("i64", "%starts", row)
        end = self._load("i64", "%starts", self._emit(f"add i64 {row}, 1"))
        self._loop("edge", begin, end, lambda edge: self._body(row, self._load("i64", "%sender_of", edge), edge))

    def _body(self, row: str, sender: str, edge: str) -> None:
        index: dict[str, str] = {"receiver": row, "sender": sender, "edge": edge}
        self.scalars = {}
        self.splines = {}
        last = max(self.phase.values(), default=0)
        for phase in range(last + 1):
            self._shared(phase, index)
            sums = [x for x in self.order if x.op == "total" and self.phase[x.args[0]] == phase]
            self._channels(phase, sums, index)
        for output in self.outputs:
            if output.array.place == "edge":
                base = self._emit(f"mul i64 {index['edge']}, {output.array.components}")
                for k, x in enumerate(output.values):
                    place = self._emit(f"add i64 {base}, {k}")
                    self._store("float", self.scalars[x], f"%{output.array.name}.out", place)

    def _shared(self, phase: int, index: dict[str, str]) -> None:
        """Numbers of the whole edge that depend on `phase` sums over channels."""
        for x in self.order:
            if not x.per_edge or self.phase[x] != phase or x.op == "total":
                continue
            if x.op == "input":
                array, k = x.value
                base = self._emit(f"mul i64 {index['edge']}, {self.inputs[array].components}")
                self.scalars[x] = self._load("float", f"%{array}", self._emit(f"add i64 {base}, {k}"))
            else:
                self.scalars[x] = self._operation(x, [self.scalars[a] for a in x.args], 1)
            if x in self.orders:
                self.splines[x] = self._spline(self.scalars[x], self.orders[x])

    def _channels(self, phase: int, sums: Sequence[Expression], index: dict[str, str]) -> None:
        """One loop over blocks of channels; what is left over goes in smaller blocks."""
        targets: list[tuple[Output, int]] = []
        for output in self.outputs:
            if output.array.place == "edge":
                continue
            targets += [(output, k) for k, x in enumerate(output.values) if self.phase[x] == phase]
        if not targets and not sums:
            return
        parts: dict[Expression, list[str]] = {x: [] for x in sums}
        start, width = 0, self.width
        while start < self.channels:
            n = (self.channels - start) // width
            if n:
                for x, value in zip(sums, self._blocks(start, n, width, targets, sums, index), strict=True):
                    parts[x].append(value)
                start += n * width
            width = width // 2 if width > 4 else 1
        for x in sums:
            self.scalars[x] = functools.reduce(lambda a, b: self._emit(f"fadd {FLAGS} float {a}, {b}"), parts[x])

    def _blocks(
        self,
        start: int,
        n: int,
        width: int,
        targets: Sequence[tuple[Output, int]],
        sums: Sequence[Expression],
        index: dict[str, str],
    ) -> list[str]:
        kind = _kind(width)
        accumulators = [self._emit_entry(f"alloca {kind}") for _ in sums]
        for a in accumulators:
            self.lines.append(
                f"  store {kind} zeroinitializer, ptr {a}" if width > 1 else f"  store float 0.0, ptr {a}"
            )

        def body(block: str) -> None:
            channel = self._emit(f"add i64 {self._emit(f'mul i64 {block}, {width}')}, {start}")
            values: dict[Expression, str] = {}

            def value(x: Expression) -> str:
                if x not in values:
                    for y in sort([x]):
                        if y not in values:
                            values[y] = self._value(y, values, channel, width, index)
                return values[x]

            for a, x in zip(accumulators, sums, strict=True):
                before = self._emit(f"load {kind}, ptr {a}")
                after = self._emit(f"fadd {FLAGS} {kind} {before}, {value(x.args[0])}")
                self.lines.append(f"  store {kind} {after}, ptr {a}")
            spread: dict[int, list[tuple[Expression, str]]] = {}
            for output, k in targets:
                if output.radials:
                    radial = output.radials[k]
                    spread.setdefault(radial.value[0], []).append((radial, value(output.values[k])))
                else:
                    self._add_to(output.array, k, value(output.values[k]), channel, width, index)
            for function, terms in spread.items():
                self._add_to_table(function, terms, channel, width)

        self._loop("block", "0", str(n), body)
        results = []
        for a in accumulators:
            v = self._emit(f"load {kind}, ptr {a}")
            results.append(self._sum_of(v, width))
        return results

    # -- values --------------------------------------------------------------------------------------------------

    def _value(self, x: Expression, values: dict[Expression, str], channel: str, width: int, index: Any) -> str:
        if x.per_edge:
            return self._splat(self.scalars[x], width) if x in self.scalars else ""
        if x.op == "input":
            name, k = x.value
            array = self.inputs[name]
            return self._load_block(f"%{name}", index[array.place], array.components, k, channel, width)
        if x.op == "radial":
            return self._radial(x, channel, width)
        return self._operation(x, [values[a] for a in x.args], width)

    def _operation(self, x: Expression, a: Sequence[str], width: int) -> str:
        kind, name = _kind(width), "f32" if width == 1 else f"v{width}f32"
        if x.op == "constant":
            return _number(x.value, width)
        if x.op in ("add", "mul"):
            return self._emit(f"f{x.op} {FLAGS} {kind} {a[0]}, {a[1]}")
        if x.op == "inverse":
            return self._emit(f"fdiv {FLAGS} {kind} {_number(1.0, width)}, {a[0]}")
        if x.op == "sqrt":
            return self._emit(f"call {FLAGS} {kind} @llvm.sqrt.{name}({kind} {a[0]})")
        if x.op == "sigmoid":
            e = self._exp(self._emit(f"fsub {kind} {_number(0.0, width)}, {a[0]}"), width)
            return self._emit(
                f"fdiv {FLAGS} {kind} {_number(1.0, width)}, {self._emit(f'fadd {kind} {e}, {_number(1.0, width)}')}"
            )
        if x.op == "softplus":
            return self._softplus(a[0], width)
        if x.op == "head_total":
            if width == 1:
                return a[0]
            return self._splat(self._sum_of(a[0], width), width)
        raise AssertionError(x.op)

    def _sum_of(self, vector: str, width: int) -> str:
        if width == 1:
            return vector
        return self._emit(
            f"call {FLAGS} float @llvm.vector.reduce.fadd.v{width}f32(float 0.0, {_kind(width)} {vector})"
        )

    def _exp(self, x: str, width: int) -> str:
        """exp by 2^n · 2^f with a polynomial for f ∈ [-½, ½]."""
        kind, name, integers = (
            _kind(width),
            "f32" if width == 1 else f"v{width}f32",
            "i32" if width == 1 else f"<{width} x i32>",
        )
        for test, limit in (("ogt", 88.0), ("olt", -87.0)):  # what is not a number stays so
            beyond = self._emit(f"fcmp {test} {kind} {x}, {_number(limit, width)}")
            flags = "i1" if width == 1 else f"<{width} x i1>"
            x = self._emit(f"select {flags} {beyond}, {kind} {_number(limit, width)}, {kind} {x}")
        t = self._emit(f"fmul {kind} {x}, {_number(1.4426950408889634, width)}")
        n = self._emit(
            f"call {kind} @llvm.floor.{name}({kind} {self._emit(f'fadd {kind} {t}, {_number(0.5, width)}')})"
        )
        hi = self._emit(f"fmul {kind} {n}, {_number(-0.693359375, width)}")
        r = self._emit(f"fadd {kind} {x}, {hi}")
        r = self._emit(
            f"fadd contract {kind} {r}, {self._emit(f'fmul contract {kind} {n}, {_number(2.12194440e-4, width)}')}"
        )
        p = _number(1 / 5040, width)
        for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            p = self._emit(f"fadd contract {kind} {self._emit(f'fmul contract {kind} {p}, {r}')}, {_number(c, width)}")
        i = self._emit(f"fptosi {kind} {n} to {integers}")
        splat = "127" if width == 1 else "<" + ", ".join(["i32 127"] * width) + ">"
        shift = "23" if width == 1 else "<" + ", ".join(["i32 23"] * width) + ">"
        i = self._emit(f"shl {integers} {self._emit(f'add {integers} {i}, {splat}')}, {shift}")
        return self._emit(f"fmul {kind} {p}, {self._emit(f'bitcast {integers} {i} to {kind}')}")

    def _softplus(self, x: str, width: int) -> str:
        """max(x, 0) + log(1 + exp(-|x|)), the logarithm by 2 artanh(y / (2 + y))."""
        kind, name = _kind(width), "f32" if width == 1 else f"v{width}f32"
        size = self._emit(f"call {kind} @llvm.fabs.{name}({kind} {x})")
        y = self._exp(self._emit(f"fsub {kind} {_number(0.0, width)}, {size}"), width)
        s = self._emit(f"fdiv {kind} {y}, {self._emit(f'fadd {kind} {y}, {_number(2.0, width)}')}")
        s2 = self._emit(f"fmul {kind} {s}, {s}")
        p = _number(2 / 13, width)
        for c in (2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0):
            p = self._emit(f"fadd contract {kind} {self._emit(f'fmul contract {kind} {p}, {s2}')}, {_number(c, width)}")
        positive = self._emit(f"call {kind} @llvm.maxnum.{name}({kind} {x}, {kind} {_number(0.0, width)})")
        return self._emit(f"fadd contract {kind} {positive}, {self._emit(f'fmul contract {kind} {p}, {s}')}")

    # -- splines -------------------------------------------------------------------------------------------------

    def _spline(self, length: str, orders: set[int]) -> _Spline:
        assert self.grid is not None
        t = self._emit(f"fsub float {length}, {_number(self.grid.start, 1)}")
        t = self._emit(f"fmul float {t}, {_number(1 / self.grid.step, 1)}")
        low = self._emit(f"call float @llvm.maxnum.f32(float {t}, float 0.0)")
        low = self._emit(f"call float @llvm.minnum.f32(float {low}, float {_number(self.grid.intervals - 1, 1)})")
        low = self._emit(f"call float @llvm.floor.f32(float {low})")
        first = self._emit(f"fptosi float {low} to i64")
        x = self._emit(f"fsub float {t}, {low}")
        beyond = self._emit(f"fcmp ogt float {x}, 1.0")
        x = self._emit(f"select i1 {beyond}, float 1.0, float {x}")
        row = self._emit(f"mul i64 {first}, {self.functions * self.channels}")
        return _Spline(row, {order: self._weights(x, order) for order in orders})

    def _weights(self, x: str, order: int) -> list[str]:
        """The four B-splines, or their derivatives, by Horner's rule."""
        assert self.grid is not None
        values = []
        for polynomial in SPLINES:
            derived = list(polynomial)
            for _ in range(order):
                derived = [k * c / self.grid.step for k, c in enumerate(derived)][1:]
            value = _number(derived[-1], 1)
            for c in reversed(derived[:-1]):
                value = self._emit(f"fmul contract float {value}, {x}")
                value = self._emit(f"fadd contract float {value}, {_number(c, 1)}")
            values.append(value)
        return values

    def _radial(self, x: Expression, channel: str, width: int) -> str:
        function, order = x.value
        spline, kind = self.splines[x.args[0]], _kind(width)
        result = ""
        for k, weight in enumerate(spline.weights[order]):
            block = self._table_block("%table", spline, k, function, channel, width)
            loaded = self._emit(f"load {kind}, ptr {block}, align 4")
            term = self._emit(f"fmul contract {kind} {loaded}, {self._splat(weight, width)}")
            result = self._emit(f"fadd contract {kind} {result}, {term}") if result else term
        return result

    def _table_block(self, name: str, spline: _Spline, k: int, function: int, channel: str, width: int) -> str:
        offset = (k * self.functions + function) * self.channels
        place = self._emit(f"add i64 {self._emit(f'add i64 {spline.row}, {channel}')}, {offset}")
        return self._emit(f"getelementptr float, ptr {name}, i64 {place}")

    def _add_to_table(self, function: int, terms: Sequence[tuple[Expression, str]], channel: str, width: int) -> None:
        kind = _kind(width)
        for k in range(4):
            pointer = self._table_block("%table.out", self.splines[terms[0][0].args[0]], k, function, channel, width)
            value = self._emit(f"load {kind}, ptr {pointer}, align 4")
            for radial, cotangent in terms:
                weight = self.splines[radial.args[0]].weights[radial.value[1]][k]
                term = self._emit(f"fmul contract {kind} {cotangent}, {self._splat(weight, width)}")
                value = self._emit(f"fadd contract {kind} {value}, {term}")
            self.lines.append(f"  store {kind} {value}, ptr {pointer}, align 4")

    # -- memory and control --------------------------------------------------------------------------------------

    def _add_to(self, array: Array, k: int, value: str, channel: str, width: int, index: Any) -> None:
        kind = _kind(width)
        pointer = self._block(f"%{array.name}.out", index[array.place], array.components, k, channel)
        if self.over_edges:
            before = self._emit(f"load {kind}, ptr {pointer}, align 4")
            value = self._emit(f"fadd contract {kind} {before}, {value}")
        self.lines.append(f"  store {kind} {value}, ptr {pointer}, align 4")

    def _block(self, base: str, row: str, components: int, k: int, channel: str) -> str:
        place = self._emit(f"mul i64 {row}, {components * self.channels}")
        place = self._emit(f"add i64 {place}, {channel}")
        place = self._emit(f"add i64 {place}, {k * self.channels}")
        return self._emit(f"getelementptr float, ptr {base}, i64 {place}")

    def _load_block(self, base: str, row: str, components: int, k: int, channel: str, width: int) -> str:
        return self._emit(f"load {_kind(width)}, ptr {self._block(base, row, components, k, channel)}, align 4")

    def _load(self, kind: str, base: str, place: str) -> str:
        return self._emit(f"load {kind}, ptr {self._emit(f'getelementptr {kind}, ptr {base}, i64 {place}')}")

    def _store(self, kind: str, value: str, base: str, place: str) -> None:
        self.lines.append(f"  store {kind} {value}, ptr {self._emit(f'getelementptr {kind}, ptr {base}, i64 {place}')}")

    def _splat(self, scalar: str, width: int) -> str:
        if width == 1:
            return scalar
        one = self._emit(f"insertelement <{width} x float> poison, float {scalar}, i32 0")
        return self._emit(
            f"shufflevector <{width} x float> {one}, <{width} x float> poison, <{width} x i32> zeroinitializer"
        )

    def _loop(self, name: str, begin: str, end: str, body: Callable[[str], None]) -> None:
        self.count += 1
        label = f"{name}{self.count}"
        before = self._emit_entry("alloca i64")
        self.lines += [f"  store i64 {begin}, ptr {before}", f"  br label %{label}.test", f"{label}.test:"]
        i = self._emit(f"load i64, ptr {before}")
        more = self._emit(f"icmp slt i64 {i}, {end}")
        self.lines += [f"  br i1 {more}, label %{label}.body, label %{label}.done", f"{label}.body:"]
        body(i)
        following = self._emit(f"add i64 {i}, 1")
        self.lines += [f"  store i64 {following}, ptr {before}", f"  br label %{label}.test", f"{label}.done:"]

    def _emit(self, instruction: str) -> str:
        self.count += 1
        name = f"%v{self.count}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def _emit_entry(self, instruction: str) -> str:
        """At the start of the function, where allocas become registers."""
        self.count += 1
        name = f"%v{self.count}"
        self.lines.insert(0, f"  {name} = {instruction}")
        return name


@dataclass
class _Spline:
    """Where a length falls in the table, and the weights of the four rows there by order of derivative."""

    row: str
    weights: dict[int, list[str]]


def _kind(width: int) -> str:
    return "float" if width == 1 else f"<{width} x float>"


def _number(value: float, width: int) -> str:
    bits = struct.pack(">d", float(np.float32(value))).hex().upper()
    if width == 1:
        return f"0x{bits}"
    return "<" + ", ".join([f"float 0x{bits}"] * width) + ">"
