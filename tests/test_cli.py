"""The command line: the forms that work, what they print and where, and errors of one sentence."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from ase.build import molecule

import transfermium as tm
from tests.alloys import alloys, gap_model, potential, same_bits, weights_of
from transfermium import cli
from transfermium.model import described
from transfermium.train import read_metrics

TINY = "--backbone PaiNN --backbone.width 8 --backbone.depth 1 --backbone.cutoff 4 --edges 400 --device cpu"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where commands run: two data files, a potential and a property model."""
    monkeypatch.chdir(tmp_path)
    structures = alloys(10)
    ase.io.write("a.extxyz", structures[:6])
    ase.io.write("b.extxyz", structures[6:])
    potential().save("potential.safetensors")
    gap_model().save("gap.safetensors")
    return tmp_path


class TestForms:
    def test_pretrain(self, folder):
        run(f"pretrain a.extxyz b.extxyz --objective Potential {TINY} --steps 3 --seed 0 --out RUN")
        model = tm.load("RUN/model.safetensors")
        assert model.backbone.width == 8
        assert model.card["history"][-1]["steps"] == 3
        assert json.loads((folder / "RUN" / "config.json").read_text())["train"]["edges"] == 400

    def test_pretrain_is_the_python_function(self):
        run(f"pretrain a.extxyz --objective Potential {TINY} --steps 3 --seed 4 --out RUN")
        backbone = tm.PaiNN(width=8, depth=1, cutoff=4)
        expected = tm.pretrain("a.extxyz", tm.Potential(), backbone, edges=400, steps=3, seed=4, verbose=False)
        assert same_bits(weights_of(tm.load("RUN/model.safetensors")), weights_of(expected))

    def test_the_default_backbone_is_tensornet(self):
        run("pretrain a.extxyz --objective Potential --backbone.width 8 --steps 1 --out RUN")
        model = tm.load("RUN/model.safetensors")
        assert isinstance(model.backbone, tm.TensorNet)
        assert (model.backbone.width, model.backbone.depth, model.backbone.cutoff) == (8, 2, 5.0)

    @pytest.mark.parametrize("backbone", [tm.PaiNN, tm.CGCNN, tm.TensorNet])
    def test_a_backbone_has_its_own_defaults(self, backbone):
        """And none of the class that would have been the default."""
        run(f"pretrain a.extxyz --objective Potential --backbone {backbone.__name__} --steps 0 --out FLAG")
        Path("run.yaml").write_text(f"backbone: {{class_path: {backbone.__name__}}}")
        run("pretrain a.extxyz --objective Potential --config run.yaml --steps 0 --out FILE")
        for out in ("FLAG", "FILE"):
            assert described(tm.load(f"{out}/model.safetensors").backbone) == described(backbone())

    def test_any_objective_can_be_pretrained(self):
        run(f"pretrain a.extxyz --objective Denoise --objective.sigma 0.2 {TINY} --steps 1 --out NOISE")
        run(f"pretrain a.extxyz --objective Property --objective.name gap {TINY} --steps 1 --out GAP")
        assert tm.load("NOISE/model.safetensors").card["objective"]["arguments"]["sigma"] == 0.2
        assert list(tm.load("GAP/model.safetensors").outputs) == ["gap"]

    def test_finetune(self):
        run(
            "finetune potential.safetensors a.extxyz b.extxyz --objective Property --objective.name gap "
            "--steps 3 --out RUN2"
        )
        history = tm.load("RUN2/model.safetensors").card["history"]
        assert [stage["verb"] for stage in history] == ["pretrain", "finetune"]

    @pytest.mark.parametrize(
        "options",
        [
            "--sizes 5,10 20 --rates 1e-3,2e-3 --arms head,full aligned --base-sizes 30,60",
            "--sizes 5 10 20 --rates 1e-3 2e-3 --arms head full aligned --base-sizes 30 60",
            "--config lists.yaml",
        ],
    )
    def test_lists_of_a_curve(self, monkeypatch, options):
        given = {}
        monkeypatch.setattr("transfermium.study.curve.curve", lambda *_, **options: given.update(options))
        lists = {"sizes": [5, 10, 20], "rates": [0.001, 0.002], "arms": ["head", "full", "aligned"]}
        lists["base_sizes"] = [30, 60]
        Path("lists.yaml").write_text(yaml.safe_dump(lists))
        run(f"curve a.extxyz --objective Potential --base-data b.extxyz --out X {options}")
        assert {name: given[name] for name in lists} == lists
        assert given["pretraining"] is given["tuning"] is None

    def test_keys_and_units_of_a_comparison(self, monkeypatch):
        """Those of energies are of both sides, unless the cheap side has its own."""
        given = {}
        monkeypatch.setattr("transfermium.study.bakeoff.bakeoff", lambda *asked, **o: given.update(o, targets=asked[1]))
        words = "--label energy=E --unit energy=Hartree --base-label energy=E_cheap --arms scratch,e_derivative"
        run(f"bakeoff a.extxyz --target b.extxyz --objective Potential --out X {words} --sizes 2,3")
        assert given["label"] == {"energy": "E_cheap"} and given["unit"] == {"energy": "Hartree"}
        assert given["targets"]["target"][3:] == ({"energy": "E"}, {"energy": "Hartree"})
        assert given["arms"] == ["scratch", "e_derivative"] and given["sizes"] == [2, 3]
        run("bakeoff a.extxyz --target b.extxyz --property gap --out X --label gap=g energy=E")
        assert given["label"] == {"energy": "E"} and given["targets"]["gap"].label == {"gap": "g"}

    @pytest.mark.parametrize("key", ["forces", "REF_forces"])
    def test_noise_far_from_equilibrium_is_warned_of(self, capsys, key):
        """Though nothing learns these forces."""
        structures = alloys(4)
        for atoms in structures:
            atoms.arrays[key] = np.full((len(atoms), 3), 2.0)
            atoms.calc = None
        ase.io.write("far.extxyz", structures)
        told = "the median force is 3.5 eV/Å"
        run(f"pretrain far.extxyz --objective Denoise {TINY} --steps 1 --out RUN")
        assert told in " ".join(capsys.readouterr().err.split())
        parts = "{one: {class_path: Denoise}, two: {class_path: MaskElements}}"
        run(f"pretrain far.extxyz --objective Together --objective.parts '{parts}' {TINY} --steps 1 --out RUN2")
        assert told in " ".join(capsys.readouterr().err.split())

    def test_molecules_have_no_stress(self):
        run(f"pretrain a.extxyz --objective Potential --objective.conservative false {TINY} --steps 1 --out RUN")
        ase.io.write("free.extxyz", molecule("H2O"))
        run("predict RUN free.extxyz --out free_p.extxyz --allow-unseen")
        assert set(ase.io.read("free_p.extxyz").calc.results) == {"energy", "forces"}

    def test_finetune_options(self):
        run(
            "finetune potential.safetensors a.extxyz --objective Potential --objective.forces 10 --align false "
            "--backbone_lr 0 --steps 2 --valid b.extxyz --out RUN2"
        )
        model = tm.load("RUN2/model.safetensors")
        assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))
        assert model.card["history"][-1]["validation structures"] == 4
        assert "reference shift (eV)" not in model.card["history"][-1]["alignment"]

    @pytest.mark.parametrize(
        "words",
        [
            "a.extxyz --base potential.safetensors",
            "--base=potential.safetensors a.extxyz",
            "--valid b.extxyz --base potential.safetensors a.extxyz",
        ],
    )
    def test_the_base_may_be_an_option(self, words):
        run(f"finetune {words} --objective Property --objective.name gap --steps 0 --out RUN2")
        history = tm.load("RUN2").card["history"]
        assert len(history) == 2
        assert history[-1]["structures"] + ("valid" not in words) * history[-1]["validation structures"] == 6

    @pytest.mark.parametrize("words", ["--base", "--base= a.extxyz", "--base x --base y", "--base --steps 3"])
    def test_a_base_that_is_not_one_is_said(self, words, capsys):
        with pytest.raises(SystemExit):
            run(f"finetune a.extxyz --objective Potential --out RUN2 {words}")
        assert "--base needs one model" in capsys.readouterr().err

    def test_several_objectives_can_be_said(self, capsys):
        words = f"pretrain pbe=a.extxyz scan=b.extxyz --objective Together {TINY} --steps 1 --out RUN2".split()
        cli.main([*words, "--objective.parts", "{pbe: {class_path: Potential}, scan: {class_path: Potential}}"])
        assert "scan: Potential" in capsys.readouterr().err

    def test_it_says_what_was_asked_for_and_when_nothing_is_left_to_do(self, capsys):
        for _ in range(2):
            run(f"pretrain a.extxyz --objective Potential --objective.forces 9 {TINY} --steps 1 --out RUN")
        said = capsys.readouterr().err
        assert all(text in said for text in ("forces: 9", "PaiNN", "width: 8", "edges: 400", "out: RUN"))
        assert not any(text in said for text in ("weight_decay", "conservative", "split_by"))
        assert said.count("RUN is finished already") == 1

    def test_evaluate_a_potential(self, capsys):
        found = run_json("evaluate potential.safetensors a.extxyz b.extxyz --json", capsys)
        assert list(found) == ["n", "energy_per_atom", "forces", "stress"] and found["n"] == 10
        units = [found[name]["unit"] for name in ("energy_per_atom", "forces", "stress")]
        assert units == ["eV/atom", "eV/Å", "eV/Å^3"]
        assert {"mae", "rmse", "unit"} <= set(found["forces"])

    def test_evaluate_a_property(self, capsys):
        found = run_json("evaluate gap.safetensors a.extxyz --json", capsys)
        assert list(found) == ["n", "gap"] and {"mae", "rmse", "unit"} <= set(found["gap"])

    def test_evaluate_for_people(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        run("evaluate potential.safetensors a.extxyz")
        printed = capsys.readouterr().out
        for words in ("Errors on 6 structures", "meV/atom", "meV/Å", "GPa", "energy per atom", "Cu", "Au"):
            assert words in printed

    def test_predict(self):
        run("predict potential.safetensors a.extxyz b.extxyz --out predictions.extxyz")
        run("predict gap.safetensors a.extxyz --out predictions.csv")
        assert len(tm.read("predictions.extxyz")) == 10
        with open("predictions.csv", newline="") as file:
            assert list(csv.DictReader(file))[5]["gap"]

    def test_info(self, capsys):
        card = run_json("info potential.safetensors --json", capsys)
        run("info potential.safetensors")
        assert yaml.safe_load(capsys.readouterr().out) == card
        assert card["backbone"]["class"] == "PaiNN" and card["history"][-1]["steps"] == 20
        assert card["parameters"] == sum(p.numel() for p in potential().parameters())

    def test_pack(self):
        run("pack a.extxyz b.extxyz --out PACKED --level EMT")
        assert len(tm.read("PACKED")) == 10
        run(f"pretrain PACKED --objective Potential {TINY} --steps 1 --out RUN")
        assert tm.load("RUN/model.safetensors").card["levels"] == {"EMT": 8}  # two validate

    def test_pack_keeps_what_it_did_not_write(self, folder, capsys):
        (folder / "work").mkdir()
        (folder / "work" / "thesis.tex").write_text("")
        for path in ("work", "potential.safetensors"):
            assert f"{path} exists and is no packed set" in error(f"pack a.extxyz --out {path}", capsys)
        assert [path.name for path in (folder / "work").iterdir()] == ["thesis.tex"]

    def test_time_bounds_a_run(self):
        run(f"pretrain a.extxyz --objective Potential {TINY} --time 1s --out RUN")
        rows = read_metrics(Path("RUN"))
        assert rows[-1]["elapsed"] >= 1 >= rows[-2]["elapsed"]  # rounded to milliseconds

    def test_labels_and_units(self):
        structures = alloys(4)
        for atoms in structures:
            atoms.info["E_ha"] = atoms.get_potential_energy() / 27.2
            atoms.info["w"] = 3.0
            atoms.calc = None
        ase.io.write("own.extxyz", structures)
        run(
            f"pretrain own.extxyz --objective Potential {TINY} --steps 1 --out RUN "
            "--label energy=E_ha --unit energy=hartree"
        )
        (entry,) = tm.load("RUN/model.safetensors").card["labels"]["labels"]
        assert (entry["keys"][0][1], entry["given_unit"]) == ("E_ha", "hartree")

    def test_several_labels_in_one_or_more_options(self, capsys):
        options = ["--label energy=energy forces=forces", "--label energy=energy --label forces=forces"]
        first, second = (run_json(f"evaluate potential.safetensors a.extxyz {o} --json", capsys) for o in options)
        assert first == second

    @pytest.mark.parametrize("verb", ["", *cli.VERBS])
    def test_help(self, verb, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*verb.split(), "--help"])
        assert stopped.value.code == 0
        assert "usage: transfermium" in capsys.readouterr().out

    def test_as_a_program(self):
        command = [sys.executable, "-m", "transfermium.cli", "evaluate", "potential.safetensors", "a.extxyz", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["n"] == 6
        failed = subprocess.run([*command[:3], "info", "nothing.safetensors"], capture_output=True, text=True)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr == "error: there is no file nothing.safetensors\n"


class TestConfig:
    def test_a_file_can_hold_the_options(self):
        settings = {
            "objective": {"class_path": "Potential", "init_args": {"forces": 2.0}},
            "backbone": {"class_path": "PaiNN", "init_args": {"width": 8, "depth": 1, "cutoff": 4.0}},
            "steps": 5,
            "edges": 400,
        }
        Path("run.yaml").write_text(yaml.safe_dump(settings))
        run("pretrain a.extxyz --config run.yaml --steps 2 --out RUN")
        card = tm.load("RUN/model.safetensors").card
        assert card["objective"]["arguments"]["forces"] == 2.0
        assert card["history"][-1]["steps"] == 2  # what is typed wins

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("stpes: 3", "there is no option stpes; did you mean steps"),
            ("backbone: {class_path: PaiNN, init_args: {widht: 8}}", "no option 'widht'; did you mean width?"),
            ("steps: [", "Problems parsing config"),
            ("steps: many", "--steps is many, but must be int"),
        ],
    )
    def test_what_is_wrong_in_it_is_named(self, text, words, capsys):
        Path("run.yaml").write_text(text)
        assert words in error("pretrain a.extxyz --objective Potential --config run.yaml --out RUN", capsys)


class TestRunFolder:
    COMMAND = f"pretrain a.extxyz --objective Potential {TINY} --steps 2 --out RUN"

    def test_a_finished_run_returns_at_once(self):
        run(self.COMMAND)
        written = Path("RUN/model.safetensors").stat().st_mtime_ns
        run(self.COMMAND)
        assert Path("RUN/model.safetensors").stat().st_mtime_ns == written

    def test_another_command_is_refused(self, capsys):
        run(self.COMMAND)
        found = error(self.COMMAND + " --backbone.radial 7", capsys)
        assert "backbone.arguments.radial was" in found and "is 7 now; choose another folder" in found

    def test_a_foreign_folder_is_refused(self, folder, capsys):
        (folder / "RUN").mkdir()
        (folder / "RUN" / "thesis.tex").write_text("")
        assert "not a run of transfermium" in error(self.COMMAND, capsys)


class TestErrors:
    """Exit status 2, one line on standard error, nothing on standard output."""

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("", "give a verb: demo, pretrain"),
            ("pretrian a.extxyz", "there is no verb 'pretrian', only .*; did you mean pretrain"),
            ("pretrain c.extxyz --objective Potential --out X", "c.extxyz: no such file"),
            ("pretrain a.extxyz --objective Potential --out X --stepz 3", "no option --stepz; did you mean --steps"),
            ("pretrain a.extxyz --objective Potential --out X --step 3", "no option --step; did you mean --steps"),
            ("pretrain a.extxyz --objective Potential --out X --steps two", "--steps is two, but must be int"),
            ("pretrain a.extxyz --objective Potential --out X --steps -1", "steps is -1, but must not be negative"),
            (
                "pretrain a.extxyz --objective Potential --out X --dtype half",
                "--dtype is half, .* 'float32', 'float64'",
            ),
            (
                "pretrain a.extxyz --objective Potential --out X --time 10minn",
                "'10minn' is not a time: write 90s, 10min",
            ),
            ("pretrain a.extxyz --objective Potential --out X --device abacus", "device 'abacus' cannot be used"),
            ("pretrain a.extxyz --objective Potental --out X", "no objective 'Potental', .*; did you mean Potential"),
            ("pretrain a.extxyz --objective Potential --backbone PaiN --out X", "no backbone 'PaiN'.* mean PaiNN"),
            (
                "pretrain a.extxyz --objective Potential --backbone.widht 8 --out X",
                "--backbone has no option 'widht'; did you mean width",
            ),
            (
                "pretrain a.extxyz --objective Potential --objective.frces 8 --out X",
                "--objective has no option 'frces'; did you mean forces",
            ),
            (
                "pretrain a.extxyz --objective MaskAtoms --objective.radius 3 --out X",
                "--objective has no option 'radius'$",
            ),
            (
                "pretrain a.extxyz --objective=MaskAtoms --objective.fractio 3 --out X",
                r"--objective has no option 'fractio'; did you mean fraction\?$",
            ),
            (
                "pretrain a.extxyz --objective Potential --backbone PaiNN --backbone.radius 3 --out X",
                r"--backbone has no option 'radius'; did you mean radial\?$",
            ),
            (
                "pretrain a.extxyz --objective Potential --backbone.radius 3 --out X",
                r"--backbone has no option 'radius'; did you mean radial\?$",
            ),
            ("pretrain a.extxyz --objective Potential --objective.forces -1 --out X", "the weight of forces is -1"),
            ("pretrain a.extxyz --objective Potential --backbone.cutoff -1 --out X", "a cutoff of -1.0 Å"),
            ("pretrain a.extxyz --objective Property --out X", "objective needs --objective.name"),
            (
                "pretrain a.extxyz --objective Property --objective.name gpa --out X",
                "no structure has 'gpa'.* mean gap",
            ),
            (
                "pretrain a.extxyz --objective Property --objective.name gap --objective.kind intensve --out X",
                "--objective.kind is intensve, but must be one of 'intensive', 'extensive', 'per-atom'",
            ),
            ("pretrain a.extxyz --out X", "pretrain needs --objective"),
            ("pretrain a.extxyz --objective Potential", "pretrain needs --out"),
            ("pretrain a.extxyz --objective Potential --label energy --out X", "--label energy is not NAME=KEY"),
            ("pretrain a.extxyz --objective Potential --unit energy= --out X", "--unit energy= is not NAME=UNIT"),
            ("pretrain a.extxyz --objective Potential --label energy=e --out X", "no structure has 'e'"),
            ("pretrain a.extxyz --objective Potential --unit energy=hartre --out X", "'hartre'.* mean hartree"),
            ("pretrain a.extxyz --objective Potential --config none.yaml --out X", "there is no file .*none.yaml"),
            ("finetune a.extxyz b.extxyz --objective Potential --out X", "a.extxyz is not a complete safetensors file"),
            (
                "finetune potential.safetensors a.extxyz --objective Potential --backbone PaiNN --out X",
                "no option --bac",
            ),
            (
                "finetune potential.safetensors a.extxyz --objective Potential --strategy aligned --lr 0.1 --out X",
                "strategy 'aligned' does no step of training, so lr=0.1 would change nothing",
            ),
            (
                "curve a.extxyz --objective Potential --base small --out X --budget 30min --tuning 300steps",
                "a budget shares out the time of both stages, but 300steps is given for one",
            ),
            (
                "curve a.extxyz --objective Potential --base small --out X --base-unit energy=hartree",
                "base_unit is of bases that are pre-trained here",
            ),
            ("curve a.extxyz --objective Potential --base small --out X --rates 1e-3,x", "--rates has 'x'"),
            ("evaluate potential.safetensors", "evaluate needs data"),
            ("evaluate potential.safetensors a.extxyz --jsn", "no option --jsn; did you mean --json"),
            ("evaluate potential.safetensors c.extxyz --json", "c.extxyz: no such file"),
            ("evaluate gap.safetensors bare.extxyz --json", "no structure has 'gap'"),
            ("evaluate foreign.safetensors a.extxyz --json", "foreign.safetensors is not a transfermium model"),
            ("predict potential.safetensors a.extxyz", "predict needs --out"),
            ("predict potential.safetensors a.extxyz --out p.cif", "ends in '.cif'"),
            ("info [bold]nothing", r"there is no file \[bold\]nothing"),
            ("pack c.extxyz --out X", "c.extxyz: no such file"),
        ],
    )
    def test_one_sentence(self, command, words, capsys):
        safetensors.torch.save_file({"a": torch.zeros(1)}, "foreign.safetensors")
        ase.io.write("bare.extxyz", ase.Atoms("Cu"))
        found = error(command, capsys)
        assert re.search(words, found), found

    def test_a_defect_of_ours_is_not_hidden(self, monkeypatch):
        def broken(arguments):
            raise RuntimeError("ours")

        monkeypatch.setitem(cli.VERBS, "info", broken)
        with pytest.raises(RuntimeError, match="ours"):
            run("info potential.safetensors")

    def test_interrupting_is_no_crash(self, monkeypatch, capsys):
        def interrupted(arguments):
            raise KeyboardInterrupt

        monkeypatch.setitem(cli.VERBS, "info", interrupted)
        assert "goes on where it was last saved" in error("info potential.safetensors", capsys, status=130)


def run(command: str) -> None:
    cli.main(shlex.split(command))


def run_json(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """What a command printed, which must be one JSON object and no word on standard error."""
    capsys.readouterr()
    run(command)
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("\n") == 1
    return json.loads(printed.out)


def error(command: str, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line that a command failed with."""
    with pytest.raises(SystemExit) as stopped:
        run(command)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == status
    assert printed.err.endswith(f"{lines[0]}\n") and len(lines) == 1
    assert "Traceback" not in printed.err and printed.out == ""
    return lines[0]
