"""What is suggested tells most of the rest, is never the same twice, and its beginning is a choice of its own."""

from __future__ import annotations

import json

import ase.io
import numpy as np
import pytest

import transfermium as tm
from tests.alloys import alloys, potential
from transfermium.errors import InputError
from transfermium.suggest import NOISE, chosen, components, printable


def drawn(n: int = 60, k: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return components(rng.normal(size=(n, k)) * 2.0 ** -np.arange(k) + 5.0, n)


def remaining(pool: np.ndarray, rows: np.ndarray) -> float:
    """The fraction of the variance over the pool that labels of these rows leave, from the textbook formula."""
    posterior = np.linalg.inv(np.eye(pool.shape[1]) + rows.T @ rows / NOISE)
    return float(np.trace(pool @ posterior @ pool.T) / np.trace(pool @ pool.T))


class TestChoice:
    @pytest.mark.parametrize("method", ["variance", "k-center", "random"])
    def test_what_is_left_is_what_bayes_leaves(self, method):
        pool, known = drawn(), drawn(5, seed=1)
        order, left = chosen(pool, 12, known, method, np.random.default_rng(0))
        expected = [remaining(pool, np.vstack([known, pool[order[: k + 1]]])) for k in range(12)]
        assert left == pytest.approx(expected) and len(set(order)) == 12

    def test_each_is_the_best_that_could_come_next(self):
        pool = drawn()
        order, left = chosen(pool, 5, pool[:0], "variance", np.random.default_rng(0))
        for k in range(5):
            rest = [remaining(pool, pool[[*order[:k], j]]) for j in range(len(pool)) if j not in order[:k]]
            assert left[k] == pytest.approx(min(rest))

    def test_a_batch_leaves_less_than_a_random_one_and_than_the_most_uncertain_alone(self):
        pool = drawn(200)
        none = pool[:0]
        best = chosen(pool, 10, none, "variance", np.random.default_rng(0))[1][-1]
        lots = [chosen(pool, 10, none, "random", np.random.default_rng(s))[1][-1] for s in range(20)]
        alone = np.argsort(-np.square(pool).sum(axis=1))[:10]
        assert best < min(lots) and best < remaining(pool, pool[alone])

    def test_twins_are_not_taken_before_all_else_is(self):
        pool = drawn(10)
        order, _ = chosen(np.vstack([pool, pool]), 10, pool[:0], "k-center", np.random.default_rng(0))
        assert sorted(k % 10 for k in order) == list(range(10))
        order, _ = chosen(np.vstack([pool, pool]), 3, pool[:0], "variance", np.random.default_rng(0))
        assert len({k % 10 for k in order}) == 3

    def test_the_beginning_of_an_order_is_a_choice_of_its_own(self):
        pool = drawn()
        few, many = (chosen(pool, n, pool[:0], "variance", np.random.default_rng(0))[0] for n in (4, 9))
        assert many[:4] == few

    def test_what_is_labelled_is_not_asked_again(self):
        rng = np.random.default_rng(0)
        two = np.concatenate([rng.normal(x, 0.1, size=(30, 2)) for x in (3, -3)])
        pool = components(two, 60)
        first = chosen(pool, 1, pool[:30], "k-center", np.random.default_rng(0))[0][0]
        assert first >= 30

    def test_equal_structures_leave_nothing_to_choose(self):
        with pytest.raises(InputError, match="look the same to this model"):
            components(np.ones((4, 3)), 4)


class TestSuggest:
    def test_it_gives_copies_with_their_place_in_the_pool(self, tmp_path):
        pool = alloys(30)
        found = tm.suggest(potential(), pool, 6, tmp_path / "next.extxyz", device="cpu", verbose=False)
        assert [atoms.calc for atoms in found] == [None] * 6
        for atoms in found:
            assert np.array_equal(atoms.positions, pool[atoms.info["pool_index"]].positions)
        left = [atoms.info["remaining"] for atoms in found]
        assert left == sorted(left, reverse=True) and 0 < left[-1] < left[0] < 1
        written = ase.io.read(tmp_path / "next.extxyz", ":")
        assert [atoms.info["pool_index"] for atoms in written] == [atoms.info["pool_index"] for atoms in found]
        assert [row["rank"] for row in printable(found)] == [1, 2, 3, 4, 5, 6]

    def test_batches_of_the_model_do_not_matter(self):
        orders = [
            [a.info["pool_index"] for a in tm.suggest(potential(), alloys(20), 5, edges=e, device="cpu", verbose=False)]
            for e in (100, 10_000)
        ]
        assert orders[0] == orders[1]

    def test_labelled_structures_are_passed_over(self):
        pool = alloys(20)
        first = tm.suggest(potential(), pool, 1, device="cpu", verbose=False)[0]
        options = {"labelled": [first] * 50, "device": "cpu", "verbose": False}
        assert tm.suggest(potential(), pool, 1, **options)[0].info["pool_index"] != first.info["pool_index"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n": 0}, "between 1 and the 5 structures of the pool"),
            ({"n": 6}, "between 1 and the 5 structures of the pool"),
            ({"method": "best"}, "there is no method 'best': choose among variance, k-center, random"),
            ({"out": "next.csv"}, "not an .extxyz file"),
        ],
    )
    def test_errors_are_one_sentence(self, options, words):
        with pytest.raises(InputError, match=words):
            tm.suggest(potential(), alloys(5), **{"n": 2, "verbose": False, **options})

    def test_what_is_labelled_is_not_asked_for(self, capsys):
        pool = alloys(12)
        found = tm.suggest(potential(), pool, 3, labelled=[pool[k].copy() for k in (0, 5)])
        assert "2 of 12 structures are labelled already: left out" in " ".join(capsys.readouterr().err.split())
        assert not {0, 5} & {atoms.info["pool_index"] for atoms in found}
        assert all((pool[a.info["pool_index"]].positions == a.positions).all() for a in found)
        with pytest.raises(InputError, match="n is 11, but of the pool only 10"):
            tm.suggest(potential(), pool, 11, labelled=pool[:2], verbose=False)

    def test_the_command_line(self, tmp_path, monkeypatch, capsys):
        from transfermium import cli

        monkeypatch.chdir(tmp_path)
        potential().save("m.safetensors")
        pool = alloys(12)
        for atoms in pool:
            atoms.info["gap"] = np.nan
        ase.io.write("pool.extxyz", pool)
        cli.main(["suggest", "m.safetensors", "pool.extxyz", "--n", "3", "--out", "next.extxyz", "--device", "cpu"])
        assert "variance left" in capsys.readouterr().out
        cli.main(["suggest", "m.safetensors", "pool.extxyz", "--n", "3", "--out", "next.extxyz", "--json"])
        rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert all(row["gap"] is None for row in rows)
        assert [row["pool_index"] for row in rows] == [a.info["pool_index"] for a in ase.io.read("next.extxyz", ":")]
