"""How far a W1 training step is from what this machine could do: operations and bytes against measured ceilings.

The ceilings are the rate of a large float32 matrix product and the bandwidth of a large copy (read and write), both on
one thread. What a step needs at least is counted by hand: matrix products on atoms; messages whose filter is a cubic
interpolation of a table; every layer reads and writes its atoms once, and reads its edges once. A reverse sweep costs
two forward ones, so a step with forces costs nine: energy 1, forces 2, and gradients of both 6.
"""

import argparse
import json
import os
import sys
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import DATA, machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worker import Job, median_times, ready, step

RESULT = Path(__file__).with_name("roofline.json")
SWEEPS = 9  # forward sweeps that a training step with forces is worth
EDGE_BYTES = 2 * 4 + 4 * 4  # two indices; a length and a direction
INTERPOLATION = 8  # operations per value of a filter: four products and sums


class Messages(NamedTuple):
    """Numbers per channel: read and written per atom, filters and other operations per edge, in so many layers."""

    layers: int
    read: int
    written: int
    filters: int
    operations: int


MESSAGES = {
    "TensorNet": Messages(layers=3, read=9, written=9, filters=3, operations=18),  # the embedding is a layer too
    "PaiNN": Messages(layers=3, read=6, written=4, filters=3, operations=16),
    "CGCNN": Messages(layers=4, read=4, written=1, filters=2, operations=24),  # two thirds for sigmoid and softplus
}
LAYERS = {"TensorNet": 2, "PaiNN": 3, "CGCNN": 4}
WIDTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TRANSFERMIUM_DATA") or DATA))
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps, per backbone")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rate, bandwidth = matmul_rate(), copy_bandwidth()
    steps = {backbone: counted(backbone, rate, bandwidth, options) for backbone in MESSAGES}
    result = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "threads": 1,
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "steps": steps,
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    json.dump(result, sys.stdout, indent=1)
    print()


def counted(backbone: str, rate: float, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    """Of one step: measured time, what torch executed, what is needed at least, and how long that would take."""
    prepared = ready(
        Job(
            workload="W1",
            data=str(options.data),
            peer="transfermium",
            backbone=backbone,
            width=WIDTH,
            layers=LAYERS[backbone],
            compiled=False,
        )
    )
    peer, optimizer = prepared.peer, torch.optim.Adam(prepared.peer.model.parameters(), lr=1e-4)
    batch, wanted = prepared.step_inputs(prepared.found[: prepared.workload.batch])
    work = partial(step, peer, optimizer, batch, wanted)
    median_times([work], 0.0)  # warms up
    ((_, seconds),) = median_times([work], options.seconds)

    forward, whole = Counter(batch.n_edges), Counter(batch.n_edges)
    with forward:
        peer.model(batch, ["energy"])
    with whole:
        work()

    per_channel = MESSAGES[backbone]
    values = batch.n_edges * WIDTH * (per_channel.operations + INTERPOLATION * per_channel.filters)
    flop = SWEEPS * (forward.atom_flop + per_channel.layers * values)
    atoms = 4 * batch.n_atoms * WIDTH * (per_channel.read + per_channel.written)
    moved = SWEEPS * (forward.atom_bytes + per_channel.layers * (atoms + batch.n_edges * EDGE_BYTES))
    compute, memory = flop / rate, moved / bandwidth
    return {
        "edges": batch.n_edges,
        "cpu_ms": round(1e3 * seconds, 1),
        "executed": {
            "matmul_gflop": round((whole.atom_flop + whole.edge_flop) / 1e9, 2),
            "in_and_out_gb": round(whole.bytes / 1e9, 3),
            "ms_of_copies": round(1e3 * whole.bytes / bandwidth, 1),
        },
        "needed": {
            "gflop": round(flop / 1e9, 2),
            "gb": round(moved / 1e9, 3),
            "compute_ms": round(1e3 * compute, 1),
            "memory_ms": round(1e3 * memory, 1),
            "bound": "compute" if compute > memory else "memory",
        },
        "times_the_limit": round(seconds / max(compute, memory), 2),
    }


class Counter(TorchDispatchMode):
    """Adds up matrix products, on atoms and on edges, and the sizes of what every operator reads and writes.

    What kernels outside of torch's operators do is not seen.
    """

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
    NO_TRAFFIC = ("empty", "new_empty", "empty_like", "detach")

    def __init__(self, n_edges: int):
        super().__init__()
        self.n_edges = n_edges
        self.atom_flop = self.edge_flop = 0
        self.atom_bytes = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        if func.is_view or operator in self.NO_TRAFFIC:
            return out

        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        self.bytes += size
        if operator in self.PRODUCTS:
            factors = [x for x in args if isinstance(x, Tensor)][-2:]
            flop = 2 * out.numel() * factors[0].shape[-1]
            if self.n_edges in (*factors[0].shape, *factors[1].shape):
                self.edge_flop += flop
            else:
                self.atom_flop += flop
                self.atom_bytes += size
        return out


def matmul_rate(n: int = 2048) -> float:
    """Operations per second of a large float32 matrix product, the best of several."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    out = torch.empty(n, n)
    return 2 * n**3 / best_time(lambda: torch.mm(a, b, out=out))


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes read and written per second by a copy far larger than any cache, the best of several."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    return 2 * size / best_time(lambda: target.copy_(source))


def best_time(work: Any, times: int = 8) -> float:
    """Processor seconds."""
    return min(float(median_times([work], 0.0)[0, 1]) for _ in range(times))


if __name__ == "__main__":
    main()
