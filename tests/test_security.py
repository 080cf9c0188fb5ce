"""Files of strangers: nothing in them is executed, they reach nothing beside them, and pages show them as text."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tracemalloc
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import safetensors.torch
import torch
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential
from transfermium import cli
from transfermium.data.shard import _from_json
from transfermium.doctor import doctor
from transfermium.errors import InputError
from transfermium.report import Page, parity, run_report
from transfermium.report.simulation import page as simulation_page

SOURCE = Path(tm.__file__).parent
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{$"


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "EXECUTED"


# -------------------------------------------------------------------------------------------- nothing is executed


def test_the_bomb_would_go_off(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["a.pkl", "a.pickle", "a.p", "a.traj", "a.db", "a.json", "a.extxyz", "a.npy", "a.dat", "a.parquet", "a", "a.trj"],
)
@pytest.mark.parametrize("before", [b"", b"PickleTrajectory", b"PAR1", b"\x93NUMPY\x01\x00"])
def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path: Path, mark: Path, name: str, before: bytes) -> None:
    (tmp_path / name).write_bytes(before + pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError):
        tm.read(tmp_path / name)
    with pytest.raises(InputError):
        tm.load(tmp_path / name)
    assert not mark.exists()


def test_nor_are_checkpoints_and_arrays_with_one_in_them(tmp_path: Path, mark: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
    torch.save({"weights": Bomb(mark)}, tmp_path / "checkpoint.pt")
    np.save(tmp_path / "a.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    for name in ("model.pt", "checkpoint.pt", "a.npy"):
        for reads in (tm.read, tm.load):
            with pytest.raises(InputError):
                reads(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "builtins.eval", "transfermium.cli.main", "Module", "Model", "Bomb"]
)
def test_a_card_makes_backbones_and_heads_that_are_there_and_nothing_else(tmp_path: Path, name: str) -> None:
    spec = {"class": name, "arguments": {"args": "touch EXECUTED"}}
    for changes in ({"backbone": spec}, {"outputs": {"energy": spec}}):
        with pytest.raises(InputError, match=f"class {re.escape(name)} is not known here"):
            tm.load(with_card(tmp_path, **changes))
    model = tm.load(with_card(tmp_path, objective=spec))  # which is made when it is asked for
    with pytest.raises(InputError, match=f"class {re.escape(name)} is not known here"):
        tm.evaluate(model, alloys(2), verbose=False)


def test_a_record_of_uncertainty_may_name_the_output_of_another_part() -> None:
    outputs = {"energy": tm.EnergyHead(8), "gap": tm.ScalarHead(8)}
    parts = {"a": {"outputs": {"energy": "energy"}, "card": {}}}
    card = {"parts": parts, "uncertainty": {"targets": {"a energy": {"output": "gap"}}}}
    part = tm.Model(painn(), outputs, card).part("a")
    assert list(part.outputs) == ["energy"] and part.card["uncertainty"]["targets"]["energy"]["output"] == "gap"


def test_a_card_names_no_teacher(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Module and function come from the command line alone."""
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.chdir(tmp_path)
    stage = {**potential().card["history"][0], "teacher": {"name": "evil:teach", "parameters": "{}"}}
    model = tm.load(with_card(tmp_path, history=[stage], teacher="evil:teach"))
    tm.finetune(model, alloys(6), tm.Potential(), steps=1, **QUICK)
    atoms = alloys(6)
    for one in atoms:
        one.info["teacher"] = "evil:teach"
    tm.pretrain(atoms, tm.Potential(), painn(), steps=1, **QUICK)
    assert not mark.exists()


@pytest.mark.parametrize("typed", [False, True])
def test_modules_are_named_on_the_command_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ase.io.write("a.extxyz", alloys(12))
    name = f"own_objectives_{typed}"
    Path(f"{name}.py").write_text("import transfermium\nclass Own(transfermium.Potential):\n    pass\n")
    Path("c.yaml").write_text(f"objective: {{class_path: {name}.Own}}")
    named = f"--objective {name}.Own" if typed else "--config c.yaml"
    command = shlex.split(f"pretrain a.extxyz {named} --backbone PaiNN --backbone.width 8 --steps 1 --out OUT")
    if typed:
        cli.main(command)
        assert Path("OUT/model.safetensors").exists()
    else:
        with pytest.raises(SystemExit):
            cli.main(command)
        said = capsys.readouterr().err
        assert f"{name}.Own is code, which a configuration cannot name: give it on the command line" in said
        assert name not in sys.modules and not Path("OUT").exists()
    sys.modules.pop(name, None)


def test_a_configuration_does_not_replace_a_teacher_that_was_typed(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", alloys(4))
    Path("evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    Path("c.yaml").write_text("teacher: evil:teach")
    with pytest.raises(SystemExit):
        cli.main(shlex.split("pretrain a.extxyz --teacher small --config c.yaml --objective Potential --out OUT"))
    assert "evil:teach is code, which a configuration cannot name" in capsys.readouterr().err and not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:pathlib.Path.touch [[EXECUTED]]",
        "steps: !!python/object/new:os.system ['touch EXECUTED']",
        "lr: !!python/name:os.system",
        "objective: {class_path: subprocess.Popen, init_args: {args: 'touch EXECUTED'}}",
        "teacher: evil:teach",
        "objective: {class_path: evil.Teach}",
        "backbone: {class_path: evil.Teach}",
        "steps: __import__('os').system('touch EXECUTED')",
    ],
)
def test_a_configuration_is_text(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", alloys(4))
    Path("evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    Path("c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split("pretrain a.extxyz --config c.yaml --objective Potential --steps 1 --out OUT"))
    assert stopped.value.code == 2 and not mark.exists() and not Path("OUT").exists()


def test_what_looks_like_code_in_data_stays_text(tmp_path: Path) -> None:
    code = "__import__('os').system('touch EXECUTED')"
    atoms = alloys(1)[0]
    atoms.info |= {"note": code, "level": "{{7*7}}", "py": '_JSON {"__ase_objtype__": "os.system"}'}
    ase.io.write(tmp_path / "a.extxyz", atoms)
    tm.data.pack(tmp_path / "a.extxyz", tmp_path / "set", progress=False)
    for source in ("a.extxyz", "set"):
        (found,) = tm.read(tmp_path / source)
        assert found.info["note"] == code and found.info["level"] == "{{7*7}}"


@pytest.mark.parametrize("dtype", ["|O8", "|V8", "<M8"])
def test_packed_arrays_are_of_numbers(tmp_path: Path, dtype: str) -> None:
    atoms = alloys(1)[0]
    atoms.info["mixed"] = [np.arange(3), "x"]  # which goes to the column of JSON
    tm.data.pack([atoms], tmp_path / "set", progress=False)
    shard, header = tmp_path / "set" / "shard-00000.arrow", tmp_path / "set" / "transfermium.json"
    name = np.dtype(int).str.encode()
    assert name in shard.read_bytes()
    assert np.dtype(dtype).kind not in "biufU" and len(dtype) == len(name)
    shard.write_bytes(shard.read_bytes().replace(name, dtype.encode()))
    assert json.loads(header.read_text())["shards"][0]["bytes"] == shard.stat().st_size
    with pytest.raises(InputError, match="is damaged at its structure 0"):
        tm.data.PackedSet.open(tmp_path / "set")[0]


def test_the_package_itself_evaluates_no_text() -> None:
    """`teacher` alone imports what is named to it."""
    forbidden = {"eval", "exec", "compile", "__import__"}
    modules = {"pickle", "dill", "shelve", "marshal", "joblib"}
    importing = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "yaml.load", "yaml.unsafe_load"), f"{file}:{node.lineno}"
                if called == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
                    importing.add(file.name)
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & modules, f"{file}:{node.lineno}"
    assert importing == {"teacher.py"}


# ----------------------------------------------------------------------------------------------- memory is bounded


CLAIMS = [
    *[("width", 10**6), ("width", 10**9), ("depth", 10**7), ("depth", 9_000), ("radial", 10**9), ("elements", 10**9)],
]


@pytest.mark.parametrize(("name", "value"), CLAIMS)
def test_a_card_that_claims_too_much_is_refused_before_there_is_memory_for_it(
    tmp_path: Path, name: str, value: int
) -> None:
    path = claiming(tmp_path, name, value)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"larger model than it holds|more than it can hold"):
            tm.load(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # of Python objects
    finally:
        tracemalloc.stop()


PEAK = """
import re, sys
from pathlib import Path
import transfermium as tm

def peak():  # of memory, in kB
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

tm.load(sys.argv[1])
before = peak()
for path in sys.argv[2:]:
    try:
        tm.load(path)
    except tm.InputError:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, where processes are told their peak")
def test_nor_do_such_cards_take_memory_for_tensors(tmp_path: Path) -> None:
    """In a new process, for a peak says nothing below that of the tests before."""
    paths = [with_card(tmp_path)]
    for name, value in CLAIMS:
        (tmp_path / f"{name} {value}").mkdir()
        paths.append(claiming(tmp_path / f"{name} {value}", name, value))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(said.stdout) < 50_000


def claiming(folder: Path, name: str, value: int) -> Path:
    """The potential with a card in which an argument of the backbone is this large."""
    backbone = potential().architecture()["backbone"]
    backbone["arguments"][name] = value
    return with_card(folder, backbone=backbone)


def test_words_in_a_packed_set_take_no_more_than_they_are_long() -> None:
    found = _from_json({"@array": ["<U100000000", [1], ["x"]]})
    assert found.tolist() == ["x"] and found.nbytes < 100


def test_every_backbone_can_be_made_within_what_its_file_holds(tmp_path: Path) -> None:
    own = [cls for cls in tm.Backbone.__subclasses__() if cls.__module__.startswith("transfermium.")]
    assert len(own) > 5
    for backbone in own:
        model = tm.Model(backbone(), {"energy": tm.EnergyHead(backbone().width)})
        model.save(tmp_path / "m.safetensors")
        again = tm.load(tmp_path / "m.safetensors")
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- pages stay text


def test_html_is_written_where_it_is_escaped() -> None:
    """No other file has a tag in a text, so all else goes through `Page`."""
    tag = re.compile(r"</?(p|a|b|i|div|span|table|t[rdh]|h\d|img|script|style|svg|pre|code|ul|li|html|body)\b[^<]*>")
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and tag.search(node.value):
                found.add(file.relative_to(SOURCE).as_posix())
    assert found <= {"report/page.py", "report/structures.py"}


def test_the_page_of_a_run_shows_hostile_data_as_text(tmp_path: Path) -> None:
    structures = alloys(8)
    for k, atoms in enumerate(structures):
        atoms.info |= {"level": EVIL, "material_id": f"{EVIL}{k}", EVIL: atoms.info["gap"]}
    out = tmp_path / "run"
    model = tm.pretrain(structures, tm.Property("gap"), painn(), out=out, label={"gap": EVIL}, steps=1, **QUICK)
    assert EVIL in model.card["levels"]
    check(run_report(tmp_path / "run"))


def test_so_does_that_of_the_doctor_and_of_a_simulation(tmp_path: Path) -> None:
    structures = alloys(8)
    for atoms in structures:
        atoms.info |= {"level": EVIL, EVIL: 1.0, f"{EVIL}split": "train"}
        atoms.calc = SinglePointCalculator(atoms, **{**atoms.calc.results, "energy": -1.0})
    doctor(structures, out=tmp_path / "doctor", verbose=False)
    check(tmp_path / "doctor" / "doctor.html", said=False)

    result = tm.md(potential(), alloys(1)[0], tmp_path / "md", time="4steps", every="1steps", verbose=False)
    hostile = {**result, "formula": EVIL, "stopped": EVIL}
    check(simulation_page(hostile).write(tmp_path / "md.html"))


def test_figures_take_any_text(tmp_path: Path) -> None:
    """Also what would be mathematics to matplotlib, and broken."""
    for text in ("$\\frac{$", "$x^$", "<img>", "</svg><img>"):
        points = {"label": [1.0, 2.0], "prediction": [1.0, 2.5], "unit": text}
        check(Page(EVIL).figure(parity(points, text), EVIL).write(tmp_path / "page.html"))


def check(page: Path, said: bool = True) -> None:
    """No tag, attribute or address of a page comes from a file."""
    html = page.read_text()
    seen = Tags(html)
    assert not {"img", "iframe", "object", "embed", "form", "b"} & seen.tags.keys()
    assert seen.tags.get("script", 0) <= 1 and seen.scripts <= {"application/json"}
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "script-src" not in html and "default-src 'none'" in html
    if said:
        assert "alert(1)" in seen.text


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.scripts: set[str | None] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.add(dict(attrs).get("type"))

    def handle_data(self, data: str) -> None:
        self.text += data


def with_card(folder: Path, **changes: Any) -> Path:
    """The potential with other entries in its card."""
    model = potential()
    card = {"format": 1, **model.architecture(), **model.card, **changes}
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    path = folder / "m.safetensors"
    safetensors.torch.save_file(tensors, path, {"transfermium": json.dumps(card)})
    return path
