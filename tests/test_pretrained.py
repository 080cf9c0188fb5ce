"""The models that ship: small enough, honest about themselves, usable offline, and no worse than they say."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

import transfermium as tm
from transfermium import cli
from transfermium.model import SHIPPED

ROOT = Path(__file__).resolve().parents[1]


def test_small_ships_and_fits_in_three_megabytes():
    assert list(SHIPPED) == ["small"]
    assert SHIPPED["small"].stat().st_size < 3e6
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "transfermium"
    ]
    assert any(fnmatch("pretrained/small.safetensors", pattern) for pattern in patterns)


def test_its_card_says_what_it_is():
    card = tm.load("small").card
    assert {name: meaning[1] for name, meaning in card["quantities"].items()} == {
        "energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3",
    }  # fmt: skip
    assert set(card["levels"]) == {"PBE and PBE+U, VASP"} and len(card["elements"]) > 80
    assert "parts" not in card and card["history"][-1]["leaks left out"] > 0


def test_it_knows_something_of_crystals_it_never_saw():
    """Forces of strained, rattled cells of other materials, computed with another code."""
    test = tm.crystals("PBE", "test")
    forces = np.concatenate([atoms.get_forces() for atoms in test])
    found = tm.evaluate("small", test, verbose=False)["forces"]
    assert found["mae"] < 0.6 * np.abs(forces).mean() and found["r2"] > 0.6


def test_it_is_a_base_on_the_command_line(tmp_path, monkeypatch):
    import ase.io

    monkeypatch.chdir(tmp_path)
    structures = tm.crystals("PBE", "train")[:12]
    ase.io.write("a.extxyz", structures)
    words = "a.extxyz --base small --objective Potential --steps 1 --split-by random --out run"
    cli.main(["finetune", *words.split()])
    assert tm.load("run").card["history"][-1]["alignment"]["kept heads"] == ["energy"]


def test_a_file_of_the_same_name_is_not_confused_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tm.load("small").save("small")
    with pytest.raises(tm.InputError, match="small is here, and a model of that name ships with the package"):
        tm.load("small")
    assert tm.load("./small").card == tm.load(Path("small")).card
    with pytest.raises(tm.InputError, match="there is no file smal, and what ships with the package is small"):
        tm.load("smal")
