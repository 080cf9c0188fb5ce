"""Imports run downhill: a module knows what lies below it, and nothing above."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

LAYERS = (  # lowest first; neighbours in a layer may import each other, though never in a circle
    {"errors", "console", "bars"},
    {"graph", "nn", "optim", "molecules", "observables", "references", "untrusted", "flop"},
    {"messages"},
    {"backbones"},
    {"heads"},
    {"model", "objectives"},
    {"data", "distributed", "run", "crystals", "waters"},
    {"train", "rehearsal", "dataset", "lora", "uncertainty", "seen"},
    {
        "transfer",
        "align",
        "unseen",
        "card",
        "equivariance",
        "jacobian",
        "evaluate",
        "levels",
        "features",
        "calculator",
        "suggest",
        "teacher",
    },
    {"study", "doctor", "report", "simulate", "testing"},
    {"transfermium"},  # the public names
    {"cli", "__main__"},
)
FORBIDDEN = {("objectives", "backbones")}  # downhill, and wrong all the same: an objective works on any architecture

HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
FILES = sorted((SOURCE / "transfermium").rglob("*.py"))
PARTS = {path.stem for path in (SOURCE / "transfermium").iterdir()} | set(HEIGHT)  # also those not written yet


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downhill(file: Path) -> None:
    part = part_of(module_name(file))
    assert part in HEIGHT, f"'{part}' has no layer: give it one in {Path(__file__).name}"

    for line, imported in imports(file.read_text(), module_name(file), file.name == "__init__.py"):
        assert imported in HEIGHT, f"{file}:{line} imports '{imported}', which has no layer"
        assert HEIGHT[imported] <= HEIGHT[part], f"{file}:{line}: '{part}' imports '{imported}', which lies above it"
        assert (part, imported) not in FORBIDDEN, f"{file}:{line}: '{part}' must not know '{imported}'"


def test_imports_make_no_circle() -> None:
    knows: dict[str, set[str]] = {}
    for file in FILES:
        part = part_of(module_name(file))
        found = imports(file.read_text(), module_name(file), file.name == "__init__.py")
        knows.setdefault(part, set()).update(imported for _, imported in found if imported != part)

    TopologicalSorter(knows).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import transfermium.train", "train"),
        ("import transfermium as tm", "transfermium"),
        ("from transfermium import train", "train"),
        ("from transfermium import pretrain", "transfermium"),
        ("from transfermium.data.read import read", "data"),
        ("from .base import Head", "backbones"),
        ("from . import base", "backbones"),
        ("from .. import cli", "cli"),
        ("from ..graph import AtomGraph", "graph"),
        ("def late():\n    from ..train import train", "train"),
        ("if TYPE_CHECKING:\n    from ..model import Model", "model"),
    ],
)
def test_every_form_of_import_is_seen(code: str, expected: str) -> None:
    assert [part for _, part in imports(code, "transfermium.backbones.painn", is_package=False)] == [expected]


def test_relative_imports_of_a_package_start_inside_it() -> None:
    code = "from .painn import PaiNN\nfrom ..graph import AtomGraph"
    found = [part for _, part in imports(code, "transfermium.backbones", is_package=True)]
    assert found == ["backbones", "graph"]


@pytest.mark.parametrize("code", ["import torch", "from ase import Atoms", "from .. import __version__"])
def test_other_packages_and_the_version_are_free(code: str) -> None:
    assert not list(imports(code, "transfermium.backbones.painn", is_package=False))


def imports(code: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Lines of the code that import from transfermium, wherever they stand, with the part they import."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module, is_package)
            names = [f"{origin}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "transfermium":
                yield node.lineno, part_of(name)


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    up = node.level - is_package  # one dot is the package itself, or the package around a module
    base = module.split(".")[: len(module.split(".")) - up]
    return ".".join([*base, node.module] if node.module else base)


def part_of(name: str) -> str:
    """The file or folder below `transfermium` that a dotted name lies in; `transfermium` for a public name."""
    _, *rest = name.split(".")
    return rest[0] if rest and rest[0] in PARTS else "transfermium"


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
