"""What a model file claims, looked at before anything is made of it that may be as large as it says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST = 10_000  # that a number in the arguments of a small file may be: of channels, neighbours, elements...
SPARE = 1_000  # values per tensor of a file that may be made and are not saved, such as the frequencies of a basis

NUMBER = (int, float)
SPEC = {"class": str, "arguments": {}}
LABEL = {"quantity": str, "keys": [[(str, int)]], "unit": str, "shape": [int], "classes": [str], "also_found": [str]}
STAGE = {
    **{"verb?": str, "objective?": SPEC, "data?": str, "date?": str, "transfermium?": str, "alignment?": {}},
    **{"structures?": int, "validation structures?": int, "steps?": int},
}
CARD: dict[Any, Any] = {  # an entry whose name ends in ? may be missing
    "objective?": SPEC,
    "quantities?": {str: [str]},
    "labels?": {"labels": [LABEL]},
    "levels?": {str: int},
    "elements?": {str: int},
    "elements in last stage?": [str],
    "elements without reference?": [str],
    "references (eV)?": {str: NUMBER},
    "provenance?": {},
    "metrics?": {},
    "uncertainty?": {"targets?": {str: {"output": str}}},
}
PART = {"outputs": {str: str}, "inputs?": {str: NUMBER}, "card": CARD}
FILE = {"backbone": SPEC, "outputs": {str: SPEC}, "dtype": str, "history?": [STAGE], "parts?": {str: PART}, **CARD}


def check_card(card: Any) -> None:
    """Raise `ValueError` naming the first entry of a card that is missing, or of another kind than ours."""
    check_kinds(card, FILE, "its card")
    for symbol in {**card.get("elements", {}), **card.get("references (eV)", {})}:
        if symbol not in atomic_numbers:
            raise ValueError(f"its card has the element '{symbol}', which is none")


class NoLargerThan(TorchFunctionMode):
    """Within it, tensors that are made are counted first, and have together little more numbers than a file holds.

    Raises:
        ValueError: for one that would be too many, before there is memory for it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.values = 4 * _values(tensors) + SPARE * (len(tensors) + 1)
        self.number = 10 * len(tensors) + SPARE

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKE:
            self.values, self.number = self.values - MAKE[func](*args, **kwargs), self.number - 1
            if min(self.values, self.number) < 0:
                raise ValueError("its card describes a larger model than it holds")
        return func(*args, **kwargs)


def _of_shape(*shape: Any, size: Any = None, **others: Any) -> int:
    return math.prod(size or (shape[0] if shape and not isinstance(shape[0], int) else shape))


def _of_steps(start: Any, end: Any, steps: int, *args: Any, **others: Any) -> int:
    return steps


def _of_range(*bounds: Any, **others: Any) -> int:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return math.ceil((end - start) / step)


MAKE: dict[Any, Any] = {  # function of torch to how many numbers it will give
    **{f: _of_shape for f in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)},
    torch.full: lambda size, *args, **others: math.prod(size),
    torch.linspace: _of_steps,
    torch.logspace: _of_steps,
    torch.arange: _of_range,
}


def check_arguments(arguments: Mapping[str, Any] | list[Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for a number that no model of this size can have, before it becomes a length."""
    most = max(MOST, _values(tensors))
    for value in arguments.values() if isinstance(arguments, Mapping) else arguments:
        if isinstance(value, Mapping | list):
            check_arguments(value, tensors)
        elif isinstance(value, NUMBER) and not abs(value) <= most:
            raise ValueError(f"its card has {_short(value)} among the arguments, more than it can hold")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for the first tensor that is missing, or no finite numbers of the shape that is expected."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
        found = tensors[name]
        if found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            shapes = [f"{tuple(one.shape)} of {str(one.dtype).removeprefix('torch.')}" for one in (found, tensor)]
            raise ValueError(f"the tensor {name} is {shapes[0]}, but the card needs {shapes[1]}")
        if not torch.isfinite(found.to(tensor.dtype)).all():
            raise ValueError(f"the tensor {name} has values that are not finite")
    if more := [name for name in tensors if name not in expected]:
        raise ValueError(f"the card knows no tensor {more[0]}")


def _values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def check_kinds(value: Any, pattern: Any, where: str) -> None:
    """Raise `ValueError` for what does not fit a pattern.

    That is a type, or several; [pattern] of a list; {name: pattern} of entries, {str: pattern} of all.
    """
    entries = pattern if isinstance(pattern, dict) else {}
    kind: Any = type(pattern) if isinstance(pattern, dict | list) else pattern
    if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} is {_short(value)}, which is not of the kind it should be")
    if isinstance(pattern, list):
        for index, item in enumerate(value):
            check_kinds(item, pattern[0], f"{where}[{index}]")
    for name, inner in entries.items():
        if name is str:
            for key, item in value.items():
                check_kinds(item, inner, f"'{key}' of {where}")
        elif (plain := name.removesuffix("?")) in value:
            check_kinds(value[plain], inner, f"'{plain}' of {where}")
        elif plain == name:
            raise ValueError(f"{where} has no '{name}'")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."
