"""LoRA: low-rank updates of the matrices of a frozen backbone (Hu et al., arXiv:2106.09685), merged when trained."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .backbones import Backbone
from .errors import InputError
from .model import copied

RANK = 8


class LowRank(nn.Module):
    """A matrix plus the product of a tall one, which starts at zero, and a wide one (Eq. 3, with α = r).

    Args:
        shape: of the matrix, (rows, columns), or of several of them, (n, rows, columns).
        rank: of the update; that of a matrix with fewer rows or columns is as high as it can be.
    """

    def __init__(self, shape: torch.Size, rank: int):
        super().__init__()
        *n, rows, columns = shape
        rank = min(rank, rows, columns)
        limit = 1 / math.sqrt(columns)
        self.tall = nn.Parameter(torch.zeros(*n, rows, rank))
        self.wide = nn.Parameter(torch.empty(*n, rank, columns).uniform_(-limit, limit))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.tall @ self.wide


def adapt(backbone: Backbone, rank: int, own: Collection[str] = ()) -> dict[str, int]:
    """Freeze a backbone, in place, but for low-rank updates of its matrices: the weights of linear layers.

    Tables of elements, biases and norms are frozen without an update. So are no parameters of `own`, names of what the
    base did not have: they are trained as they are.

    Returns:
        "rank", "trained numbers" of the backbone, and "numbers" that it has without the updates.
    """
    total = sum(p.numel() for p in backbone.parameters())
    for name, module in list(backbone.named_modules()):
        for short, p in list(module.named_parameters(recurse=False)):
            full = f"{name}.{short}" if name else short
            p.requires_grad_(full in own)
            if short == "weight" and p.dim() >= 2 and not isinstance(module, nn.Embedding) and full not in own:
                update = LowRank(p.shape, rank).to(p.device, p.dtype)  # drawn alike for every device
                parametrize.register_parametrization(module, short, update)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    if not any(isinstance(module, LowRank) for module in backbone.modules()):
        raise InputError(f"{type(backbone).__name__} has no linear layer to adapt: choose strategy 'full'")
    return {"rank": rank, "trained numbers": trained, "numbers": total}


def adapted(backbone: Backbone) -> bool:
    """Whether what is trained of a backbone has been chosen by `adapt`."""
    return any(isinstance(module, LowRank) for module in backbone.modules())


@torch.no_grad()
def merged(backbone: Backbone) -> Backbone:
    """A backbone that computes the same with plain weights; itself where it was not adapted."""
    if not adapted(backbone):
        return backbone
    with torch.random.fork_rng(devices=[]):
        plain: Backbone = copied(backbone)
    weights = backbone.state_dict()
    for name, module in backbone.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            weights[f"{name}.weight"] = module.weight
    first = next(backbone.parameters())
    plain.to(first.device, first.dtype).load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.train(backbone.training)
