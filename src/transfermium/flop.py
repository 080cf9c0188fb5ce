"""Floating-point operations: how many a step of training takes, and texts that name so many."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import InputError

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def parse_flop(text: str) -> float:
    """Operations of "20TFLOP", "0.5 PFLOP" or "3e12FLOP"."""
    found = re.fullmatch(rf"\s*([\d.]+(?:e[+-]?\d+)?)\s*([{''.join(PREFIXES)}]?)FLOPs?\s*", text)
    try:
        number = float(found[1]) * PREFIXES[found[2]]  # type: ignore[index]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"'{text}' is no number of floating-point operations: write 20TFLOP or 3e12FLOP")
    return number


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products in `work`, gradients included: what is summed or scaled alone is not counted.

    They depend on shapes only, neither on the machine nor on what else it does.
    """
    from torch.utils._python_dispatch import TorchDispatchMode  # few runs count
    from torch.utils.flop_counter import flop_registry

    total = 0

    class Counter(TorchDispatchMode):
        """Torch's own formulas, without its record of modules, which derivatives within derivatives break."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            nonlocal total
            result = func(*args, **(kwargs or {}))
            if (formula := flop_registry.get(func.overloadpacket)) is not None:
                total += formula(*args, **(kwargs or {}), out_val=result)
            return result

    with Counter():
        work()
    return total
