"""Levels of theory in studies: labels and tests are of one, and the study says which."""

import pytest
from ase.io import write

import transfermium as tm
from tests.alloys import alloys
from transfermium.errors import InputError
from transfermium.study.bakeoff import Target, bakeoff
from transfermium.study.curve import curve

QUICK = {
    "arms": ["full"], "sizes": [5], "seeds": 1, "pretraining": "2steps", "tuning": "2steps", "rates": [2e-3],
    "edges": 400, "backbone": tm.PaiNN(8, 1, 4.0, 6), "workers": 1, "quiet": True,
}  # fmt: skip


def at(level, n, seed):
    found = alloys(n, seed=seed)
    for atoms in found:
        atoms.info["level"] = level
    return found


@pytest.mark.parametrize(
    ("labels", "test", "base", "said"),
    [
        (at("r2SCAN", 12, 1), at("PBE", 4, 2), at("PBE", 9, 3), r"to train on: r2SCAN \(10\); to test on: PBE \(4\)"),
        (at("r2SCAN", 6, 1) + at("PBE", 6, 4), None, at("PBE", 9, 3), "several levels of theory"),
        (
            at("r2SCAN", 12, 1),
            None,
            at("PBE", 5, 3) + at("LDA", 4, 4),
            "to pre-train on are .*LDA.*--base-level",
        ),
    ],
)
def test_several_levels_for_one_head_are_refused_before_anything_trains(tmp_path, labels, test, base, said):
    with pytest.raises(InputError, match=said):
        curve(labels, tm.Potential(), tmp_path, base_data=base, test=test, **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_bakeoff_does_not_test_at_another_level_either(tmp_path):
    target = Target(at("r2SCAN", 12, 1), tm.Potential(), at("PBE", 4, 2))
    with pytest.raises(InputError, match="ours: labels to train on and to test on are of several levels of theory"):
        bakeoff(alloys(9, seed=3), {"ours": target}, tmp_path, quiet=True)


def test_one_level_is_chosen_and_what_is_known_of_it_is_told(tmp_path):
    mixed = at("r2SCAN", 12, 1) + at("PBE", 12, 2)
    result = curve(
        mixed, tm.Potential(), tmp_path, base_data=mixed, level="r2SCAN", base_level="PBE", test=at("r2SCAN", 4, 5),
        provenance={"code": "GPAW"}, base_provenance={"code": "VASP", "u": "none"}, **QUICK,
    )  # fmt: skip
    assert result["theory"] == {
        "labels": "r2SCAN (12), code GPAW", "test": "r2SCAN (4), code GPAW", "base": "PBE (12), code VASP, u none"
    }  # fmt: skip
    assert result["labels at hand"] == 12
    assert result["data"]["base"]["structures"] == 12
    html = (tmp_path / "report.html").read_text()
    assert "PBE (12), code VASP, u none" in html
    with pytest.raises(InputError, match="no structure is at the level 'SCAN'"):
        curve(mixed, tm.Potential(), tmp_path, base_data=mixed, level="SCAN", **QUICK)


def test_what_structures_say_is_not_overruled(tmp_path):
    labels = alloys(12, seed=1)
    for atoms in labels:
        atoms.info["functional"] = "PBEsol"
    with pytest.raises(InputError, match="provenance says functional=SCAN"):
        curve(labels, tm.Potential(), tmp_path, base_data=alloys(9), provenance={"functional": "SCAN"}, **QUICK)


def test_a_study_says_what_it_was_made_of(tmp_path):
    for name, structures in (("ours", alloys(12, seed=1)), ("cheap", alloys(9, seed=3))):
        write(tmp_path / f"{name}.extxyz", structures)
    result = curve(
        [tmp_path / "ours.extxyz"], tm.Potential(stress=0.0), tmp_path / "study",
        base_data=tmp_path / "cheap.extxyz", base_objective=tm.Denoise(0.1), **QUICK,
    )  # fmt: skip
    data = result["data"]
    assert data["labels"]["files"] == data["test"]["files"] == ["ours.extxyz"]
    assert data["base"]["files"] == ["cheap.extxyz"]
    assert data["base"]["elements"] == ["Cu", "Au"]
    assert data["base"]["labels"] == []  # none were looked at
    assert {entry["quantity"] for entry in data["labels"]["labels"]} == {"energy", "forces"}
    assert "Denoise" in str(result["settings"]["base objective"])
    assert result["settings"]["transfermium"] == tm.__version__
    html = (tmp_path / "study/report.html").read_text()
    assert "to pre-train on" in html
    assert data["base"]["fingerprint"] in html
