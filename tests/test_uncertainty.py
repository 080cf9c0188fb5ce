"""Intervals hold what they promise, calibration leaves training alone, and models keep both in their files."""

from __future__ import annotations

import functools
import math

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential, same_bits, weights_of, without
from transfermium.errors import InputError
from transfermium.evaluate import printable
from transfermium.graph import to_graph
from transfermium.model import read_tensors, write_tensors
from transfermium.transfer.calibrate import judge_choice, narrowest
from transfermium.uncertainty import (
    CrossChoice,
    Interval,
    Judged,
    Spread,
    Uncertainty,
    folds,
    judged,
    percent,
    scale,
    scores,
    seen,
)

RUN = {"edges": 400, "device": "cpu", "verbose": False, "lr": 0.02, "ema": 0.0, "validate_every": 3}


@functools.cache
def calibrated() -> tm.Model:
    """A potential of alloys with intervals from 30 validation structures; leave it as it is."""
    return tm.pretrain(alloys(15), tm.Potential(), painn(), valid=alloys(30, seed=5), steps=30, **RUN)


def interval(values: np.ndarray, scaled: str = "") -> Interval:
    return Interval(Judged("x", "number"), "x", "", np.sort(values), scaled)


class TestTheory:
    """On synthetic data whose law is known."""

    @pytest.mark.parametrize("n", [20, 57, 200])
    @pytest.mark.parametrize("level", [0.5, 0.9])
    def test_the_mean_coverage_is_the_level(self, n, level):
        """Exactly k/(n + 1) for the k-th smallest of n scores, whatever their law: here one with heavy tails."""
        rng = np.random.default_rng(0)
        held = []
        for _ in range(2000):
            drawn = np.abs(rng.standard_t(2, size=n + 20))
            held.append((drawn[n:] <= interval(drawn[:n]).width(level)).mean())
        expected = math.ceil((n + 1) * level) / (n + 1)
        assert np.mean(held) == pytest.approx(expected, abs=4 * np.std(held) / math.sqrt(len(held)))
        assert level <= expected < level + 1 / n

    def test_scaled_intervals_cover_too_and_are_narrower_where_errors_grow_with_distance(self):
        rng = np.random.default_rng(1)
        held, gains, taken = [], [], 0
        for _ in range(300):
            distance2 = rng.chisquare(3, size=600)
            errors = np.abs(rng.normal(size=600)) * np.sqrt(0.1 + distance2)
            s = scale("distance", distance2 / np.median(distance2[:100]))
            taken += narrowest(errors[:100], {"distance": s[:100]}) == "distance"
            half = interval(errors[:100] / s[:100]).width(0.9) * s[100:]
            held.append((errors[100:] <= half).mean())
            gains.append(half.mean() / interval(errors[:100]).width(0.9))
        assert np.mean(held) == pytest.approx(0.9, abs=0.01)
        assert np.mean(gains) < 0.95 and taken > 200

    def test_a_scale_without_meaning_is_not_taken(self):
        rng = np.random.default_rng(2)
        errors, noise = np.abs(rng.normal(size=(200, 300))), np.exp(0.7 * rng.normal(size=(200, 300)))
        assert np.mean([narrowest(e, {"distance": s}) == "" for e, s in zip(errors, noise, strict=True)]) > 0.95

    def test_the_choice_of_a_checkpoint_does_not_flatter_the_intervals(self):
        """Of 30 checkpoints that are equally good, the best on 20 structures has errors that are too small there."""
        rng = np.random.default_rng(3)
        n, level, held, naive = 20, 0.9, [], []
        for _ in range(400):
            errors = np.abs(rng.normal(size=(30, n)))  # of each checkpoint on each validation structure
            best = errors.mean(axis=1).argmin()
            fold = np.arange(n) % 10
            own = [errors[errors[:, fold != f].mean(axis=1).argmin(), i] for i, f in enumerate(fold)]
            new = np.abs(rng.normal(size=200))
            held.append((new <= interval(np.array(own)).width(level)).mean())
            naive.append((new <= interval(errors[best]).width(level)).mean())
        assert np.mean(naive) < 0.86 < 0.88 < np.mean(held) < 0.94

    def test_a_level_beyond_the_number_of_scores_is_refused(self):
        with pytest.raises(InputError, match=r"more than 20 calibration structures: ask for 0\.952 at most"):
            interval(np.arange(20.0)).width(0.99)
        for n in (22, 57, 200, 2000):
            with pytest.raises(InputError, match="ask for") as refused:
                interval(np.arange(float(n))).width(0.9999)
            interval(np.arange(float(n))).width(float(str(refused.value).split()[-3]))
        assert interval(np.arange(19.0)).width(0.95) == 18.0

    def test_distances_are_those_of_mahalanobis(self):
        rng = np.random.default_rng(4)
        mixed = rng.normal(size=(2000, 5)) @ rng.normal(size=(5, 5)) + 3.0
        x = rng.normal(size=(7, 5)) + 3.0
        away = x - mixed.mean(axis=0)
        expected = np.einsum("ij,jk,ik->i", away, np.linalg.inv(np.cov(mixed.T, bias=True)), away)
        assert Spread.of(mixed).distance2(x) == pytest.approx(expected, rel=0.05)

    def test_what_never_varied_in_training_is_far_away(self):
        rng = np.random.default_rng(5)
        x = np.hstack([rng.normal(size=(100, 3)), np.ones((100, 1))])
        near, far = np.array([[0, 0, 0, 1.0]]), np.array([[0, 0, 0, 2.0]])
        spread = Spread.of(x)
        assert spread.distance2(far)[0] > 100 * max(spread.distance2(near)[0], 1.0)


class TestScores:
    def test_of_forces_nine_atoms_of_ten_stay_below(self):
        atoms = [bulk("Cu", cubic=True), bulk("Cu")]
        graph = to_graph(atoms, tm.PaiNN(8, 1, cutoff=3.0).edges)
        target = torch.zeros(5, 3)
        output = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0], [4.0, 0, 0], [3.0, 4.0, 0]])
        found = scores(Judged("forces", "atoms"), output, target, graph)
        assert found == pytest.approx([np.quantile([1, 2, 3, 4], 0.9), 5.0])
        target[4, 0] = math.nan
        assert np.isnan(scores(Judged("forces", "atoms"), output, target, graph)[1])

    def test_energies_count_per_atom_and_tensors_by_their_worst_component(self):
        graph = to_graph([bulk("Cu", cubic=True)], tm.PaiNN(8, 1, cutoff=3.0).edges)
        assert scores(Judged("energy", "sum"), torch.tensor([2.0]), torch.tensor([-6.0]), graph) == [2.0]
        output = torch.arange(9.0).reshape(1, 3, 3)
        assert scores(Judged("stress", "tensor"), output, torch.zeros(1, 3, 3), graph) == [8.0]

    def test_only_labels_are_judged(self):
        model = calibrated()
        kinds = {name: one.kind for name, one in judged(model, tm.Potential()).items()}
        assert kinds == {"energy": "sum", "forces": "atoms", "stress": "tensor"}
        assert judged(model, tm.Denoise(0.1)) == {}
        assert judged(model, tm.Property("metal", task="classification")) == {}
        assert judged(model, tm.Property("charge", kind="per-atom"))["charge"].kind == "atoms"
        assert judged(model, tm.Property("alpha", kind="extensive"))["alpha"].kind == "sum"

    def test_materials_are_never_divided(self):
        structures = alloys(60)
        for k, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{k // 3}"
        found = folds(structures).reshape(20, 3)
        assert (found == found[:, :1]).all() and len(np.unique(found)) == 10
        assert sorted(np.bincount(folds(alloys(1) * 201))) == [100, 101]
        for k, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{k // 20}"
        found = folds(structures).reshape(3, 20)
        assert (found == found[:, :1]).all() and len(np.unique(found)) == 3


class TestTraining:
    def test_weights_and_metrics_are_those_of_a_run_without(self, tmp_path):
        data, valid = alloys(10), alloys(24, seed=3)
        models = [
            tm.pretrain(data, tm.Potential(), painn(), valid=valid, steps=12, calibrate=c, out=tmp_path / str(c), **RUN)
            for c in (True, False)
        ]
        assert same_bits(*map(weights_of, models))
        config, losses = (
            [(tmp_path / str(c) / name).read_text() for c in (True, False)] for name in ("config.json", "metrics.jsonl")
        )
        assert config[0] == config[1]
        assert [line.split('"elapsed"')[0] for line in losses[0].splitlines()] == [
            line.split('"elapsed"')[0] for line in losses[1].splitlines()
        ]
        assert models[1].card["uncertainty"] == {"none": "no calibration was asked for"}
        assert models[1].attached.keys() == {"seen"}

    def test_each_fold_is_judged_by_the_checkpoint_that_the_others_choose(self):
        """Against all checkpoints of a run, kept by hand."""
        torch.manual_seed(1)
        valid = alloys(24, seed=3)
        for atoms in valid[:12]:  # they choose otherwise than the rest
            atoms.calc.results["forces"] = -atoms.calc.results["forces"]
        labelled = tm.data.Labelled(valid, tm.data.resolve(valid, [], optional=["energy", "forces", "stress"]))
        objective = tm.Potential(energy=1.0, forces=1.0, stress=0.0, rounding={})
        model = tm.Model(painn(), objective.outputs(8))
        cross = CrossChoice(model, objective, labelled)
        config = tm.TrainConfig(steps=12, lr=0.05, validate_every=2, ema=0.0, edges=400, device="cpu")
        data = tm.data.Labelled(alloys(10), tm.data.resolve(alloys(10), [], optional=["energy", "forces", "stress"]))
        kept: list[dict[str, np.ndarray]] = []
        settle = cross.settle

        def keep() -> None:
            own = {name: np.concatenate([found[name] for _, found in cross._seen]) for name in cross.judged}
            order = np.concatenate([members for members, _ in cross._seen])
            kept.append({name: values[np.argsort(order)] for name, values in own.items()})
            model.eval()
            outputs = [model(to_graph([atoms], model.backbone.edges), ["energy", "forces"]) for atoms in valid]
            truth = [atoms.calc.results for atoms in valid]
            energy = [abs(float(o["energy"]) - t["energy"]) / 4 for o, t in zip(outputs, truth, strict=True)]
            forces = [np.abs(o["forces"].numpy() - t["forces"]).mean() for o, t in zip(outputs, truth, strict=True)]
            kept[-1]["loss"] = np.array(energy) + np.array(forces)
            settle()

        cross.settle = keep  # type: ignore[method-assign]
        for _ in tm.train(model, objective, data, config, valid=labelled, cross=cross):
            pass
        assert len(kept) == 7
        losses = np.array([one["loss"] for one in kept])
        chosen = []
        for fold in np.unique(cross.folds):
            best = losses[:, cross.folds != fold].mean(axis=1).argmin()
            chosen.append(best)
            here = cross.folds == fold
            assert cross.scores["forces"][here] == pytest.approx(kept[best]["forces"][here])
        assert len(set(chosen)) > 1, "or one checkpoint for all would pass too"

    def test_a_run_that_was_stopped_ends_with_the_same_intervals(self, tmp_path):
        data, valid = alloys(10), alloys(24, seed=3)
        labelled, judges = (
            tm.data.Labelled(some, tm.data.resolve(some, ["energy", "forces"])) for some in (data, valid)
        )
        found = []
        for stop in (None, 7):
            torch.manual_seed(0)
            objective = tm.Potential(energy=1.0, forces=1.0, stress=0.0, rounding={})
            config = tm.TrainConfig(steps=12, lr=0.05, validate_every=2, ema=0.0, edges=400, device="cpu")
            for last in (stop, None) if stop else (None,):
                torch.manual_seed(0)
                model = tm.Model(painn(), objective.outputs(8))
                cross = CrossChoice(model, objective, judges)
                out = tmp_path / str(stop)
                out.mkdir(exist_ok=True)
                run = tm.train(model, objective, labelled, config, valid=judges, out=out, save_every=0.0, cross=cross)
                for progress in run:
                    if progress.step == last:
                        break
            found.append(cross)
        assert all(np.array_equal(found[0].scores[name], found[1].scores[name]) for name in found[0].scores)
        state, _ = read_tensors(tmp_path / "None" / "state.safetensors")
        older = {name: tensor for name, tensor in state.items() if not name.startswith("cross")}
        assert older.keys() < state.keys()
        found[0].restore(older)
        assert not found[0].whole  # a state of an earlier version

    @pytest.mark.parametrize(
        ("valid", "reason"),
        [(0, "nothing was validated"), (6, "6 validation structures are too few for an interval, which needs 20")],
    )
    def test_few_structures_give_no_interval_but_a_reason(self, valid, reason, capsys):
        options = {"valid": alloys(valid, seed=1)} if valid else {"valid_fraction": 0}
        model = tm.pretrain(alloys(6), tm.Potential(), painn(), steps=1, **options, **RUN)
        assert model.card["uncertainty"] == {"none": reason}
        tm.predict(model, alloys(1), interval=0.9)
        assert reason in " ".join(capsys.readouterr().err.split())

    def test_few_labels_of_one_kind_give_no_interval_of_it(self):
        valid = [*alloys(10, seed=1), *without(alloys(15, seed=2), "stress")]
        model = tm.pretrain(alloys(10), tm.Potential(), painn(), valid=valid, steps=1, **RUN)
        targets = model.card["uncertainty"]["targets"]
        assert targets["stress"]["none"] == "10 labels are too few for an interval, which needs 20"
        atoms = tm.predict(model, alloys(1), interval=0.9, verbose=False)[0]
        assert "forces_error90" in atoms.info and "stress_error90" not in atoms.info

    def test_the_best_of_several_models_is_judged_as_they_were_chosen(self):
        one, other = (copy_of(calibrated()) for _ in range(2))
        fold = one.attached["folds"].numpy()
        high, low = torch.full((30,), 2.0), torch.full((30,), 1.0)
        low[torch.from_numpy(fold == fold[0])] = 100.0  # without this fold, the other model is better
        for name in ("energy", "forces", "stress"):
            one.attached[f"scores {name}"], other.attached[f"scores {name}"] = high.clone(), low.clone()
        judge_choice(one, [one, other])
        expected = np.where(fold == fold[0], 100.0, 2.0)
        assert one.attached["scores forces"].numpy() == pytest.approx(expected)
        assert one.card["uncertainty"]["chosen among"] == 2

    def test_auto_keeps_intervals_of_the_rung_it_takes(self):
        model = tm.finetune(
            calibrated(), alloys(60), tm.Property("gap"), strategy="auto", valid_fraction=0.4, steps=1, **QUICK
        )
        known = model.card["uncertainty"]
        assert known["chosen among"] >= 4 and known["targets"]["gap"]["n"] == 24


class TestPrediction:
    def test_keys_and_values(self):
        model, structures = calibrated(), alloys(5, seed=8)
        doubt = Uncertainty.of(model)
        assert doubt is not None
        for atoms in tm.predict(model, structures, interval=0.9, verbose=False):
            info, energy = atoms.info, atoms.get_potential_energy()
            assert info["energy_low90"] < energy < info["energy_high90"]
            assert info["energy_high90"] - energy == pytest.approx(energy - info["energy_low90"])
            assert info["forces_error90"] > 0 and info["stress_error90"] > 0
            distance = (
                np.sqrt(doubt.spread.distance2(seen(model, to_graph([atoms], model.backbone.edges)))) / doubt.edge
            )
            assert info["training_distance"] == pytest.approx(distance[0], rel=1e-4)
            assert info["far"] == (distance[0] > 1)
        assert "energy_low50" in tm.predict(model, structures, interval=0.5, verbose=False)[0].info
        assert percent(0.955) == "95.5"

    def test_nothing_changes_unless_asked(self):
        plain, more = (tm.predict(calibrated(), alloys(2), interval=i, verbose=False)[0] for i in (None, 0.9))
        assert plain.get_potential_energy() == more.get_potential_energy()
        assert plain.info.keys() == {"gap"} and {"far", "energy_low90"} < more.info.keys()

    def test_what_is_unlike_the_training_data_is_far(self):
        hot = alloys(1)[0]
        hot.positions += np.random.default_rng(0).normal(size=(4, 3))
        nickel = bulk("Ni", cubic=True)
        found = tm.predict(calibrated(), [hot, nickel, *alloys(10)], interval=0.9, verbose=False)
        assert [atoms.info["far"] for atoms in found[:2]] == [True, True]
        assert np.mean([atoms.info["far"] for atoms in found[2:]]) < 0.5
        assert found[0].info["forces_error90"] >= np.median([atoms.info["forces_error90"] for atoms in found[2:]])

    def test_a_model_without_leaves_none_of_another(self):
        first = tm.predict(calibrated(), alloys(2), interval=0.9, verbose=False)
        first[0].info |= {"gap_low90": 1.0, "energy_lowest": 2.0}
        for atoms in tm.predict(potential(), first, interval=0.9, verbose=False):
            assert not {"energy_low90", "energy_high90", "forces_error90", "far", "training_distance"} & set(atoms.info)
        again = tm.predict(potential(), first[:1], verbose=False)[0]
        assert again.info["gap_low90"] == 1.0 and again.info["energy_lowest"] == 2.0

    def test_how_many_labels_they_hold(self, capsys):
        structures = alloys(40, seed=9)
        wide, narrow = (tm.evaluate(calibrated(), structures, interval=level) for level in (0.9, 0.3))
        for name in ("energy_per_atom", "forces", "stress"):
            assert 0.75 <= wide[name]["coverage"] <= 1 and narrow[name]["coverage"] < 0.7
        assert "coverage" in printable(wide)[0] and "90 % intervals" in " ".join(capsys.readouterr().err.split())
        assert "coverage" not in tm.evaluate(calibrated(), structures, verbose=False)["forces"]
        predicted = tm.predict(calibrated(), structures, interval=0.9, verbose=False)
        lengths = [
            np.linalg.norm(a.get_forces() - b.get_forces(), axis=1) for a, b in zip(predicted, structures, strict=True)
        ]
        held = [np.quantile(e, 0.9) <= a.info["forces_error90"] for e, a in zip(lengths, predicted, strict=True)]
        assert wide["forces"]["coverage"] == pytest.approx(np.mean(held))
        both = tm.Together({"one": tm.Potential(), "two": tm.Property("gap")})
        data, valid = ({"one": alloys(8, seed=s), "two": alloys(30, seed=s + 1)} for s in (0, 5))
        model = tm.pretrain(data, both, painn(), valid=valid, steps=2, **RUN)
        assert 0 <= tm.evaluate(model, structures, interval=0.9, verbose=False)["gap"]["coverage"] <= 1
        with pytest.raises(InputError, match="must be a probability"):
            tm.evaluate(model, structures, interval=90, verbose=False)
        assert "coverage" not in tm.evaluate(gap_model(), alloys(5), interval=0.9, verbose=False)["gap"]

    def test_few_materials_are_said(self, capsys):
        model, valid = copy_of(calibrated()), alloys(30, seed=5)
        assert model.card["uncertainty"]["materials"] == len({a.get_chemical_formula() for a in valid})
        tm.predict(model, alloys(2), interval=0.9)
        assert "of 5 materials only: of others fewer" in " ".join(capsys.readouterr().err.split())
        model.card["uncertainty"]["materials"] = 10
        tm.predict(model, alloys(2), interval=0.9)
        assert "only" not in capsys.readouterr().err

    def test_they_survive_the_file_and_old_files_have_none(self, tmp_path):
        model = calibrated()
        model.save(tmp_path / "model.safetensors")
        again = tm.load(tmp_path / "model.safetensors")
        one, other = (tm.predict(m, alloys(2), interval=0.9, verbose=False) for m in (model, again))
        assert all(a.info == pytest.approx(b.info, rel=1e-9) for a, b in zip(one, other, strict=True))
        tensors, metadata = read_tensors(tmp_path / "model.safetensors")
        bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("attached.")}
        write_tensors(tmp_path / "damaged.safetensors", bare, metadata)
        with pytest.raises(InputError, match="record of its uncertainty is damaged"):
            tm.predict(tmp_path / "damaged.safetensors", alloys(1), interval=0.9, verbose=False)
        assert Uncertainty.of(gap_model()) is None

    def test_a_learned_deviation_may_scale_them(self):
        objective = tm.Property("gap", uncertainty=True)
        model = tm.pretrain(alloys(20), objective, painn(), valid=alloys(30, seed=1), steps=40, **RUN)
        model.card["uncertainty"]["targets"]["gap"]["scaled by"] = "gap_std"
        model.attached["scale gap_std"] = torch.ones(30)
        atoms = tm.predict(model, alloys(4), interval=0.9, verbose=False)
        widths = np.array([a.info["gap_high90"] - a.info["gap_low90"] for a in atoms])
        assert widths / [a.info["gap_std"] for a in atoms] == pytest.approx(
            widths[0] / atoms[0].info["gap_std"], rel=1e-5
        )

    def test_parts_have_their_own(self):
        objective = tm.Together({"one": tm.Potential(), "two": tm.Potential()})
        data, valid = ({"one": alloys(8, seed=s), "two": alloys(30, seed=s + 1)} for s in (0, 5))
        model = tm.pretrain(data, objective, painn(), valid=valid, steps=2, **RUN)
        both = model.card["uncertainty"]["targets"]
        assert both["one energy"]["n"] == 8 and both["two energy"]["n"] == 30
        assert "energy_low90" in tm.predict(model, alloys(1), part="two", interval=0.9, verbose=False)[0].info
        assert "energy_low90" not in tm.predict(model, alloys(1), part="one", interval=0.9, verbose=False)[0].info

    def test_beside_replay_the_new_task_is_judged(self):
        model = tm.finetune(
            calibrated(), alloys(10, seed=3), tm.Potential(), strategy="replay", replay=alloys(20, seed=4), steps=2,
            valid=alloys(24, seed=6), **RUN,
        )  # fmt: skip
        targets = model.card["uncertainty"]["targets"]
        assert {name: one["output"] for name, one in targets.items()} == {n: n for n in ("energy", "forces", "stress")}
        assert "forces_error90" in tm.predict(model, alloys(1), interval=0.9, verbose=False)[0].info

    def test_the_calculator_has_them_where_asked(self):
        atoms = alloys(1)[0]
        expected = tm.predict(calibrated(), [atoms], interval=0.9, verbose=False)[0].info
        atoms.calc = tm.Calculator(calibrated(), interval=0.9)
        atoms.get_forces()
        for name in ("energy_low90", "forces_error90", "training_distance"):
            assert atoms.calc.results[name] == pytest.approx(expected[name], rel=1e-4)
        with pytest.raises(InputError, match="has no intervals: 2 validation structures are too few"):
            tm.Calculator(tm.pretrain(alloys(12), tm.Potential(), painn(), steps=0, **QUICK), interval=0.9)

    @pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
    def test_a_level_is_a_probability(self, level):
        with pytest.raises(InputError, match="must be a probability between 0 and 1"):
            tm.predict(calibrated(), alloys(1), interval=level, verbose=False)

    def test_the_command_line_writes_them(self, tmp_path, monkeypatch, capsys):
        from transfermium import cli

        monkeypatch.chdir(tmp_path)
        calibrated().save("m.safetensors")
        ase.io.write("a.extxyz", alloys(3))
        cli.main(["predict", "m.safetensors", "a.extxyz", "--out", "p.csv", "--device", "cpu"])
        header, *rows = (tmp_path / "p.csv").read_text().splitlines()
        assert {"energy_low90", "energy_high90", "forces_error90", "training_distance", "far"} <= set(header.split(","))
        assert len(rows) == 3 and "90 % intervals" in capsys.readouterr().err


def copy_of(model: tm.Model) -> tm.Model:
    import copy

    return copy.deepcopy(model)
