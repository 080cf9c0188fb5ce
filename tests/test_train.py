"""The one loop: it resumes exactly, keeps the best weights and stops when told."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch

import transfermium as tm
from tests.alloys import alloys as raw_alloys
from tests.alloys import painn, ready, same_bits, weights_of, without
from transfermium import cli
from transfermium.data import Labelled
from transfermium.data.load import VALIDATION, Batches, count_edges, plan
from transfermium.model import read_tensors, write_tensors
from transfermium.optim import AdamW
from transfermium.train import TrainConfig, _Run, evaluate_loss, layers, parse_time, read_metrics, train

STEPS = 14
OBJECTIVE = tm.Potential(energy=1.0, forces=1.0, stress=1.0)

# The real command line; it saves at every step, and dies after a given row of metrics or within a given write.
COMMAND = """
import os, signal, sys
import torch
import transfermium.cli

train = sys.modules["transfermium.train"]  # the package's own name `train` is the function
torch.set_num_threads(1)
point, _, count = sys.argv.pop(1).partition(":")
left = int(count or 0)

def dying_at(name, function):
    def call(*args, **kwargs):
        global left
        left -= name == point
        if name == point and left == 0 and name == "replace":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if name == point and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

train.train.__kwdefaults__["save_every"] = 0.0
train.Metrics.write = dying_at("row", train.Metrics.write)
os.replace = dying_at("replace", os.replace)
transfermium.cli.main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "alloys.extxyz"
    ase.io.write(path, raw_alloys(16))
    return path


@pytest.fixture(scope="module")
def untouched(data) -> Path:
    """The folder of a run that nobody touched."""
    result = run(data, data.parent / "untouched")
    assert result.returncode == 0, result.stderr
    return data.parent / "untouched"


class TestKilled:
    """A run that is killed with SIGKILL and started again is bit for bit the run that nobody touched."""

    # After a row but before its state is saved, or with a state half written.
    @pytest.mark.parametrize(
        ("workers", "deaths"), [(0, ["row:3", "replace:8", "row:4"]), (1, ["row:5"])], ids=["in one process", "worker"]
    )
    def test_the_same_command_ends_bit_for_bit_as_if_untouched(self, data, untouched, workers, deaths):
        out = data.parent / f"killed-{workers}"
        for death in deaths:
            assert run(data, out, workers, death).returncode == -signal.SIGKILL
        assert not (out / "model.safetensors").exists()
        assert run(data, out, workers).returncode == 0

        tensors, expected = (read_tensors(folder / "model.safetensors")[0] for folder in (out, untouched))
        assert same_bits(tensors, expected)
        assert [row["step"] for row in rows_of(out)] == list(range(STEPS + 1))  # zero is the validation at the start
        for name in ("forces", "valid", "lr", "epoch"):
            assert [row.get(name) for row in rows_of(out)] == [row.get(name) for row in rows_of(untouched)]
        assert card_of(out)["metrics"] == card_of(untouched)["metrics"]

    def test_a_finished_command_returns_at_once(self, data, untouched):
        written = {path.name: path.stat().st_mtime_ns for path in untouched.glob("*.safetensors")}
        cli.main(options(data, untouched))
        assert written == {path.name: path.stat().st_mtime_ns for path in untouched.glob("*.safetensors")}

    def test_another_command_is_refused_with_the_name_of_the_difference(self, data, untouched, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*options(data, untouched), "--lr", "0.02"])
        assert stopped.value.code == 2
        assert "holds another run: train.lr was 0.01 there and is 0.02 now" in capsys.readouterr().err


def options(data: Path, out: Path, workers: int = 0) -> list[str]:
    model = "--objective Denoise --backbone PaiNN --backbone.width 8 --backbone.depth 1 --backbone.cutoff 4"
    training = f"--lr 0.01 --steps {STEPS} --edges 400 --workers {workers} --device cpu"
    return f"pretrain {data} {model} {training} --out {out}".split()


def run(data: Path, out: Path, workers: int = 0, death: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, death, *options(data, out, workers)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def card_of(out: Path) -> dict[str, Any]:
    return tm.load(out / "model.safetensors").card


class TestInterrupted:
    """A loop that is left, in the same process."""

    def test_it_goes_on_where_it_last_saved(self, tmp_path):
        structures, config = alloys(8), quick(steps=10)
        whole = finished(structures, config)

        for step in (3, 7):
            for progress in train(new_model(), OBJECTIVE, structures, config, out=tmp_path, save_every=0):
                if progress.step == step:
                    break
        resumed = new_model(seed=1)
        steps = [p.step for p in train(resumed, OBJECTIVE, structures, config, out=tmp_path)]

        assert steps == [8, 9, 10]
        assert same_bits(weights_of(resumed), weights_of(whole))

    def test_it_starts_anew_when_nothing_was_saved(self, tmp_path):
        structures, config = alloys(8), quick(steps=5)
        for progress in train(new_model(), OBJECTIVE, structures, config, out=tmp_path):
            if progress.step == 3:
                break
        list(train(model := new_model(), OBJECTIVE, structures, config, out=tmp_path))

        assert same_bits(weights_of(model), weights_of(finished(structures, config)))
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]

    def test_states_of_earlier_versions_go_on_too(self, tmp_path):
        """They do not say where the next step begins, how much memory had room for, nor what to go back to."""
        structures, config = alloys(8), quick(steps=10)
        for progress in train(new_model(), OBJECTIVE, structures, config, out=tmp_path, save_every=0):
            if progress.step == 7:
                break
        tensors, metadata = read_tensors(tmp_path / "state.safetensors")
        numbers = json.loads(metadata["numbers"])
        assert numbers.pop("place")[0] > 0 and numbers.pop("rooms") == {}
        assert tensors.pop("candidate.0") is not None
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("candidate.")}
        write_tensors(tmp_path / "state.safetensors", tensors, {"numbers": json.dumps(numbers)})

        restored = _Run(new_model(seed=1), OBJECTIVE, structures, config, (), tmp_path, lambda done: None)
        restored._restore()
        assert all(map(torch.equal, restored.candidate, restored.average))
        list(train(model := new_model(), OBJECTIVE, structures, config, out=tmp_path))
        assert same_bits(weights_of(model), weights_of(finished(structures, config)))

    def test_a_line_that_was_cut_off_is_written_again(self, tmp_path):
        structures = alloys(8)
        loop = train(new_model(), OBJECTIVE, structures, quick(steps=5), out=tmp_path, save_every=0)
        for progress in loop:
            if progress.step == 3:
                break
        loop.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "lr"')

        list(train(new_model(), OBJECTIVE, structures, quick(steps=5), out=tmp_path))
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]

    def test_patience_that_has_run_out_stays_so(self, tmp_path):
        config = quick(steps=50, lr=1e-30, patience=2, validate_every=1)
        arguments = (OBJECTIVE, alloys(8), config)
        assert len(list(train(new_model(), *arguments, valid=alloys(3, seed=1), out=tmp_path))) == 2
        assert len(list(train(new_model(), *arguments, valid=alloys(3, seed=1), out=tmp_path))) == 0


class TestBest:
    def test_the_lowest_validation_loss_is_what_is_kept(self):
        model, valid = new_model(), alloys(6, seed=1)
        start = valid_loss(model, valid)
        config = quick(steps=30, lr=0.3, warmup=0.95, validate_every=1, ema=0.0)  # ends where it is worst
        losses = [p.valid for p in train(model, OBJECTIVE, alloys(12), config, valid=valid)]

        assert valid_loss(model, valid) == pytest.approx(min(losses), rel=1e-12)
        assert min(losses) < min(start, losses[-1])  # or this test would show nothing

    def test_a_start_that_is_never_beaten_is_kept(self):
        model = new_model()
        before = weights_of(model)
        list(train(model, OBJECTIVE, alloys(4), quick(steps=3, lr=10.0), valid=alloys(4, seed=1)))
        assert same_bits(before, weights_of(model))

    def test_without_validation_the_last_weights_are_kept(self):
        model = new_model()
        for progress in train(model, OBJECTIVE, alloys(4), quick(steps=4, ema=0.0)):
            assert progress.valid is None and progress.best is None
            last = weights_of(model)
        assert same_bits(last, weights_of(model))

    def test_noise_of_validation_is_the_same_every_time(self):
        valid = Batches(alloys(4), tm.Denoise(0.1), painn().edges, 0, VALIDATION)
        model = new_model(tm.Denoise(0.1))
        members = [np.arange(4)]
        assert evaluate_loss(model, valid, members) == evaluate_loss(model, valid, members)

    @pytest.mark.parametrize("labels", [("forces", "energy", "stress"), ("forces",)], ids=["no label", "no forces"])
    def test_validation_counts_what_is_labelled(self, labels):
        model, valid = new_model(), alloys(4, seed=1, lacking=labels)
        if len(labels) == 3:
            with pytest.raises(tm.InputError, match="validation"):
                list(train(model, OBJECTIVE, alloys(4), quick(steps=2), valid=valid))
        else:
            terms = evaluate_loss(model, Batches(valid, OBJECTIVE, painn().edges, 0), [np.arange(4)])
            assert set(terms) == {"energy", "stress"}


class TestEnd:
    def test_no_step_leaves_the_model_as_it_is(self):
        model = new_model()
        before = weights_of(model)
        assert list(train(model, OBJECTIVE, alloys(4), quick(steps=0), valid=alloys(2, seed=1))) == []
        assert same_bits(before, weights_of(model)) and not model.training

    def test_patience_counts_validations_without_improvement(self):
        config = quick(steps=50, lr=1e-30, patience=3, validate_every=2)
        progress = list(train(new_model(), OBJECTIVE, alloys(4), config, valid=alloys(4, seed=1)))
        assert [p.step for p in progress if p.valid is not None] == [2, 4, 6]
        assert progress[-1].step == 6

    def test_time_bounds_a_run(self):
        progress = list(train(new_model(), OBJECTIVE, alloys(4), quick(time="0.5s"), valid=alloys(2, seed=1)))
        assert progress[-1].elapsed >= 0.5 > progress[-2].elapsed
        assert progress[-1].fraction == 1.0 and progress[-1].valid is not None
        assert progress[-1].lr < 0.2 * max(p.lr for p in progress)

    def test_whichever_of_steps_and_time_ends_first_ends_the_run(self):
        assert len(list(train(new_model(), OBJECTIVE, alloys(4), quick(steps=3, time="1h")))) == 3
        assert len(list(train(new_model(), OBJECTIVE, alloys(4), quick(steps=10**6, time="0.2s")))) < 10**4

    def test_the_last_step_is_validated(self):
        config = quick(steps=5, validate_every=3)
        progress = list(train(new_model(), OBJECTIVE, alloys(4), config, valid=alloys(2, seed=1)))
        assert [p.step for p in progress if p.valid is not None] == [3, 5]

    def test_a_large_validation_set_is_looked_at_less_often(self):
        def validated(n_valid: int) -> list[int]:
            config = quick(steps=40, edges=1)  # batches of one structure
            progress = train(new_model(), OBJECTIVE, alloys(4), config, valid=alloys(n_valid, seed=1))
            return [p.step for p in progress if p.valid is not None]

        assert validated(1) == list(range(5, 41, 5))  # five batches trained on for each that is validated
        assert validated(2) == [10, 20, 30, 40]
        assert validated(8) == [10, 20, 30, 40]  # four times at least

    def test_a_run_bounded_by_time_is_validated_at_each_quarter(self):
        list(train(new_model(), OBJECTIVE, alloys(4), quick(steps=1)))  # kernels are compiled
        config = quick(processor_time="2s", edges=1)
        progress = list(train(new_model(), OBJECTIVE, alloys(4), config, valid=alloys(30, seed=1)))
        assert {int(4 * p.fraction) for p in progress if p.valid is not None} == {1, 2, 3, 4}


class TestLayers:
    """How far each layer of a backbone may move from where it started."""

    def moved(self, **changes: Any) -> dict[str, float]:
        model = new_model()
        before = weights_of(model)
        list(train(model, OBJECTIVE, alloys(4), quick(steps=8, ema=0.0, **changes)))
        return {name: float((t - before[name]).abs().max()) for name, t in weights_of(model).items()}

    @pytest.mark.parametrize("backbone", [tm.TensorNet(8, 3), tm.PaiNN(8, 3), tm.ET(8, 3), tm.CGCNN(8, 8, 3)])
    def test_every_parameter_has_a_layer(self, backbone):
        found = layers(backbone)
        assert found.keys() == dict(backbone.named_parameters()).keys()
        assert set(found.values()) <= set(range(5)) and {0, 1, 2, 3} <= set(found.values())
        assert all(k == 0 for name, k in found.items() if name.startswith(("node_inputs", "told")))
        assert all(str(k - 1) in name.split(".") for name, k in found.items() if 0 < k < 4)

    def test_lower_layers_move_less(self):
        moved = self.moved(layer_decay=1e-3)
        lowest = max(d for name, d in moved.items() if name.startswith("backbone.node_inputs"))
        usual = max(d for name, d in self.moved().items() if name.startswith("backbone.node_inputs"))
        assert 0 < lowest < 1e-2 * usual
        assert max(d for name, d in moved.items() if name.startswith("heads.")) > 0.1 * usual

    def test_the_backbone_is_drawn_back_and_the_heads_are_not(self):
        free, drawn = self.moved(), self.moved(l2_to_base=100.0)
        backbone = [name for name in free if name.startswith("backbone.") and free[name]]
        assert backbone and all(drawn[name] < 0.7 * free[name] for name in backbone)
        heads = [name for name in free if name.startswith("heads.") and free[name]]
        assert all(drawn[name] > 0.7 * free[name] for name in heads)


class TestSteps:
    def test_the_learning_rate_warms_up_and_decays(self):
        rates = [p.lr for p in train(new_model(), OBJECTIVE, alloys(4), quick(steps=40, lr=0.1, warmup=0.25))]
        top = int(np.argmax(rates))
        assert top == 10 and rates[top] == pytest.approx(0.1)
        assert rates[0] < 1e-3
        assert all(np.diff(rates[: top + 1]) > 0) and all(np.diff(rates[top:]) < 0)
        assert rates[-1] < 0.002

    @pytest.mark.parametrize("clip", [1e-3, 1e6])
    def test_gradients_are_no_longer_than_allowed(self, clip):
        model = new_model()
        norms = []
        for _ in train(model, OBJECTIVE, alloys(4), quick(steps=4, clip=clip)):
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        assert max(norms) <= clip * (1 + 1e-5)
        assert max(norms) > 0.9e-3

    def test_what_is_returned_is_the_average_of_the_weights(self):
        model, ema = new_model(), 0.6
        average = list(weights_of(model).values())
        for progress in train(model, OBJECTIVE, alloys(4), quick(steps=12, ema=ema, dtype="float64")):
            t = progress.step
            decay = min(ema, (1 + t) / (10 + t))
            average = [decay * a + (1 - decay) * w for a, w in zip(average, weights_of(model).values(), strict=True)]
        for name, a, w in zip(weights_of(model), average, weights_of(model).values(), strict=True):
            torch.testing.assert_close(w, a, msg=name, atol=1e-8, rtol=1e-6)

    def test_a_frozen_backbone_has_no_gradients_and_keeps_its_bits(self):
        model = new_model()
        before = weights_of(model)
        for _ in train(model, OBJECTIVE, alloys(4), quick(steps=3, backbone_lr=0.0)):
            assert all(p.grad is None for p in model.backbone.parameters())
            assert all(p.grad is not None for p in model.heads.parameters())
        assert same_bits({n: t for n, t in before.items() if n.startswith("backbone.")}, weights_of(model, "backbone."))
        assert not same_bits({n: t for n, t in before.items() if n.startswith("heads.")}, weights_of(model, "heads."))

    def test_a_tenth_of_the_rate_moves_the_backbone_less(self):
        def movement(backbone_lr):
            model = new_model()
            before = weights_of(model, "backbone.")
            list(train(model, OBJECTIVE, alloys(4), quick(steps=5, backbone_lr=backbone_lr, ema=0.0)))
            return sum(float((after - before[n]).abs().sum()) for n, after in weights_of(model, "backbone.").items())

        assert movement(0.001) < 0.3 * movement(0.01)

    def test_missing_labels_are_masked(self):
        """Structures without forces teach their energy: the step is that of the objective on what is there."""
        structures = alloys(4, lacking=["forces"], first=2)
        model = new_model()
        first = next(iter(train(model, OBJECTIVE, structures, quick(steps=1, edges=10**6))))

        model = new_model()
        batch = Batches(structures, OBJECTIVE, painn().edges, 0)[0, np.arange(4)]
        outputs = model(batch.graph)
        errors = (outputs["forces"].detach() - batch.targets["forces"])[:8].abs()
        assert first.terms["forces"] == pytest.approx(float(errors.mean()), rel=1e-5)
        assert set(first.terms) == {"energy", "forces", "stress"}
        assert first.loss == pytest.approx(sum(first.terms.values()))

    def test_a_batch_without_labels_changes_nothing(self):
        model = new_model()
        before = weights_of(model)
        for progress in train(model, OBJECTIVE, alloys(2, lacking=["energy", "forces", "stress"]), quick(steps=2)):
            assert math.isnan(progress.loss) and progress.terms == {}
        assert same_bits(before, weights_of(model))

    def test_labels_that_break_the_loss_are_named(self):
        structures = raw_alloys(3)
        structures[2].calc.results["energy"] = 1e150
        with pytest.raises(
            tm.InputError, match=r"not finite at step \d, for structure 2 \(\w+\), and not with the last"
        ):
            config = quick(steps=5, dtype="float64")
            list(train(new_model(), tm.Potential(energy=1e200, forces=0, stress=0), ready(structures), config))

    def test_so_are_those_that_break_its_gradient_alone(self, monkeypatch):
        structures, loss = alloys(8), tm.Potential.loss
        broken = structures[5].info["energy"]

        def kinked(self, outputs, batch):
            terms = loss(self, outputs, batch)
            total, count = terms["energy"]
            here = (batch.targets["energy"] - broken).abs() < 1e-9
            return {**terms, "energy": (total + (0 * outputs["energy"][here]).sqrt().sum(), count)}

        monkeypatch.setattr(tm.Potential, "loss", kinked)
        with pytest.raises(tm.InputError, match=r"gradient of the loss is not finite at step \d, for structure 5 \("):
            list(train(new_model(), OBJECTIVE, structures, quick(steps=5)))

    def test_a_validation_structure_that_breaks_the_loss_is_named_before_the_first_step(self):
        structures = raw_alloys(6, seed=1)
        structures[4].calc.results["energy"] = 1e150
        objective = tm.Potential(energy=1e200, forces=0, stress=0)
        with pytest.raises(tm.InputError, match=r"validation is not finite before the first step, for structure 4 \("):
            list(train(new_model(), objective, alloys(4), quick(steps=2, dtype="float64"), valid=ready(structures)))


class TestDivergence:
    """Weights that have become useless at some step, as by a rate that is too high."""

    @pytest.mark.parametrize("valid", [0, 3], ids=["without validation", "with validation"])
    def test_it_goes_back_once_and_on_at_a_lower_rate(self, monkeypatch, capsys, valid):
        spoil(monkeypatch, after=[6])
        model, undisturbed = new_model(), new_model()
        config = quick(steps=12, validate_every=2)
        progress = list(train(model, OBJECTIVE, alloys(8), config, valid=alloys(valid, seed=1)))
        monkeypatch.undo()
        usual = list(train(undisturbed, OBJECTIVE, alloys(8), config, valid=alloys(valid, seed=1)))

        assert [p.step for p in progress] == list(range(1, 13))
        assert [p.went_back for p in progress] == 6 * [None] + 6 * [7]
        assert math.isnan(progress[6].loss) and all(math.isfinite(p.loss) for p in progress if p.step != 7)
        ratios = [p.lr / q.lr for p, q in zip(progress, usual, strict=True)]
        assert ratios == pytest.approx(7 * [1.0] + 5 * [0.25])
        assert progress[-1].loss < 2 * usual[-1].loss
        assert all(bool(t.isfinite().all()) for t in weights_of(model).values())
        shown = " ".join(capsys.readouterr().err.split())
        assert "not finite at step 7, for structures" in shown and "going back to the last good weights" in shown

    @pytest.mark.parametrize("valid", [0, 3], ids=["without validation", "with validation"])
    def test_a_run_that_was_stopped_goes_back_to_the_same_weights(self, monkeypatch, tmp_path, valid):
        config, others = quick(steps=12, validate_every=2), {"valid": alloys(valid, seed=1)}
        spoil(monkeypatch, after=[6])
        list(train(whole := new_model(), OBJECTIVE, alloys(8), config, **others))
        for step in (5, 6, 9, 0):
            for progress in train(
                model := new_model(), OBJECTIVE, alloys(8), config, out=tmp_path, save_every=0, **others
            ):
                if progress.step == step:
                    break
        assert same_bits(weights_of(model), weights_of(whole)) and progress.went_back == 7
        assert [row["step"] for row in rows_of(tmp_path) if row.get("went back")] == [7]

    def test_without_validation_the_weights_before_the_best_losses_are_good(self, monkeypatch):
        spoil(monkeypatch, after=[6], by=3.0)  # from then on losses are worse, but finite
        spoil(monkeypatch, after=[8])
        model = new_model()
        losses, kept = [], [weights_of(model)]
        for last in train(model, OBJECTIVE, alloys(8), quick(steps=9, validate_every=2, ema=0.0)):
            losses.append(last.loss)
            kept.append(weights_of(model))
        lowest = int(np.argmin([np.mean(losses[first : first + 2]) for first in range(0, 8, 2)]))
        assert last.went_back == 9 and lowest == 1  # or this test would show little
        assert same_bits(kept[9], kept[2 * lowest])

    def test_the_second_time_it_gives_up(self, monkeypatch):
        spoil(monkeypatch, after=[3, 7])
        with pytest.raises(
            tm.InputError, match=r"not finite at step 9, for structures .* once more after step 4, .* lower"
        ):
            list(train(new_model(), OBJECTIVE, alloys(8), quick(steps=12)))

    def test_the_card_says_so(self, monkeypatch):
        spoil(monkeypatch, after=[2])
        model = tm.pretrain(raw_alloys(8), OBJECTIVE, painn(), steps=4, edges=400, device="cpu", verbose=False)
        assert model.card["history"][-1]["went back at step"] == 3


def spoil(monkeypatch, after: list[int], by: float = math.inf) -> None:
    """Make weights useless after these updates."""
    step = AdamW.step

    def spoiled(self):
        step(self)
        if max(int(state["step"]) for state in self.state.values()) in after:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(by)

    monkeypatch.setattr(AdamW, "step", spoiled)


class TestMemory:
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("there is none"), MemoryError()], ids=["CUDA", "CPU"])
    def test_a_step_is_repeated_in_smaller_batches(self, monkeypatch, capsys, tmp_path, error):
        loss, sizes = tm.Potential.loss, []

        def limited(self, outputs, batch):
            sizes.append(batch.graph.n_edges)
            if batch.graph.n_edges > 250:
                raise error
            return loss(self, outputs, batch)

        structures, config = alloys(8), quick(steps=3, edges=400, dtype="float64")
        expected = finished(structures, config)
        monkeypatch.setattr(tm.Potential, "loss", limited)
        list(train(model := new_model(), OBJECTIVE, structures, config, out=tmp_path))
        for name, tensor in weights_of(model).items():
            torch.testing.assert_close(tensor, weights_of(expected)[name], rtol=0, atol=1e-10, msg=name)
        assert sizes[0] > 250 and [size > 250 for size in sizes].count(True) == 1
        assert "Memory ran out: from now on at most" in capsys.readouterr().err
        assert {row["edges at once"] for row in rows_of(tmp_path)} == {sizes[0] // 2}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
class TestWorkers:
    def test_their_number_changes_nothing(self):
        def run(workers: int) -> dict[str, torch.Tensor]:
            model = new_model(objective := tm.Denoise(0.1))
            list(train(model, objective, alloys(16), quick(steps=10, workers=workers), valid=alloys(3, seed=1)))
            return weights_of(model)

        alone = run(0)
        assert same_bits(run(1), alone) and same_bits(run(4), alone)


class TestFiles:
    def test_the_table_has_the_rows_of_the_lines(self, tmp_path):
        config = quick(steps=6, validate_every=3)
        list(train(new_model(), OBJECTIVE, alloys(4), config, valid=alloys(2, seed=1), out=tmp_path))

        rows = read_metrics(tmp_path)
        with open(tmp_path / "metrics.csv") as file:
            table = list(csv.DictReader(file))
        assert [int(row["step"]) for row in table] == [row["step"] for row in rows] == list(range(7))
        assert [bool(row["valid"]) for row in table] == [row["step"] % 3 == 0 for row in rows]
        assert float(table[-1]["forces"]) == rows[-1]["forces"]

    def test_without_a_folder_nothing_is_written(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        list(train(new_model(), OBJECTIVE, alloys(4), quick(steps=2)))
        assert list(tmp_path.iterdir()) == []


class TestConfig:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[("lr", 0.0), ("clip", -1.0), ("edges", 0), ("steps", -1), ("backbone_lr", -1.0), ("workers", -1)],
            *[("warmup", 1.0), ("ema", 1.0), ("time", "0s"), ("time", "soon"), ("time", "")],
            *product(("lr", "backbone_lr", "l2_to_base", "weight_decay"), (math.inf, math.nan)),
        ],
    )
    def test_what_cannot_be_is_refused(self, name, value):
        with pytest.raises(tm.InputError, match=name):
            TrainConfig(**{name: value})

    def test_times(self):
        times = {"45": 45, "45s": 45, "10min": 600, "1.5h": 5400, " 2 h ": 7200}
        assert {text: parse_time(text) for text in times} == times

    def test_steps_have_a_default_only_without_time(self):
        assert TrainConfig().n_steps == 1000
        assert TrainConfig(time="1h").n_steps == math.inf
        assert TrainConfig(time="1h", steps=5).n_steps == 5

    def test_nothing_to_train_on(self):
        with pytest.raises(tm.InputError, match="no structure"):
            train(new_model(), OBJECTIVE, [])

    def test_a_device_that_is_not_there(self):
        with pytest.raises(tm.InputError, match="'abacus'"):
            train(new_model(), OBJECTIVE, alloys(2), quick(device="abacus"))


def alloys(n: int, seed: int = 0, lacking: Collection[str] = (), first: int = 0) -> Labelled:
    """Structures as `train` wants them; those from `first` on lack some labels."""
    structures = raw_alloys(n, seed)
    return ready([*structures[:first], *without(structures[first:], *lacking)])


def quick(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 0.01, "edges": 300, "device": "cpu", **changes})


def new_model(objective: tm.Objective = OBJECTIVE, seed: int = 0) -> tm.Model:
    torch.manual_seed(seed)
    return tm.Model(painn(), objective.outputs(8))


def finished(structures, config: TrainConfig) -> tm.Model:
    list(train(model := new_model(), OBJECTIVE, structures, config))
    return model


def valid_loss(model: tm.Model, valid) -> float:
    counts = count_edges(valid, painn().edges)
    members = plan(counts, 300, np.arange(len(valid)))
    return sum(evaluate_loss(model, Batches(valid, OBJECTIVE, painn().edges, 0, VALIDATION), members).values())
