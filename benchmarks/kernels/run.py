"""PaiNN's message and its first two derivatives, by every means that could fuse it on a processor.

Needs `pip install numba warp-lang` beside torch, and g++ for inductor. Takes five to eight minutes; `--quick`
measures three rounds and keeps nothing. `--also module:function` adds an alternative with the signature of `plain`.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import fused
import torch
from common import FIRST, SECOND, C, E, Graph, Message, N, differentiable, inputs, outputs_of_second
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

RESULTS = Path(__file__).with_name("results.json")
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}  # freed pages are reused
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process at once: peaks are those of live tensors
NAMES = ("plain", "chunks of 1k", "chunks of 2k", "chunks of 4k", "inductor", "warp", "numba")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="three rounds; results are only printed")
    parser.add_argument("--also", action="append", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [*NAMES, *options.also]
    if options.worker:
        torch.set_num_threads(1)
        print(json.dumps(times(names, options.rounds) if options.worker == "times" else peaks(options.worker)))
        return

    rounds = 3 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as cache:  # every compilation is a first one, in the first worker

        def worker(what: str, settings: dict[str, str]) -> Any:
            command = [sys.executable, __file__, "--worker", what, "--rounds", str(rounds)]
            command += [x for name in options.also for x in ("--also", name)]
            caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "WARP_CACHE_PATH": cache, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, env=os.environ | caches | settings, stdout=subprocess.PIPE, check=True)
            return json.loads(run.stdout.splitlines()[-1])

        results = {
            "date": date.today().isoformat(),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": 1},
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "numba", "llvmlite", "warp-lang")},
            "ms": worker("times", {}),
            "ms_pages_kept": worker("times", KEEP),
            "peak_mb": {name: worker(name, RETURN) for name in names},
        }
    print(json.dumps(results, indent=1))
    print(table(results))
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


# 1. Plain torch


def plain(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
    """Each product of the formula is a tensor over all edges."""
    ds, b, c = (phi.index_select(0, graph.senders) * W).chunk(3, dim=1)
    dv = b.unsqueeze(1) * u.unsqueeze(2) + c.unsqueeze(1) * v.index_select(0, graph.senders)
    zeros = phi.new_zeros(len(phi), 4, C)
    return zeros[:, 0].index_add(0, graph.receivers, ds), zeros[:, 1:].index_add(0, graph.receivers, dv)


def splines(x: Tensor) -> tuple[Tensor, Tensor]:
    """First knot and the four cubic B-splines at x."""
    first = x.floor()
    t = x - first
    b = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]
    return first.long(), torch.stack(b, dim=1) / 6


def plain_spline(phi: Tensor, v: Tensor, table: Tensor, x: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
    first, b = splines(x)
    W = sum(b[:, k : k + 1] * table.index_select(0, first + k) for k in range(4))
    return plain(phi, v, W, u, graph)


# 2. Chunks of edges that stay in cache, computed again in the derivatives


def edge_gradients(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, gs: Tensor, gv: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one chunk; all arguments are gathered to its edges."""
    g = torch.cat([gs, (gv * u.unsqueeze(2)).sum(1), (gv * v).sum(1)], dim=1)
    _, b, c = (phi * W).chunk(3, dim=1)
    return W * g, c.unsqueeze(1) * gv, phi * g, (gv * b.unsqueeze(1)).sum(2)


def chunked(size: int) -> Message:
    """Custom functions over chunks of `size` edges."""
    chunks = [slice(start, start + size) for start in range(0, E, size)]

    def forward(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        ds, dv = phi.new_zeros(N, C), torch.zeros_like(v)
        for edges in chunks:
            i, j = graph.receivers[edges], graph.senders[edges]
            a, b, c = phi.index_select(0, j).mul_(W[edges]).chunk(3, dim=1)
            along_vector = v.index_select(0, j).mul_(c.unsqueeze(1))
            dv.index_add_(0, i, along_vector.addcmul_(b.unsqueeze(1), u[edges].unsqueeze(2)))
            ds.index_add_(0, i, a)
        return ds, dv

    def backward(*arrays: Any) -> list[Tensor]:
        *tensors, graph = arrays
        result = [torch.zeros_like(x) for x in tensors[:4]]
        for edges in chunks:
            i, j = graph.receivers[edges], graph.senders[edges]
            scatter(edge_gradients(*gather(tensors, i, j, edges)), result, i, j, edges)
        return result

    def second(*arrays: Any) -> list[Tensor | None]:
        *tensors, graph = arrays
        tensors, h = tensors[:6], tensors[6:]
        full = h[0] is not None
        result = outputs_of_second(full, *tensors)
        for edges in chunks:
            i, j = graph.receivers[edges], graph.senders[edges]
            leaves = [x.detach().requires_grad_() for x in gather(tensors, i, j, edges)]
            with torch.enable_grad():
                values = edge_gradients(*leaves)[0 if full else 3 :]
            weights = gather(h, i, j, edges) if full else [h[3][edges]]
            scatter(torch.autograd.grad(values, leaves, weights, allow_unused=True), result, i, j, edges)
        return result

    return differentiable(forward, backward, second)


def gather(arrays: Sequence[Tensor], i: Tensor, j: Tensor, edges: slice) -> list[Tensor]:
    """The rows of phi, v, W, u, gs and gv that belong to a chunk."""
    at_senders, at_edges = [x.index_select(0, j) for x in arrays[:2]], [x[edges] for x in arrays[2:4]]
    return at_senders + at_edges + [x.index_select(0, i) for x in arrays[4:]]


def scatter(values: Sequence[Tensor | None], arrays: Sequence[Any], i: Tensor, j: Tensor, edges: slice) -> None:
    """The reverse of `gather`: sums over the edges of each atom."""
    for k, (value, array) in enumerate(zip(values, arrays, strict=True)):
        if value is not None and k in (2, 3):
            array[edges] = value
        elif value is not None:
            array.index_add_(0, j if k < 2 else i, value)


# 3. inductor: what the compiler makes of the plain version


def traced_gradients(wanted: Sequence[str], arrays: dict[str, Tensor], graph: Graph) -> Callable[..., Any]:
    """The first gradients as a graph of their own, whose derivative inductor compiles too."""

    def gradients(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, gs: Tensor, gv: Tensor, graph: Graph) -> Any:
        leaves = dict(zip(FIRST, (phi, v, W, u), strict=True))
        out = plain(phi, v, W, u, graph)
        return torch.autograd.grad(out, [leaves[x] for x in wanted], (gs, gv), create_graph=True)

    tensors = [arrays[x].detach().requires_grad_() for x in SECOND]
    traced = make_fx(gradients, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors, graph)
    return torch.compile(traced, dynamic=True)


# Measuring


def alternative(name: str) -> tuple[Message, Callable[..., Any] | None]:
    """The message, and the message whose filter is a spline."""
    if name == "plain":
        return plain, plain_spline
    if name.startswith("chunks"):
        return chunked(1000 * int(name.split()[-1][:-1])), None
    if name == "inductor":
        return torch.compile(plain, dynamic=True), torch.compile(plain_spline, dynamic=True)
    if name in ("warp", "numba"):
        return fused.of_warp() if name == "warp" else fused.of_numba()
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function), None


def passes(name: str, arrays: dict[str, Tensor], graph: Graph) -> dict[str, Callable[[], list[Tensor | None]]]:
    """What is measured, in the order in which it must run: each pass uses the results of those before."""
    message, spline = alternative(name)
    leaves = {x: arrays[x].detach().requires_grad_() for x in SECOND}
    kept: dict[str, Any] = {}
    traced = {w: traced_gradients(w, arrays, graph) for w in (("u",), FIRST)} if name == "inductor" else {}

    def forward() -> Any:
        kept["out"] = message(*(leaves[x] for x in FIRST), graph)
        return kept["out"]

    def backward() -> Any:
        return torch.autograd.grad(kept.pop("out"), [leaves[x] for x in FIRST], (arrays["gs"], arrays["gv"]))

    def gradients(wanted: tuple[str, ...]) -> Any:
        """Forward and first gradients, to be differentiated again."""
        if traced:
            kept["first"] = traced[wanted](*leaves.values(), graph)
        else:
            out = message(*(leaves[x] for x in FIRST), graph)
            above = (leaves["gs"], leaves["gv"])
            kept["first"] = torch.autograd.grad(out, [leaves[x] for x in wanted], above, create_graph=True)
        return kept["first"]

    def second() -> Any:
        first = kept.pop("first")
        h = [2 * x.detach() for x in first]
        return torch.autograd.grad(first, list(leaves.values()), h, allow_unused=True)

    result: dict[str, Any] = {"F": forward, "B": backward}
    if name != "warp":  # has no kernel for the double backward
        result |= {"G u": partial(gradients, ("u",)), "B2 u": second, "G": partial(gradients, FIRST), "B2": second}
    if spline is not None:
        result["F spline"] = partial(spline, *(arrays[x] for x in ("phi", "v", "table", "x", "u")), graph)
    if name == "plain":
        result["matmul"] = lambda: [arrays["basis"] @ arrays["weight"]]  # 21 radial functions to the filter
        result["copy"] = lambda: [arrays["gather"].copy_(arrays["W"])]
    return result


def times(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of processor milliseconds, all alternatives in turn, after each was compared with float64."""
    arrays, graph = inputs()
    arrays["gather"] = torch.empty_like(arrays["W"])
    exact, _ = inputs(torch.float64)
    exact["gather"] = torch.empty_like(exact["W"])
    reference = {part: run() for part, run in passes("plain", exact, graph).items()}
    everything = {name: passes(name, arrays, graph) for name in names}
    result: dict[str, dict[str, float]] = {}
    for name, parts in everything.items():
        start = time.perf_counter()
        errors = [error(run(), reference[part]) for part, run in parts.items()]
        assert max(errors) < 1e-5, f"{name} differs from float64 plain torch by {max(errors):.1e}"
        result[name] = {
            "first call s": round(time.perf_counter() - start, 1),
            "relative error": float(f"{max(errors):.1e}"),
        }

    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, parts in everything.items():
            for part, run in parts.items():
                start = time.process_time()
                run()
                samples.setdefault((name, part), []).append(time.process_time() - start)
    for (name, part), seconds in samples.items():
        result[name][part] = round(1000 * median(seconds), 2)
    for kernel in ("forward", "backward", "second_u", "second", "spline"):
        assembly = "".join(getattr(fused, f"numba_{kernel}").inspect_asm().values())
        packed = len(re.findall(r"v(?:mul|add|sub|fn?m\w+)ps\s", assembly))
        result["numba"][f"packed instructions in {kernel}"] = packed
    return result


def error(values: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Largest deviation relative to the largest element; an absent gradient is zero."""
    pairs = [
        (torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)
        for a, b in zip(values, exact, strict=True)
    ]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


def peaks(name: str) -> dict[str, float]:
    """Megabytes above what is resident before: of F with what it keeps, F + B, and a training step G + B2."""
    arrays, graph = inputs()
    parts = passes(name, arrays, graph)
    result = {}
    for label, sequence in {"F": ["F"], "F + B": ["F", "B"], "G + B2": ["G", "B2"]}.items():
        if not all(part in parts for part in sequence):
            continue
        for _ in range(2):  # the first time loads code
            Path("/proc/self/clear_refs").write_text("5")  # peak := now
            before = resident("VmRSS")
            held = [parts[part]() for part in sequence]
            result[label] = round(resident("VmHWM") - before)
            del held
        if label == "F":
            parts["B"]()
    return result


def resident(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024  # type: ignore


def cpu_model() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match.group(1) if match else platform.processor()


def table(results: dict[str, Any]) -> str:
    """Times with the default allocator, pages kept in brackets, and peak memory."""
    parts = ["F", "B", "B2 u", "G", "B2", "F spline"]
    rows = ["| | " + " | ".join(parts) + " | MB: F, F + B, G + B2 | first calls |", "|---" * (len(parts) + 3) + "|"]
    for name, ms in results["ms"].items():
        kept = results["ms_pages_kept"][name]
        cells = [f"{ms[part]:.1f} ({kept[part]:.1f})" if part in ms else "" for part in parts]
        memory = ", ".join(f"{x:.0f}" for x in results["peak_mb"][name].values())
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {memory} | {ms['first call s']:.1f} s |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
