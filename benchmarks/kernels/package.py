"""The package's own kernels on the same message: `python package.py` in its environment; writes package.json.

Here the filter is not given: it is linear in 20 Bessel functions, on every edge in plain torch, on a grid in kernels.
"""

import contextlib
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import C, E, N, inputs
from torch import nn

from transfermium.backbones.painn import MESSAGE
from transfermium.graph import AtomGraph, Cutoff
from transfermium.messages import Neighborhood, reference
from transfermium.nn import Bessel

ROUNDS = 21


def main() -> None:
    torch.set_num_threads(1)
    samples: dict[tuple[str, str], list[float]] = {}
    ways = {"reference": reference, "kernels": contextlib.nullcontext}
    problems = {way: Problem() for way in ways}
    for round in range(ROUNDS + 1):
        for way, context in ways.items():
            with context():
                for part, run in problems[way].parts().items():
                    start = time.process_time()
                    run()
                    if round:
                        samples.setdefault((way, part), []).append(1000 * (time.process_time() - start))
    result: dict[str, dict[str, float]] = {}
    for (way, part), ms in samples.items():
        result.setdefault(way, {})[part] = round_(median(ms))
    found = zip(problems["kernels"].found, problems["reference"].found, strict=True)
    errors = [float((a - b).norm() / b.norm()) for a, b in found]
    result["kernels"]["difference"] = float(f"{max(errors):.0e}")
    (Path(__file__).parent / "package.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


class Problem:
    """F: the sums. B: their gradient for forces. B2: what training on forces differentiates then."""

    def __init__(self) -> None:
        arrays, edges = inputs()
        lengths = 0.8 + 4.2 * arrays["x"] / arrays["x"].max()
        self.graph = AtomGraph(
            positions=torch.zeros(N, 3),
            atomic_numbers=torch.ones(N, dtype=torch.int64),
            cell=torch.zeros(1, 3, 3),
            system_idx=torch.zeros(N, dtype=torch.int64),
            senders=edges.senders,
            receivers=edges.receivers,
            cell_shifts=torch.zeros(E, 3),
            shells=torch.zeros(0, dtype=torch.int64),
            inputs={},
        )
        self.vectors = (arrays["u"] * lengths.unsqueeze(1)).requires_grad_()
        self.features = [arrays["phi"].view(N, 3, C).requires_grad_(), arrays["v"].requires_grad_()]
        self.above = [arrays["gs"].view(N, 1, C).requires_grad_(), arrays["gv"].requires_grad_()]
        torch.manual_seed(0)
        self.filter = nn.Linear(20, 3 * C)
        self.basis = Bessel(20, 5.0)

    def parts(self) -> dict[str, partial[None]]:
        return {part: partial(getattr(self, part)) for part in ("F", "B", "B2")}

    def F(self) -> None:
        edges = Neighborhood(self.graph, Cutoff(5.0), self.basis)
        edges.vectors = self.vectors * 1.0
        self.out = edges.sum(MESSAGE, lambda at: self.filter(at.basis) * at.envelope, [1.0 * f for f in self.features])

    def B(self) -> None:
        wanted = [self.vectors, *self.features]
        self.first = torch.autograd.grad(self.out, wanted, [1.0 * a for a in self.above], create_graph=True)

    def B2(self) -> None:
        wanted = [*self.features, *self.above, *self.filter.parameters()]
        above = [2 * g.detach() for g in self.first]
        self.found = torch.autograd.grad([*self.first, *self.out], wanted, [*above, *self.above])


def round_(x: float) -> float:
    return float(f"{x:.3g}")


if __name__ == "__main__":
    main()
