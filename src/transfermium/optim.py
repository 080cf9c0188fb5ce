"""AdamW, as torch.optim has it, without the second that torch.optim takes to import a compiler it does not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101).

    Args:
        groups: with "params" and "lr", which may be changed between steps; with "pull" and "start" (weights, one for
            each of "params") these are drawn towards where they started, by that fraction per step, times lr
            (arXiv:1802.01483, decoupled from the gradient like the decay).
        weight_decay: fraction of a weight that is taken away per step, times lr.

    Attributes:
        state: parameter to "step" (updates so far), "exp_avg" and "exp_avg_sq" (means of gradients and their squares).
    """

    def __init__(self, groups: Sequence[dict[str, Any]], weight_decay: float):
        self.param_groups = groups
        self.weight_decay = weight_decay
        self.state: dict[Tensor, dict[str, Any]] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if weights := [p for p in group["params"] if p.grad is not None]:
                if pull := group.get("pull"):
                    start = [s for p, s in zip(group["params"], group["start"], strict=True) if p.grad is not None]
                    torch._foreach_lerp_(weights, start, min(group["lr"] * pull, 1.0))
                self._update(weights, group["lr"])

    def _update(self, weights: list[Tensor], lr: float) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        states = [self.state.setdefault(p, {}) for p in weights]
        for p, state in zip(weights, states, strict=True):
            state["step"] = int(state.get("step", 0)) + 1
            for mean in ("exp_avg", "exp_avg_sq"):
                if mean not in state:
                    state[mean] = torch.zeros_like(p)
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]

        torch._foreach_mul_(weights, 1 - lr * self.weight_decay)
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])

        spread = torch._foreach_sqrt(second)
        torch._foreach_div_(spread, [(1 - BETAS[1] ** s["step"]) ** 0.5 for s in states])
        torch._foreach_add_(spread, EPSILON)
        torch._foreach_addcdiv_(weights, first, spread, [-lr / (1 - BETAS[0] ** s["step"]) for s in states])
