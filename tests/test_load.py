"""Which structures come together, in which order, with which noise."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import transfermium as tm
from tests.alloys import alloys
from transfermium.data import load
from transfermium.data.load import (
    TRAINING,
    VALIDATION,
    Batches,
    Share,
    count_edges,
    dealing,
    plan,
    rng_of,
    training_batches,
)
from transfermium.graph import Batch, Cutoff

CUTOFF = Cutoff(4.0)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100), st.randoms(use_true_random=False))
def test_a_plan_keeps_the_budget_and_the_order(counts, budget, random):
    order = list(range(len(counts)))
    random.shuffle(order)

    batches = plan(np.array(counts, int), budget, np.array(order, int))

    assert [i for batch in batches for i in batch] == order
    for batch in batches:
        assert len(batch) == 1 or sum(counts[i] for i in batch) <= budget


def test_a_plan_is_not_wasteful():
    assert [list(batch) for batch in plan(np.array([4, 4, 9, 1, 30, 1]), 10, np.arange(6))] == [
        [0, 1],
        [2, 3],
        [4],
        [5],
    ]


def test_random_numbers_depend_on_seed_kind_epoch_and_index_only():
    first = rng_of(1, TRAINING, 2, 3).normal(size=4)
    rng_of(1, TRAINING, 2, 4).normal(size=100)

    assert np.array_equal(first, rng_of(1, TRAINING, 2, 3).normal(size=4))
    for other in [(2, TRAINING, 2, 3), (1, VALIDATION, 2, 3), (1, TRAINING, 3, 3), (1, TRAINING, 2, 2)]:
        assert not np.array_equal(first, rng_of(*other).normal(size=4))


def test_edges_are_counted_as_they_are_found():
    structures = alloys(3)
    done: list[int] = []

    counts = count_edges(structures, CUTOFF, done.append)

    assert counts.tolist() == [len(CUTOFF.neighbors(atoms)[0]) for atoms in structures]
    assert done == [1, 2, 3]


def test_a_structure_without_neighbours_to_search_is_named():
    structures = alloys(3)
    structures[1].positions[0] = np.nan
    with pytest.raises(tm.InputError, match=r"structure 1: .* not finite"):
        count_edges(structures, CUTOFF)


@pytest.mark.parametrize("budget", [1, 150, 400, 10_000])
def test_an_epoch_has_each_structure_once_and_its_own_order(budget):
    addresses = epochs(stream(alloys(10), budget), 3)

    for members in addresses:
        assert sorted(members) == list(range(10))
    assert len({tuple(members) for members in addresses}) == 3


def test_batches_stay_within_the_budget():
    structures = alloys(10)
    counts = count_edges(structures, CUTOFF)
    for dealt in islice(stream(structures, 400), 20):
        assert counts[dealt.members].sum() <= 400 or len(dealt.members) == 1
        assert dealt.batch.graph.n_systems == len(dealt.members)


def test_the_same_address_is_always_the_same_batch():
    batches = noisy(alloys(4))

    again = batches[3, np.array([2, 0])]
    batches[0, np.array([1, 2, 3])]  # whatever else is asked in between

    assert same(again, batches[3, np.array([2, 0])])
    assert not same(again, batches[4, np.array([2, 0])])


def test_noise_does_not_depend_on_the_company():
    batches = noisy(alloys(4))
    alone, together = batches[0, np.array([2])], batches[0, np.array([1, 2])]
    assert torch.equal(alone.graph.positions, together.graph.positions[4:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_can_begin_after_any_step(workers):
    structures = alloys(7)
    whole = list(islice(stream(structures, 300), 12))
    assert {0, 1, 2} <= {dealt.epoch for dealt in whole}
    for done in range(1, 8):
        rest = list(islice(stream(structures, 300, start=whole[done - 1].after, workers=workers), 5))
        for expected, found in zip(whole[done : done + 5], rest, strict=True):
            assert (expected.epoch, expected.after) == (found.epoch, found.after)
            assert expected.members.tolist() == found.members.tolist()
            assert same(expected.batch, found.batch)


def test_every_process_begins_after_the_same_step():
    counts = count_edges(alloys(9), CUTOFF)
    shares = [Share(rank, 2, 3) for rank in range(2)]
    whole = [list(islice(dealing(counts, 150, 0, share=share), 30)) for share in shares]
    assert [after for _, _, after in whole[0]] == [after for _, _, after in whole[1]]
    for share, expected in zip(shares, whole, strict=True):
        rest = list(islice(dealing(counts, 150, 0, expected[11][2], share), 18))
        assert str(rest) == str(expected[12:])


def test_each_step_is_dealt_once_and_no_earlier_one(monkeypatch):
    """A run that goes on at step 10⁶ need not wait for all of them to be dealt again."""
    dealt = []
    deal = load.deal
    monkeypatch.setattr(load, "deal", lambda *arguments: dealt.append(1) or deal(*arguments))
    list(islice(stream(alloys(4), 300, start=(10**6, 3)), 5))
    assert 5 <= len(dealt) <= 7  # a loader may be one or two ahead


def test_structures_are_not_changed_by_noise():
    structures = alloys(3)
    before = [atoms.positions.copy() for atoms in structures]
    list(islice(stream(structures, 300), 6))
    assert all(np.array_equal(atoms.positions, b) for atoms, b in zip(structures, before, strict=True))


def noisy(structures, seed=0):
    return Batches(structures, tm.Denoise(0.1), CUTOFF, seed)


def stream(structures, budget, start=(0, 0), workers=0):
    return training_batches(noisy(structures), count_edges(structures, CUTOFF), budget, start, workers)


def epochs(batches, n):
    """Members of the first n epochs."""
    found: list[list[int]] = [[] for _ in range(n)]
    for dealt in batches:
        if dealt.epoch == n:
            return found
        found[dealt.epoch].extend(dealt.members.tolist())


def same(a: Batch, b: Batch) -> bool:
    tensors = [
        *zip(a.graph[:-1], b.graph[:-1], strict=True),
        *((a.targets[name], b.targets[name]) for name in a.targets),
    ]
    return all(torch.equal(x, y) for x, y in tensors)
