"""Probes and the other strategies of transfer: what each changes, and what it leaves alone."""

from __future__ import annotations

import time

import numpy as np
import pytest

import transfermium as tm
from tests.alloys import QUICK, alloys, potential, same_bits, weights_of
from transfermium.features import features
from transfermium.probe import fitted
from transfermium.report import run_report


def labelled(n: int, seed: int = 0) -> list:
    """A property that depends on composition and volume, hardly on anything else."""
    structures = alloys(n, seed)
    for atoms in structures:
        gold = float(np.mean(atoms.numbers == 79))
        atoms.info["gap"] = 1.5 + gold - 0.05 * atoms.get_volume() / len(atoms) + 0.3 * gold**2
        atoms.calc = None
    return structures


def tune(strategy: str, objective: tm.Objective | None = None, **options):
    structures = labelled(40) if isinstance(objective, tm.Property) or objective is None else alloys(20)
    return tm.finetune(
        potential(), structures, objective or tm.Property("gap"), strategy=strategy,
        **{**QUICK, **options},
    )  # fmt: skip


class TestProbe:
    def test_it_learns_without_touching_the_backbone(self):
        model = tune("probe")
        assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))
        tests = labelled(30, seed=9)
        labels = np.array([atoms.info["gap"] for atoms in tests])
        error = tm.evaluate(model, tests, verbose=False)["gap"]["mae"]
        assert error < 0.2 * np.abs(labels - labels.mean()).mean()

    def test_it_is_a_model_like_others(self, tmp_path):
        model = tune("probe", out=tmp_path / "run")
        again = tm.load(tmp_path / "run")
        assert "Nothing was trained. " in run_report(tmp_path / "run").read_text()
        tests = labelled(5, seed=9)
        one, other = (
            [a.info["gap"] for a in tm.predict(m, [t.copy() for t in tests], verbose=False)] for m in (model, again)
        )
        assert one == pytest.approx(other, rel=1e-12)
        assert again.card["history"][-1]["alignment"]["probe"] in ("ridge", "Gaussian process")
        tuned = tm.finetune(again, labelled(10), tm.Property("gap"), steps=2, **QUICK)  # and can be trained on
        assert isinstance(tuned.heads["gap"], tm.ScalarHead)

    def test_a_model_sees_what_it_was_fitted_to(self):
        model, structures = tune("probe"), labelled(6, seed=3)
        head = model.heads["gap"]
        z = (features(model, structures, verbose=False).values - head.center.numpy()) * head.stretch.numpy()
        alike = np.exp(-0.5 * ((z[:, None] - head.points.numpy()) ** 2).sum(axis=2) / float(head.length) ** 2)
        values = (alike if head.support else z) @ head.weights.numpy() * float(head.scale) + float(head.shift)
        predicted = [atoms.info["gap"] for atoms in tm.predict(model, structures, verbose=False)]
        assert predicted == pytest.approx(values, abs=1e-4)

    def test_sums_grow_with_the_structure(self):
        model = tune("probe", tm.Property("gap", kind="extensive"))
        atoms = labelled(1)[0]
        values = [tm.predict(model, [a], verbose=False)[0].info["gap"] for a in (atoms, atoms.repeat((2, 1, 1)))]
        assert values[1] == pytest.approx(2 * values[0], rel=1e-4)

    def test_the_errors_it_reports_are_those_of_leaving_one_out(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(25, 6))
        y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=25)
        _, report = fitted(x, y)
        assert report["leave-one-out errors"]["Gaussian process"] < 0.7 * np.abs(y - y.mean()).mean()
        _, report = fitted(x, x @ rng.normal(size=6))
        assert report["leave-one-out errors"]["ridge"] < 0.05 and report["features"] == 6

    def test_a_thousand_structures_take_seconds(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 400))
        start = time.process_time()
        fitted(x, np.tanh(x[:, 0]) + x[:, 1])
        assert time.process_time() - start < 60

    @pytest.mark.parametrize(
        ("objective", "words"),
        [
            (tm.Potential(), "a probe learns one number per structure"),
            (tm.Property("gap", task="classification"), "a probe learns one number per structure"),
            (tm.Property("gap", kind="per-atom"), "a probe learns one number per structure"),
        ],
    )
    def test_what_it_cannot_learn_is_said(self, objective, words):
        with pytest.raises(tm.InputError, match=words):
            tune("probe", objective)

    def test_nothing_to_probe_is_said(self):
        with pytest.raises(tm.InputError, match="all structures look the same"):
            fitted(np.ones((10, 4)), np.arange(10.0))
        with pytest.raises(tm.InputError, match="at least three labels"):
            fitted(np.eye(2), np.arange(2.0))


class TestStrategies:
    def test_zero_shot_is_the_base(self):
        assert same_bits(weights_of(tune("zero-shot", tm.Potential())), weights_of(potential()))

    def test_aligned_is_the_base_with_other_references(self):
        model = tune("aligned", tm.Potential())
        changed = [n for n, t in weights_of(model).items() if not (t == weights_of(potential())[n]).all()]
        assert changed == ["heads.energy.references"]

    def test_head_keeps_the_backbone(self):
        model = tune("head", steps=5)
        assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))
        assert model.card["history"][-1]["steps"] == 5

    def test_an_option_that_says_otherwise_is_refused(self):
        with pytest.raises(tm.InputError, match=r"strategy .head. means backbone_lr=0\.0, but backbone_lr is 0\.1"):
            tune("head", backbone_lr=0.1)
        with pytest.raises(tm.InputError, match="strategy 'probe' means steps=0"):
            tune("probe", steps=7)
        with pytest.raises(tm.InputError, match="there is no strategy 'heads': choose among full, head"):
            tune("heads")
