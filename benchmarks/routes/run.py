"""What a gradient of a force loss costs by each route, how exact it is, and what lower matmul precision would gain.

Runs on one core, on boxes of liquid water from the public data (see docs/data.md); `--quick` runs one small part and
keeps nothing. Needs a C++ compiler for the compiled route.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the routes are found by name, as in the tests

import transfermium as tm
from benchmarks.routes import routes
from transfermium.graph import Batch, to_batch
from transfermium.messages import reference

RESULTS = Path(__file__).with_name("results.json")
DATA = Path(os.environ.get("TRANSFERMIUM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
BACKBONES: dict[str, Callable[[], tm.Backbone]] = {
    "TensorNet": partial(tm.TensorNet, width=64, depth=2),
    "PaiNN": partial(tm.PaiNN, width=64, depth=3),
    "CGCNN": partial(tm.CGCNN, width=64, channels=64, depth=4, cutoff=5.0),
}
TERMS: dict[str, dict[str, Any]] = {"energy and forces": {"stress": 0.0}, "forces": {"energy": 0.0, "stress": 0.0}}
# One core, also for the compiler, which is to start from nothing.
ALONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
ENVIRONMENT = os.environ | ALONE
Record = dict[str, Any]


class Route(NamedTuple):
    """A function of `routes`, and the context it runs in."""

    gradient: Callable[[tm.Model, Batch, routes.Loss], tuple[Tensor, routes.Gradients]]
    context: Callable[[], AbstractContextManager[None]]


COMPILED = "double backward, compiled"
ROUTES = {
    "double backward, kernels": Route(routes.gradient_by_double_backward, nullcontext),
    "double backward, plain torch": Route(routes.gradient_by_double_backward, reference),
    COMPILED: Route(routes.gradient_by_compiled_double_backward, nullcontext),
    "jvp, plain torch": Route(routes.gradient_by_jvp, reference),
    "difference, kernels": Route(routes.gradient_by_difference, nullcontext),
    "difference, plain torch": Route(routes.gradient_by_difference, reference),
}


def main() -> None:
    """Measure every part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the steps of the difference for CGCNN; only printed")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part, keep the others")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "BACKBONE"), help=argparse.SUPPRESS)
    parser.add_argument("--no-compiler", action="store_true", help="leave out the compiled route")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the tables of README.md")
    options = parser.parse_args()
    if options.tables:
        print(tables(json.loads(RESULTS.read_text())))
        return
    if options.no_compiler:
        del ROUTES[COMPILED]
    if options.worker:
        part, backbone = options.worker
        torch.set_num_threads(1)
        for record in PARTS[part](backbone):
            print(json.dumps({"backbone": backbone} | record), flush=True)
        return

    jobs = [
        (part, name) for part in options.only or PARTS for name in BACKBONES if part != "training" or name == "PaiNN"
    ]
    for part, name in [("steps", "CGCNN")] if options.quick else jobs:
        command = [sys.executable, __file__, "--worker", part, name]
        command += ["--no-compiler"] if options.no_compiler else []
        lines = subprocess.run(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
        print(part, *lines, sep="\n", flush=True)
        if not options.quick:
            keep(part, name, [json.loads(line) for line in lines])


def keep(part: str, backbone: str, records: list[Record]) -> None:
    """Replace what is known of one part and backbone."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    others = [one for one in results.get(part, []) if one["backbone"] != backbone]
    results |= {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": 1, "system": platform.system()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        part: others + records,
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def measure_routes(backbone: str, rounds: int = 5) -> Iterator[Record]:
    """Error on two boxes; processor seconds and memory on four, all routes in turn."""
    model, boxes = trained(backbone)
    (w1,), pairs = (batches(boxes[:4], model, TERMS["energy and forces"], size) for size in (4, 2))
    found: dict[str, Record] = {name: {"route": name, "edges": w1.graph.n_edges} for name in ROUTES}
    for terms, weights in TERMS.items():
        (batch, *_), loss = batches(boxes[:4], model, weights, 2), loss_of(boxes, weights)
        exact = exact_gradient(model, batch, loss)
        for name, route in ROUTES.items():
            if name == COMPILED and terms == "forces":
                continue  # minutes more, for other outputs are another graph
            start, start_cpu = time.perf_counter(), cpu_with_children()
            with route.context():
                _, gradients = route.gradient(model, batch, loss)
            found[name][f"error, {terms}"] = routes.relative_error(gradients, exact)
            if name == COMPILED:
                found[name]["compile_s"] = time.perf_counter() - start
                found[name]["compile_cpu_s"] = cpu_with_children() - start_cpu

    loss = loss_of(boxes, TERMS["energy and forces"])
    seconds: dict[str, list[float]] = {name: [] for name in ROUTES}
    graphs = unique_graphs()
    for turn in range(rounds + 1):  # the first warms up
        for name, route in ROUTES.items():
            before_mb = settled_memory() if turn == 1 else 0.0
            before = time.process_time()
            with route.context():
                route.gradient(model, w1, loss)
            seconds[name].append(time.process_time() - before)
            if turn == 1:
                found[name]["peak_mb"] = status("VmHWM") - before_mb
    if COMPILED in ROUTES:  # two sizes more
        for batch in (*pairs, *batches(boxes[:3], model, TERMS["energy and forces"], 3)):
            ROUTES[COMPILED].gradient(model, batch, loss)
        found[COMPILED]["recompilations"] = unique_graphs() - graphs
    for name, record in found.items():
        yield record | {"cpu_s": median(seconds[name][1:])}


def measure_steps(backbone: str) -> Iterator[Record]:
    """Error of the difference by its step, for fresh and for trained weights."""
    for stage, n_steps in {"fresh": 0, "trained": 30}.items():
        model, boxes = trained(backbone, n_steps)
        for terms, weights in TERMS.items():
            (batch,), loss = batches(boxes[:1], model, weights, 1), loss_of(boxes, weights)
            exact = exact_gradient(model, batch, loss)
            contexts: dict[str, Callable[[], AbstractContextManager[None]]]
            contexts = {"kernels": nullcontext, "plain torch": reference}
            for step in (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 3e-2, 1e-1):
                for means, context in contexts.items():
                    with context():
                        _, gradients = routes.gradient_by_difference(model, batch, loss, step)
                    error = routes.relative_error(gradients, exact)
                    yield {"weights": stage, "terms": terms, "by": means, "step": step, "error": error}


def measure_training(backbone: str, n_steps: int = 150) -> Iterator[Record]:
    """Force error after the same short training by each route; a tiny change of the start shows what chance does."""
    difference = routes.gradient_by_difference
    runs: dict[str, tuple[Any, float]] = {
        "double backward": (routes.gradient_by_double_backward, 0.0),
        "double backward, start changed by 1e-6": (routes.gradient_by_double_backward, 1e-6),
        "difference": (difference, 0.0),
        "difference, 10 times the step": (partial(difference, step=10 * routes.STEP), 0.0),
        "difference, 50 times the step": (partial(difference, step=50 * routes.STEP), 0.0),
    }
    train, valid = water("train", 64), water("val", 8)
    for seed in range(3):
        for name, (gradient, change) in runs.items():
            model = fresh(tm.PaiNN(width=32, depth=2), train, seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + change * torch.randn_like(p))
            cpu = fit(model, train, gradient, n_steps, seed)
            yield {"route": name, "seed": seed, "steps": n_steps, "cpu_s": cpu, "force_mae": force_mae(model, valid)}


def measure_precision(backbone: str, rounds: int = 7) -> Iterator[Record]:
    """Forces, gradients and time of double backward with lower precision of float32 matrix products."""
    model, boxes = trained(backbone)
    weights = TERMS["energy and forces"]
    (w1,), (one,) = batches(boxes[:4], model, weights, 4), batches(boxes[:1], model, weights, 1)
    loss = loss_of(boxes, weights)
    exact = exact_gradient(model, one, loss)
    exact_forces = copy.deepcopy(model).double().eval()(one.graph, ["forces"])["forces"]
    seconds: dict[str, list[float]] = {"highest": [], "high": [], "medium": []}
    for _ in range(rounds + 1):
        for precision, times in seconds.items():
            torch.set_float32_matmul_precision(precision)
            before = time.process_time()
            routes.gradient_by_double_backward(model, w1, loss)
            times.append(time.process_time() - before)
    for precision, times in seconds.items():
        torch.set_float32_matmul_precision(precision)
        _, gradients = routes.gradient_by_double_backward(model, one, loss)
        errors = model.eval()(one.graph, ["forces"])["forces"].double() - exact_forces
        yield {
            "precision": precision,
            "cpu_s": median(times[1:]),
            "force_error_mev": 1e3 * float(errors.square().mean().sqrt()),
            "gradient_error": routes.relative_error(gradients, exact),
        }


PARTS = {
    "routes": measure_routes,
    "steps": measure_steps,
    "training": measure_training,
    "precision": measure_precision,
}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| backbone | route | CPU s | peak MB | error, energy and forces | error, forces |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for r in sorted(results["routes"], key=by_backbone):
        errors = [f"{r[key]:.1e}" if key in r else "" for key in ("error, energy and forces", "error, forces")]
        lines.append(
            f"| {r['backbone']} | {r['route']} | {r['cpu_s']:.2f} | {r['peak_mb']:,.0f} | {' | '.join(errors)} |"
        )
    lines += ["", "| backbone | compiled in | of which CPU s | compiled again for other sizes |", "|---|--:|--:|--:|"]
    for r in [r for r in sorted(results["routes"], key=by_backbone) if r["route"] == COMPILED]:
        cells = [f"{r['compile_s']:.0f} s", f"{r['compile_cpu_s']:.0f}", str(r["recompilations"])]
        lines.append(f"| {r['backbone']} | {' | '.join(cells)} |")

    chosen = [r for r in results["steps"] if r["by"] == "kernels" and r["weights"] == "trained"]
    steps = sorted({r["step"] for r in chosen})
    lines += ["", "| step, Å | " + " | ".join(f"{s:g}" for s in steps) + " |", "|---|" + "--:|" * len(steps)]
    for backbone in BACKBONES:
        for terms in TERMS:
            row = [r for r in chosen if (r["backbone"], r["terms"]) == (backbone, terms)]
            errors = [f"{r['error']:.0e}" for r in sorted(row, key=lambda r: float(r["step"]))]
            lines.append(f"| {backbone}, {terms} | {' | '.join(errors)} |")

    lines += ["", "| route | seed 0 | seed 1 | seed 2 | CPU s |", "|---|--:|--:|--:|--:|"]
    for route in dict.fromkeys(r["route"] for r in results["training"]):
        row = [r for r in results["training"] if r["route"] == route]
        maes = " | ".join(f"{r['force_mae']:.1f}" for r in row)
        lines.append(f"| {route} | {maes} | {median(r['cpu_s'] for r in row):.1f} |")

    lines += ["", "| backbone | precision | CPU s | force error, meV/Å | gradient error |", "|---|---|--:|--:|--:|"]
    for r in sorted(results["precision"], key=by_backbone):
        numbers = f"{r['cpu_s']:.3f} | {r['force_error_mev']:.0e} | {r['gradient_error']:.0e}"
        lines.append(f"| {r['backbone']} | {r['precision']} | {numbers} |")
    return "\n".join(lines)


def by_backbone(record: Record) -> int:
    return list(BACKBONES).index(record["backbone"])


def water(part: str, n: int) -> Sequence[tm.graph.Sample]:
    """Boxes of 192 atoms with energies and forces."""
    structures = tm.read(DATA / "water_pbe0ts" / f"{part}.extxyz.xz")
    rng = np.random.default_rng(0)
    return [tm.Potential(stress=0.0).prepare(structures[i], rng) for i in range(n)]


def fresh(backbone: tm.Backbone, boxes: Sequence[tm.graph.Sample], seed: int = 0) -> tm.Model:
    """A model with new weights, calibrated."""
    torch.manual_seed(seed)
    model = tm.Model(tm.model.copied(backbone), tm.Potential().outputs(backbone.width))
    head: Any = model.heads["energy"]
    head.calibrate("energy", boxes)
    return model


def trained(name: str, n_steps: int = 30) -> tuple[tm.Model, Sequence[tm.graph.Sample]]:
    """A model that has begun to learn."""
    boxes = water("train", 16)
    model = fresh(BACKBONES[name](), boxes)
    fit(model, boxes, routes.gradient_by_double_backward, n_steps)
    return model, boxes


def fit(model: tm.Model, boxes: Sequence[tm.graph.Sample], gradient: Any, n_steps: int, seed: int = 0) -> float:
    """Train on single boxes; returns processor seconds."""
    every = batches(boxes, model, TERMS["energy and forces"], 1)
    loss, order = loss_of(boxes, TERMS["energy and forces"]), np.random.default_rng(seed)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=1e-5)
    before = time.process_time()
    for step in range(n_steps):
        rate = 2e-3 * min(1.0, (step + 1) / (0.05 * n_steps)) * (1 + math.cos(math.pi * step / n_steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        _, gradients = gradient(model, every[order.integers(len(every))], loss)
        for name, p in weights.items():
            p.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(weights.values(), 10.0)
        optimizer.step()
    return time.process_time() - before


def force_mae(model: tm.Model, boxes: Sequence[tm.graph.Sample]) -> float:
    """In meV/Å."""
    errors = []
    for batch in batches(boxes, model, TERMS["forces"], 1):
        forces = model.eval()(batch.graph, ["forces"])["forces"]
        errors.append(float((forces.double() - batch.targets["forces"]).abs().mean()))
    return 1e3 * sum(errors) / len(errors)


def batches(boxes: Sequence[tm.graph.Sample], model: tm.Model, weights: dict[str, Any], size: int) -> list[Batch]:
    wanted = tm.Potential(**weights).weights
    parts = [s._replace(targets={name: t for name, t in s.targets.items() if name in wanted}) for s in boxes]
    return [to_batch(parts[i : i + size], model.backbone.edges) for i in range(0, len(parts), size)]


def loss_of(boxes: Sequence[tm.graph.Sample], weights: dict[str, Any]) -> routes.Loss:
    """As in training: weights and rounding from the data."""
    return routes.mean_loss(tm.Potential(**weights).settled(boxes))


def exact_gradient(model: tm.Model, batch: Batch, loss: routes.Loss) -> routes.Gradients:
    with reference():
        return routes.gradient_by_double_backward(copy.deepcopy(model).double(), batch, loss)[1]


def cpu_with_children() -> float:
    """Processor seconds of this process and of those it waited for, the C++ compiler among them."""
    return sum(os.times()[:4])


def unique_graphs() -> int:
    """Graphs compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def settled_memory() -> float:
    """Give freed memory back and forget the peak; resident MB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> float:
    """Memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
