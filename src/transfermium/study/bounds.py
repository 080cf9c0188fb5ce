"""What ends a stage of a study: processor time, floating-point operations or steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..flop import parse_flop
from ..train import TrainConfig, parse_time


def bound_of(text: str) -> dict[str, Any]:
    """Option of training that "30s" of processor time, "20TFLOP" or "300steps" stands for."""
    text = str(text).strip()
    if text.endswith("steps"):
        number = text.removesuffix("steps").strip()
        if not number.isdigit() or not int(number):
            raise InputError(f"'{text}' is no number of steps, such as 300steps")
        return {"steps": int(number)}
    bound: dict[str, Any] = {"flop" if "flop" in text.lower() else "processor_time": text}
    TrainConfig(**bound)  # which refuses what is none
    return bound


def fair(text: str) -> dict[str, Any]:
    """`bound_of` what costs the same for all, as steps of different objectives do not."""
    bound = bound_of(text)
    if "steps" in bound:
        raise InputError(f"steps of different objectives cost differently: give a time or operations, not {text}")
    return bound


def both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The bound of one stage that takes what two stages take."""
    if one.keys() != other.keys():
        raise InputError(
            "an arm that takes the time of both stages needs both as times, both as operations or both as steps: "
            f"not {in_words(one)} and {in_words(other)}"
        )
    if "steps" in one:
        return {"steps": one["steps"] + other["steps"]}
    if "flop" in one:
        return {"flop": f"{parse_flop(one['flop']) + parse_flop(other['flop']):g}FLOP"}
    return {"processor_time": f"{parse_time(one['processor_time']) + parse_time(other['processor_time']):g}s"}


def seconds_of(bound: Mapping[str, Any]) -> float | None:
    """Processor time; None where nothing says how long it takes."""
    return parse_time(bound["processor_time"]) if "processor_time" in bound else None


def plain(bound: Mapping[str, Any]) -> str:
    """A time or a number of operations, in one way of writing it."""
    seconds = seconds_of(bound)
    return f"{parse_flop(bound['flop']):g}FLOP" if seconds is None else f"{seconds:g}s"


def in_words(bound: Mapping[str, Any]) -> str:
    """For people: "30s of processor time", "20TFLOP", "300 steps"."""
    if "steps" in bound:
        return f"{bound['steps']} steps"
    return bound["flop"] if "flop" in bound else f"{bound['processor_time']} of processor time"
