"""Damaged files give structures or one sentence: never another exception, no endless loop, no memory as they claim.

A longer version is `benchmarks/reliability/fuzz.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import Change, bounded_memory, changes, read_damaged, read_damaged_set, sound, sound_set

FEW = settings(
    max_examples=int(os.environ.get("TRANSFERMIUM_FUZZ", "60")),
    derandomize="TRANSFERMIUM_FUZZ" not in os.environ,
    deadline=5_000,  # milliseconds, of a file of some kilobytes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(sound()))
@FEW
@given(change=changes())
def test_a_damaged_file_gives_structures_or_a_sentence(name: str, change: Change) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read_damaged(name, change(sound()[name]), Path(folder))


@pytest.mark.filterwarnings("ignore")
@FEW
@given(name=st.sampled_from(sorted(sound_set())), change=changes())
def test_a_damaged_packed_set_gives_structures_or_a_sentence(name: str, change: Change) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read_damaged_set(name, change(sound_set()[name]), Path(folder))


@pytest.mark.parametrize("name", sorted(sound()))
def test_the_sound_file_is_read(name: str, tmp_path: Path) -> None:
    """Or the tests above would say nothing."""
    assert read_damaged(name, sound()[name], tmp_path) == "read"


def test_the_sound_set_is_read(tmp_path: Path) -> None:
    assert read_damaged_set("transfermium.json", sound_set()["transfermium.json"], tmp_path) == "read"
