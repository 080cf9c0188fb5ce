"""Learning rates that arms try, and whether others should have been tried."""

from __future__ import annotations

from collections.abc import Sequence

from ..console import and_

RATES = (2e-3, 8e-3, 5e-4)  # where nothing else is said; the first one where no label validates
SPAN = 4  # from one rate to the next


def beyond(chosen: Sequence[tuple[str, float]], rates: Sequence[float]) -> str:
    """A sentence about arms whose choice among several rates was the largest or the smallest; "" where none was.

    What such an arm can reach is not known, and what pre-training seems to save may be the rate that scratch lacked.
    """
    if len(set(rates)) < 2:
        return ""
    said = []
    for end, name, further in ((max(rates), "largest", max(rates) * SPAN), (min(rates), "smallest", min(rates) / SPAN)):
        if arms := list(dict.fromkeys(arm for arm, rate in chosen if rate == end)):
            said.append(f"{and_(arms)} learned best at the {name} rate tried, {end:g}: try {further:g} as well.")
    return " ".join(said)
