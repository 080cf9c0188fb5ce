"""Probes and the other strategies of transfer: what each changes, and what it leaves alone."""

from __future__ import annotations

import time

import numpy as np
import pytest

import transfermium as tm
from tests.alloys import QUICK, alloys, potential, same_bits, weights_of
from transfermium.features import features
from transfermium.report import run_report
from transfermium.transfer.probe import PENALTIES, _missed, fitted, told_of_probe


def labelled(n: int, seed: int = 0) -> list:
    """A property that depends on composition and volume, hardly on anything else."""
    structures = alloys(n, seed)
    for atoms in structures:
        gold = float(np.mean(atoms.numbers == 79))
        atoms.info["gap"] = 1.5 + gold - 0.05 * atoms.get_volume() / len(atoms) + 0.3 * gold**2
        atoms.calc = None
    return structures


def frames(n_materials: int, n_frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and labels of frames that are much alike within a material, and the materials."""
    groups = np.repeat(np.arange(n_materials), n_frames)
    x = rng.normal(size=(n_materials, 2))[groups] + 0.03 * rng.normal(size=(len(groups), 2))
    x = np.hstack([x, x**2, np.sin(3 * x), np.cos(3 * x), np.tanh(x)])
    return x, np.sin(x[:, 0]) + 0.1 * rng.normal(size=n_materials)[groups], groups


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

    def test_a_material_is_left_out_with_all_its_frames(self):
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

        x, y, groups = frames(9, 4, np.random.default_rng(0))
        for seen in (x[:, :2], x):  # materials have more frames than features, or fewer
            _, report = fitted(seen, y, groups=groups)
            z = (seen - seen.mean(axis=0)) / seen.std(axis=0) / np.sqrt(seen.shape[1])
            found = [
                np.abs(y - cross_val_predict(Ridge(penalty), z, y, groups=groups, cv=LeaveOneGroupOut())).mean()
                for penalty in PENALTIES / seen.shape[1]
            ]
            assert report["leave-one-out errors"]["ridge"] == pytest.approx(min(found), rel=1e-9)
            assert report["materials"] == 9

    def test_what_a_process_says_of_a_material_is_what_it_says_when_fitted_without_it(self):
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, WhiteKernel
        from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

        x, y, groups = frames(5, 4, np.random.default_rng(0))
        process = GaussianProcessRegressor(RBF(2.0) + WhiteKernel(0.1), optimizer=None)
        inverse = np.linalg.inv(RBF(2.0)(x) + 0.1 * np.eye(len(y)))
        missed = np.concatenate([_missed(inverse, inverse @ y, np.flatnonzero(groups == g)) for g in range(5)])
        expected = y - cross_val_predict(process, x, y, groups=groups, cv=LeaveOneGroupOut())
        assert missed == pytest.approx(expected, rel=1e-8)

    def test_frames_do_not_vouch_for_each_other(self):
        rng = np.random.default_rng(0)
        x, _, groups = frames(40, 5, rng)
        y = np.repeat(rng.normal(size=40), 5)  # of a material, and nothing else tells it
        alone, together = (fitted(x, y, groups=of)[1]["leave-one-out errors"] for of in (None, groups))
        spread = np.abs(y - y.mean()).mean()
        assert min(alone.values()) < 0.2 * spread
        assert 0.9 * spread < min(together.values()) < 1.2 * spread

    def test_frames_are_left_out_where_materials_tell_nothing(self):
        x, y, _ = frames(10, 2, np.random.default_rng(0))
        expected = fitted(x, y)[1]
        assert "errors without one structure: " in told_of_probe(expected)
        for groups in (np.arange(20), np.zeros(20, int)):
            assert fitted(x, y, groups=groups)[1] == expected

    def test_materials_are_those_of_the_ids(self):
        structures = labelled(40)
        for index, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{index // 4}"
        model = tm.finetune(potential(), structures, tm.Property("gap"), strategy="probe", **QUICK)
        report = model.card["history"][-1]["alignment"]
        assert report["materials"] == 10 and "errors without one of 10 materials" in told_of_probe(report)
        assert "materials" not in tune("probe").card["history"][-1]["alignment"]

    def test_a_thousand_structures_take_seconds(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(1000, 400))
        start = time.process_time()
        fitted(x, np.tanh(x[:, 0]) + x[:, 1], groups=np.arange(1000) // 4)
        assert time.process_time() - start < 60

    @pytest.mark.parametrize(
        ("objective", "words"),
        [
            (tm.Potential(conservative=False), "a probe learns one number per structure"),
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
        with pytest.raises(tm.InputError, match="there is no strategy 'heads': choose among full, "):
            tune("heads")
