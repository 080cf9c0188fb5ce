"""Whatever ends a command, the same command goes on, and no file is ever half-written."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import ase.io
import pytest

import transfermium as tm
from tests.alloys import alloys, potential
from transfermium import cli
from transfermium.data import read
from transfermium.model import UNFINISHED, held, sweep, write_whole, writing
from transfermium.run import claim
from transfermium.simulate.relax import _Relaxed

SOAK = Path(__file__).parents[1] / "benchmarks" / "reliability" / "soak.py"


def test_verbs_that_are_killed_end_as_if_untouched() -> None:
    """A little of what the script does at length: SIGKILL, SIGTERM and a full disk."""
    verbs = ["pack", "pretrain", "relax", "predict", "md", "curve"]
    rows = soak([str(SOAK), "--quick", "--json", "--verbs", *verbs])
    assert [row["verb"] for row in rows] == verbs
    for row in rows:
        assert row["wrong"] == [], row["verb"]
        ways = ("kills", "kills before an access", "SIGTERM", "full disks")
        assert row["compared"] == 1 and sum(row[way] for way in ways) >= 2, row["verb"]


CARELESS = """
import random, sys, time
sys.path.insert(0, sys.argv.pop(1))
import soak
from pathlib import Path

def main(words):  # writes in place, and something else each time
    out = Path(words[-1])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "a.json", "w") as file:
        file.write('{"found": ')
        file.flush()
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        file.write(f"{random.SystemRandom().random()}}}")
    (out / f".b.json.{'x' * 8}.partial").touch()

soak.cli.main = main
soak.write_data = lambda folder: None
soak.main()
"""


def test_a_verb_that_hangs_would_be_noticed(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module.Soak, "run_here", lambda self, folder: None)
    monkeypatch.setattr(module.cli, "main", lambda words: time.sleep(60))
    soak = module.Soak("pack", tmp_path, tmp_path, 0)
    assert soak.wrong[0].startswith("it hangs: no end after 0.2 s")


def test_a_careless_verb_would_be_noticed() -> None:
    rows = soak(["-c", CARELESS, str(SOAK.parent), "--quick", "--json", "--verbs", "pretrain"], status=None)
    wrong = " ".join(rows[0]["wrong"])
    assert "a.json is half-written" in wrong and "a.json differs" in wrong and "was left behind" in wrong


def soak(arguments: list[str], status: int | None = 0) -> list[dict]:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert status is None or result.returncode == status, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


AT_WORK = """
import importlib, os, sys, time
from transfermium import cli
from transfermium.simulate import dynamics
from transfermium.transfer import stage

def work(*arguments, **options):
    if os.fork():  # the other one is like those that prepare batches, which end a little after who was killed
        print("at work", flush=True)
    time.sleep(60)

stage.train = dynamics.Simulation.run = importlib.import_module("transfermium.simulate.relax")._relaxed = work
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [
        "finetune m.safetensors a.extxyz --objective Potential --strategy auto --steps 1 --edges 400 --split-by random",
        "md m.safetensors a.extxyz --index 0 --time 2fs --every 1fs",
        "relax m.safetensors a.extxyz --steps 1",
    ],
    ids=lambda command: command.split()[0],
)
def test_who_comes_second_is_refused_until_the_first_is_killed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    potential().save("m.safetensors")
    ase.io.write("a.extxyz", alloys(10))
    words = [*command.split(), "--device", "cpu", "--out", "OUT.extxyz"]
    with subprocess.Popen(
        [sys.executable, "-c", AT_WORK, *words], stdout=subprocess.PIPE, start_new_session=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as first:  # fmt: skip
        try:
            assert first.stdout is not None and first.stdout.readline() == "at work\n"
            with pytest.raises(SystemExit) as refused:
                cli.main(words)
            said = capsys.readouterr().err.strip()
            told = "error: another process is at work in OUT.extxyz: wait until it ends, or choose another place"
            assert refused.value.code == 2 and said.splitlines()[-1] == told
            first.kill()
            first.wait()
            with suppress(SystemExit):  # with 1, where not all came to rest
                cli.main(words)
            assert "another process" not in capsys.readouterr().err
        finally:
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    assert not list(tmp_path.rglob(f"*{UNFINISHED}"))


class TestFiles:
    def test_what_a_killed_process_left_goes_with_the_next_writing(self, tmp_path):
        (tmp_path / f".a.json.x1{UNFINISHED}").write_text("half")
        (tmp_path / f".b.json.x1{UNFINISHED}").write_text("half")
        write_whole(tmp_path / "a.json", b"whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f".b.json.x1{UNFINISHED}", "a.json"]
        sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_what_another_is_writing_stays(self, tmp_path):
        with writing(tmp_path / "a.json") as one:
            one.write(b"slow")
            write_whole(tmp_path / "a.json", b"fast")
            sweep(tmp_path)
        assert (tmp_path / "a.json").read_bytes() == b"slow"
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_a_full_disk_is_said_with_the_file_and_the_old_content_stays(self, tmp_path, monkeypatch):
        write_whole(tmp_path / "a.json", b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*a\.json"):
            write_whole(tmp_path / "a.json", b"new")
        assert (tmp_path / "a.json").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1

    def test_a_run_that_was_killed_before_its_first_file_can_begin(self, tmp_path):
        (tmp_path / f".config.json.x1{UNFINISHED}").touch()
        claim(tmp_path, {"verb": "pretrain"})
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_relaxations_that_were_killed_before_the_first_can_begin(self, tmp_path):
        _Relaxed(tmp_path / "r.extxyz", {"fmax": 1})
        (tmp_path / "r.extxyz").unlink()  # the list is written first
        assert _Relaxed(tmp_path / "r.extxyz", {"fmax": 1}).done == 0
        with pytest.raises(tm.InputError, match="holds other relaxations"):
            _Relaxed(tmp_path / "r.extxyz", {"fmax": 2})

    @pytest.mark.parametrize("text", ["hello", '["fmax"]', '{"fmax": 1}\n{"x": 1}', '{"fmax": 1}\n3', '{"fmax": 1}\nx'])
    def test_a_damaged_list_of_relaxations_is_said_to_be_so(self, tmp_path, text):
        (tmp_path / "r.extxyz.jsonl").write_text(f"{text}\n")
        with pytest.raises(tm.InputError, match=r"r\.extxyz\.jsonl is damaged: delete it|holds other relaxations"):
            _Relaxed(tmp_path / "r.extxyz", {"fmax": 1})

    def test_packing_removes_what_was_left_but_not_what_another_packs(self, tmp_path):
        dead, alive = (tmp_path / f".set.{name}{UNFINISHED}" for name in ("dead", "alive"))
        for folder in (dead, alive):
            folder.mkdir()
            (folder / "shard-00000.arrow").touch()
        with held(alive):
            tm.pack(alloys(3), tmp_path / "set", progress=False)
        assert not dead.exists() and alive.exists() and len(read(tmp_path / "set")) == 3

    @pytest.mark.parametrize("swept", [True, False])
    def test_a_folder_that_another_process_takes_for_left_over_is_made_again(self, tmp_path, monkeypatch, swept):
        first = []

        @contextmanager
        def hold(path):
            if not first:
                first.append(path)
                shutil.rmtree(path)
                if not swept:  # yet
                    yield False
                    return
            with held(path) as ours:
                yield ours

        monkeypatch.setattr(importlib.import_module("transfermium.data.pack"), "held", hold)
        tm.pack(alloys(3), tmp_path / "set", progress=False)
        assert first and [path.name for path in tmp_path.iterdir()] == ["set"]


class TestCommand:
    def test_a_full_disk_is_one_sentence(self, tmp_path, monkeypatch, capsys):
        ase.io.write(tmp_path / "a.extxyz", alloys(3))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["pack", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "set")])
        said = " ".join(capsys.readouterr().err.split())
        assert stopped.value.code == 2 and "No space left on device: make room, and the same command goes on" in said
        assert [path.name for path in tmp_path.iterdir()] == ["a.extxyz"]

    @pytest.mark.parametrize(
        ("error", "status", "text"),
        [
            (KeyboardInterrupt(15), 143, "interrupted: the same command goes on"),
            (KeyboardInterrupt(), 130, "interrupted: the same command goes on"),
            (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), 2, "prepares batches died"),
        ],
    )
    def test_what_ends_it_is_said(self, monkeypatch, capsys, error, status, text):
        def end(arguments):
            raise error

        monkeypatch.setitem(cli.VERBS, "info", end)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["info", "model"])
        assert stopped.value.code == status and text in " ".join(capsys.readouterr().err.split())


def full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
