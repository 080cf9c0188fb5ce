"""A run folder belongs to one configuration."""

import errno
import json
import os
import signal
import time
from contextlib import nullcontext

import numpy as np
import pytest

import transfermium as tm
from tests.alloys import alloys
from transfermium import model
from transfermium.model import held
from transfermium.run import claim, fingerprint, leaving_nothing, write_json

CONFIG = {"verb": "pretrain", "backbone": {"class": "PaiNN", "arguments": {"width": 8, "inputs": ()}}, "steps": 3}


def test_a_new_folder_is_made_and_remembers_its_configuration(tmp_path):
    folder = claim(tmp_path / "deep" / "run", CONFIG)
    assert folder == tmp_path / "deep" / "run"
    assert json.loads((folder / "config.json").read_text())["backbone"]["arguments"]["width"] == 8


def test_an_empty_folder_can_be_claimed(tmp_path):
    assert claim(str(tmp_path), CONFIG) == tmp_path


def test_no_folder_is_no_claim():
    assert claim(None, CONFIG) is None


def test_the_same_configuration_finds_its_folder_again(tmp_path):
    claim(tmp_path / "run", CONFIG)
    assert claim(tmp_path / "run", CONFIG) == tmp_path / "run"


@pytest.mark.parametrize("option", ["device", "workers"])
def test_where_a_run_happens_makes_no_other_run(tmp_path, option):
    claim(tmp_path / "run", {**CONFIG, "train": {option: 0}})
    claim(tmp_path / "run", {**CONFIG, "train": {option: 1}})


def test_another_configuration_is_refused_with_the_name_of_the_difference(tmp_path):
    (claim(tmp_path / "run", CONFIG) / "state.safetensors").touch()
    wider = {**CONFIG, "backbone": {"class": "PaiNN", "arguments": {"width": 16, "inputs": ()}}}
    with pytest.raises(
        tm.InputError, match=r"another run: backbone\.arguments\.width was 8 there and is 16 now; choose"
    ):
        claim(tmp_path / "run", wider)
    with pytest.raises(tm.InputError, match=r"verb was .pretrain. there and is .finetune. now \(and 1 more differ\)"):
        claim(tmp_path / "run", {**wider, "verb": "finetune"})
    with pytest.raises(tm.InputError, match="steps was 3 there and is null now"):
        claim(tmp_path / "run", {name: value for name, value in CONFIG.items() if name != "steps"})


LABELS = {"labels": [{"quantity": "energy", "count": 6, "rms": 0.1 + 0.2, "minimum": 0.0, "maximum": 1.0}]}


def test_statistics_of_labels_may_be_rounded_otherwise(tmp_path):
    (claim(tmp_path / "run", {**CONFIG, "labels": LABELS}) / "state.safetensors").touch()
    rounded = {**LABELS["labels"][0], "rms": 0.3, "minimum": -1e-17, "maximum": 1.0 + 1e-16}
    assert claim(tmp_path / "run", {**CONFIG, "labels": {"labels": [rounded]}})
    with pytest.raises(
        tm.InputError, match=r"another run: labels\.labels\[0\]\.count was 6 there and is 5 now; choose"
    ):
        claim(tmp_path / "run", {**CONFIG, "labels": {"labels": [{**rounded, "count": 5}]}})
    with pytest.raises(tm.InputError, match=r"labels\.labels was \[.* there and is \[\] now"):
        claim(tmp_path / "run", {**CONFIG, "labels": {"labels": []}})


def test_arguments_that_are_called_like_statistics_count(tmp_path):
    (claim(tmp_path / "run", {**CONFIG, "objective": {"maximum": 1.0}}) / "state.safetensors").touch()
    with pytest.raises(tm.InputError, match=r"objective\.maximum was 1\.0 there and is 2\.0 now"):
        claim(tmp_path / "run", {**CONFIG, "objective": {"maximum": 2.0}})


def test_steps_keep_their_number_of_batches(tmp_path):
    (claim(tmp_path / "run", {**CONFIG, "train": {"lr": 0.1}}) / "state.safetensors").touch()  # of an earlier version
    assert claim(tmp_path / "run", {**CONFIG, "train": {"lr": 0.1, "batches per step": 1}})
    with pytest.raises(
        tm.InputError, match=r"was 1 there and is 4 now; choose --accumulate .* or choose another folder"
    ):
        claim(tmp_path / "run", {**CONFIG, "train": {"lr": 0.1, "batches per step": 4}})


def test_a_folder_that_is_only_asked_for_stays_as_it_is(tmp_path):
    assert claim(tmp_path / "run", CONFIG, read_only=True) == tmp_path / "run"
    assert not list(tmp_path.iterdir())
    claim(tmp_path / "run", CONFIG)
    claim(tmp_path / "run", {**CONFIG, "steps": 4}, read_only=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 3
    (tmp_path / "run/state.safetensors").touch()
    with pytest.raises(tm.InputError, match="steps was 3 there and is 4 now"):
        claim(tmp_path / "run", {**CONFIG, "steps": 4}, read_only=True)


def test_a_run_that_saved_nothing_holds_no_folder(tmp_path):
    claim(tmp_path / "run", CONFIG)
    claim(tmp_path / "run", {**CONFIG, "steps": 4})
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 4


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(tm.InputError, match="not a run of transfermium"):
        claim(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', "[1]", "no JSON"])
def test_nor_is_one_with_a_configuration_of_others_touched(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pytorch_model.bin").write_text("weights")
    with pytest.raises(tm.InputError, match="not a run of transfermium"):
        claim(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == config


def test_of_several_processes_each_says_why_although_another_has_removed_the_folder(tmp_path):
    @leaving_nothing
    def verb(out):
        raise tm.InputError("of no use")

    with pytest.raises(tm.InputError, match="of no use"):
        verb(tmp_path / "run")


class TestHolding:
    """A folder that a verb has claimed is its own until it ends."""

    @staticmethod
    @leaving_nothing
    def verb(out, inside=lambda: None):
        claim(out, CONFIG)
        claim(out, CONFIG)  # twice, as with a teacher
        return inside()

    @pytest.mark.parametrize("error", [None, tm.InputError, KeyboardInterrupt])
    def test_until_it_ends_however_it_does(self, tmp_path, error):
        def inside():
            with pytest.raises(tm.InputError, match=r"another process is at work in .*run"):
                self.verb(tmp_path / "run")
            assert (tmp_path / "run/config.json").exists()
            if error:
                raise error

        with pytest.raises(error) if error else nullcontext():
            self.verb(tmp_path / "run", inside)
        self.verb(tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]

    def test_those_in_it_are_others(self, tmp_path):
        self.verb(tmp_path, lambda: self.verb(tmp_path / "rungs", lambda: self.verb(tmp_path / "rungs/full")))

    def test_what_is_finished_or_only_asked_for_is_not_held(self, tmp_path):
        self.verb(tmp_path, lambda: claim(tmp_path, CONFIG, read_only=True))
        (tmp_path / "model.safetensors").touch()
        self.verb(tmp_path, lambda: self.verb(tmp_path))

    def test_where_there_are_no_locks_nobody_is_kept_out(self, tmp_path, monkeypatch):
        def unable(handle, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(model.fcntl, "flock", unable)
        self.verb(tmp_path, lambda: self.verb(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_workers_of_a_process_do_not_hold_what_it_holds(self, tmp_path):
        """Or it would be theirs for seconds after it was killed."""
        read, write = os.pipe()
        with held(tmp_path) as ours:
            if not (worker := os.fork()):
                os.write(write, b"at work")
                time.sleep(60)
                os._exit(0)
            assert ours and os.read(read, 7) == b"at work"
        with held(tmp_path) as again:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            assert again


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(tm.InputError, match="is a file"):
        claim(tmp_path / "run", CONFIG)


def test_a_damaged_configuration_is_said_to_be_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "state.safetensors").touch()
    with pytest.raises(tm.InputError, match="damaged"):
        claim(tmp_path, CONFIG)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"å": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"å": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_fingerprint_knows_geometry_and_labels():
    def changed(change):
        structures = alloys(4)
        for atoms in structures:
            atoms.info["energy"] = 1.0
        change(structures[2])
        return fingerprint(structures)

    def move(atoms):
        atoms.positions[0, 0] += 1e-9

    def stretch(atoms):
        atoms.cell[0, 0] += 1e-9

    def relabel(atoms):
        atoms.info["energy"] = 1.0 + 1e-9

    def replace(atoms):
        atoms.numbers[0] = 47

    prints = [changed(change) for change in (lambda atoms: None, move, stretch, relabel, replace)]
    assert len(set(prints)) == 5
    assert prints[0] == changed(lambda atoms: None)
    assert fingerprint(alloys(4)) != fingerprint(alloys(4)[::-1])


def test_a_fingerprint_of_many_structures_looks_at_some():
    structures = alloys(9)
    seen = fingerprint(structures, most=3)
    structures[1].positions += 1
    assert fingerprint(structures, most=3) == seen
    structures[4].positions += np.array([0, 0, 1])
    assert fingerprint(structures, most=3) != seen
