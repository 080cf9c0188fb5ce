"""Provenance: labels of several levels of theory never share a head unnoticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, without
from transfermium.cli import main
from transfermium.data import pack, read
from transfermium.data.provenance import as_text, origins

TINY = {**QUICK, "steps": 1}


class TestMixture:
    def test_two_levels_are_refused_with_counts_and_ways_out(self):
        with pytest.raises(tm.InputError, match=r"several levels of theory, .*PBE \(\d\)") as refused:
            trained(mixture())
        words = str(refused.value)
        assert "r2SCAN (" in words
        assert all(way in words for way in ("--level NAME", "Together", "PART=FILE", "--allow-mixed"))

    @pytest.mark.parametrize("key", ["level", "functional", "xc"])
    def test_any_name_of_a_level_counts(self, key):
        with pytest.raises(tm.InputError, match="PBE"):
            trained(mixture(key))

    def test_one_level_can_be_chosen(self):
        model = trained(mixture(), level="r2SCAN")
        assert model.card["levels"] == {"r2SCAN": 3} and model.card["history"][-1]["validation structures"] == 1
        with pytest.raises(tm.InputError, match=r"at the level 'SCAN': there are PBE \(6\), r2SCAN \(4\)"):
            trained(mixture(), level="SCAN")

    def test_they_can_be_mixed_knowingly(self, capsys):
        model = tm.pretrain(mixture(), tm.Potential(), painn(), allow_mixed=True, **{**TINY, "verbose": True})
        assert set(model.card["levels"]) == {"PBE", "r2SCAN"}
        assert "as was allowed" in " ".join(capsys.readouterr().err.split())

    def test_structures_without_labels_do_not_count(self):
        bare = without(at("r2SCAN", alloys(4, seed=1)), "energy", "forces", "stress")
        assert set(trained([*at("PBE", alloys(6)), *bare]).card["levels"]) == {"PBE", "r2SCAN"}

    def test_nor_does_a_level_matter_where_nothing_is_labelled(self):
        tm.pretrain(mixture(), tm.Denoise(0.1), painn(), **TINY)

    def test_properties_have_levels_too(self):
        with pytest.raises(tm.InputError, match="several levels of theory"):
            tm.pretrain(mixture(), tm.Property("gap"), painn(), **TINY)

    def test_validation_must_be_of_the_same_level(self):
        with pytest.raises(tm.InputError, match=r"to train on: PBE \(6\); to validate: r2SCAN \(4\)"):
            trained(at("PBE", alloys(6)), valid=at("r2SCAN", alloys(4, seed=1)), split_by="auto")

    def test_isolated_atoms_must_be_of_the_same_level(self):
        lone = Atoms("Cu", info={"config_type": "IsolatedAtom", "level": "r2SCAN"})
        lone.calc = SinglePointCalculator(lone, energy=-3.0)
        with pytest.raises(tm.InputError, match=r"isolated atoms: r2SCAN \(1\)"):
            trained([*at("PBE", alloys(6)), lone])

    def test_unstated_levels_agree_with_any(self):
        assert trained([*alloys(4), *at("PBE", alloys(4, seed=1))]).card["levels"]["PBE"] <= 4

    @pytest.mark.parametrize("fields", [{"code": "VASP"}, {"code": "VASP", "pseudopotentials": "PBE_54"}])
    def test_codes_that_differ_are_refused(self, fields):
        structures = at("PBE", alloys(8))
        for atoms in structures[:4]:
            atoms.info["provenance"] = as_text(fields)
        trained(structures)  # the others say nothing
        for atoms in structures[4:]:
            atoms.info["provenance"] = {"code": "GPAW"}
        with pytest.raises(tm.InputError, match=r"several values of 'code', .*VASP \(\d\)"):
            trained(structures)

    def test_parts_have_levels_of_their_own(self):
        data = {"pbe": at("PBE", alloys(5)), "scan": at("r2SCAN", alloys(5, seed=1))}
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        tm.pretrain(data, objective, painn(), **TINY)
        with pytest.raises(tm.InputError, match=r"part scan: .* PBE \("):
            tm.pretrain({**data, "scan": mixture()}, objective, painn(), **TINY)

    def test_what_is_marked_for_a_part_is_of_its_level(self):
        structures = mixture()
        for atoms in structures:
            atoms.info["part"] = "pbe" if atoms.info["level"] == "PBE" else "scan"
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        tm.pretrain(structures, objective, painn(), **TINY)

    def test_fidelities_are_told_levels_apart_by(self):
        objective = tm.Fidelities({"PBE": tm.Potential(), "r2SCAN": tm.Potential()})
        tm.pretrain(mixture(), objective, painn(), **TINY)

    def test_the_rule_of_the_materials_project_is_one_level(self, capsys):
        structures = oxides()
        for atoms in structures:
            atoms.info["level"] = "PBE+U" if "Fe" in atoms.symbols else "PBE"
        tm.pretrain(structures, tm.Potential(), painn(), **{**TINY, "verbose": True})
        assert "by the rule of the Materials Project" in " ".join(capsys.readouterr().err.split())
        structures[0].info["level"] = "PBE" if "Fe" in structures[0].symbols else "PBE+U"
        with pytest.raises(tm.InputError, match="several levels of theory"):
            trained(structures)


class TestBase:
    """What a base learned at one level is neither replayed nor judged at another."""

    @pytest.mark.parametrize("key", ["level", "functional", "xc"])
    @pytest.mark.parametrize("what", ["replay", "ledger"])
    def test_another_level_is_refused(self, what, key):
        with pytest.raises(tm.InputError, match=rf"{what}: .*r2SCAN \(6\), but the base learned PBE: give") as refused:
            tuned(**{what: at("r2SCAN", alloys(6), key)})
        assert "--allow-mixed" in str(refused.value) and ("--pseudo" in str(refused.value)) == (what == "replay")

    @pytest.mark.parametrize("what", ["replay", "ledger"])
    def test_that_of_the_base_is_not(self, what):
        tuned(**{what: at("PBE", alloys(6))})
        tuned(**{what: alloys(6)})  # which name none
        tuned(**{what: at("r2SCAN", alloys(6))}, start=trained(alloys(6)))
        tuned(**{what: at("pbe, VASP", alloys(6))})
        mixed = trained(mixture(), allow_mixed=True)
        tuned(**{what: mixture()}, start=mixed)

    @pytest.mark.parametrize("what", ["replay", "ledger"])
    def test_one_structure_of_another_level_is_enough(self, what):
        with pytest.raises(tm.InputError, match=rf"{what}: labels are at r2SCAN \(1\)"):
            tuned(**{what: [*at("r2SCAN", alloys(1)), *at("PBE", alloys(5, seed=1))]})
        bare = without(at("r2SCAN", alloys(1)), "energy", "forces", "stress")
        tuned(**{what: [*bare, *at("PBE", alloys(5, seed=1))]})

    def test_what_was_said_of_the_labels_of_a_base_counts(self):
        start = trained(alloys(6), provenance={"functional": "PBE"})
        with pytest.raises(tm.InputError, match="but the base learned PBE"):
            tuned(ledger=at("r2SCAN", alloys(4)), start=start)
        tuned(ledger=at("PBE", alloys(4)), start=start)

    @pytest.mark.parametrize("what", ["replay", "ledger"])
    def test_it_can_be_wanted(self, what, capsys):
        tuned(**{what: at("r2SCAN", alloys(6))}, allow_mixed=True, verbose=True)
        assert "but the base learned PBE, as was allowed" in said(capsys)

    def test_labels_that_the_base_makes_are_at_its_level(self):
        tuned(replay=at("r2SCAN", alloys(6)), pseudo=True)

    def test_the_rule_of_the_materials_project_is_one_level(self):
        structures = oxides()
        for atoms in structures:
            atoms.info["level"] = "PBE+U" if "Fe" in atoms.symbols else "PBE"
        start = trained([atoms for atoms in structures if "Fe" not in atoms.symbols])
        iron = [atoms for atoms in structures if "Fe" in atoms.symbols]
        tuned(ledger=iron, start=start, structures=structures[:1])
        for atoms in structures:
            atoms.info["level"] = "PBE+U"
        with pytest.raises(tm.InputError, match=r"PBE\+U \(8\), but the base learned PBE"):
            tuned(ledger=structures, start=start, structures=structures[:1])

    def test_parts_have_levels_of_their_own(self):
        data = {"pbe": at("PBE", alloys(5)), "scan": at("r2SCAN", alloys(5, seed=1))}
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        both = tm.pretrain(data, objective, painn(), **TINY)
        tuned(ledger=data["scan"], start=both, part="scan")
        with pytest.raises(tm.InputError, match=r"r2SCAN \(5\), but the base learned PBE"):
            tuned(ledger=data["scan"], start=both, part="pbe")

    def test_zero_shot_learns_no_level(self, capsys):
        base = tuned(strategy="zero-shot", structures=at("r2SCAN", alloys(6)), steps=None)
        tm.evaluate(base, at("PBE", alloys(4)), device="cpu")
        assert "learned" not in said(capsys)

    def test_evaluate_names_both_levels_where_none_is_common(self, capsys):
        model = trained(at("PBE", alloys(6)))
        for level, told in (("PBE", False), ("r2SCAN", True), ("teacher: PBE", False), ("GGA", False)):
            tm.evaluate(model, at(level, alloys(4)), device="cpu")
            assert ("labels are at r2SCAN (4), but the model learned PBE: errors have" in said(capsys)) == told
        tm.evaluate(model, alloys(4), device="cpu")
        tm.evaluate(model, mixture(), device="cpu")
        tm.evaluate(model, at("r2SCAN", alloys(4)), device="cpu", verbose=False)
        assert "learned" not in said(capsys)

    def test_differences_have_two_levels(self, capsys):
        structures = at("PBE", alloys(6))
        for atoms in structures:
            atoms.info["cheap"] = 0.9 * atoms.info["gap"]
        model = tm.pretrain(structures, tm.Property("gap", minus="cheap"), painn(), **TINY)
        tm.evaluate(model, at("HSE06", structures), device="cpu")
        assert "HSE06" not in said(capsys)


class TestRecord:
    def test_it_is_in_card_and_history(self):
        given = {"functional": "PBE", "code": "VASP", "u": "as in MP", "corrections": "none"}
        model = trained(alloys(6), provenance=given)
        assert model.card["provenance"] == model.card["history"][-1]["provenance"] == given
        tuned = tm.finetune(model, at("r2SCAN", alloys(6)), tm.Potential(), provenance={"code": "FHI-aims"}, **TINY)
        assert tuned.card["provenance"] == {"code": "FHI-aims"} and tuned.card["levels"] == {"r2SCAN": 5}
        assert tuned.card["history"][0]["provenance"] == given

    def test_cards_stay_as_they_were_where_nothing_is_said(self):
        for structures in (alloys(6), at("PBE", alloys(6))):
            card = trained(structures).card
            assert "provenance" not in card and "provenance" not in card["history"][-1]

    def test_a_functional_is_kept_where_no_level_is_named(self):
        structures = alloys(6)
        for atoms in structures:
            atoms.info["functional"] = "revPBE0-D3"
        assert trained(structures).card["provenance"] == {"functional": "revPBE0-D3"}

    def test_parts_keep_their_own(self):
        data = {"pbe": alloys(5), "scan": alloys(5, seed=1)}
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        model = tm.pretrain(data, objective, painn(), provenance={"scan.code": "GPAW"}, **TINY)
        assert model.card["provenance"] == {"scan": {"code": "GPAW"}} and model.part("pbe").card["provenance"] == {}
        assert model.part("scan").card["provenance"] == {"code": "GPAW"}

    @pytest.mark.parametrize(
        ("provenance", "words"),
        [({"functionl": "PBE"}, "no provenance 'functionl', .*did you mean functional"),
         ({"pbe.code": "VASP"}, "no provenance 'pbe.code'"),
         ({"code": "GPAW"}, "provenance says code=GPAW, but structures have code=VASP")],
    )  # fmt: skip
    def test_mistakes_are_named(self, provenance, words):
        structures = alloys(6)
        structures[0].info["provenance"] = "code=VASP"
        with pytest.raises(tm.InputError, match=words):
            trained(structures, provenance=provenance)

    def test_transfer_says_from_what_to_what(self, capsys):
        base = trained(at("PBE", alloys(6)), provenance={"code": "VASP", "u": "MP"})
        options = {**TINY, "verbose": True}
        tm.finetune(base, at("PBEsol", alloys(6)), tm.Potential(), provenance={"code": "Quantum ESPRESSO"}, **options)
        printed = " ".join(capsys.readouterr().err.split())
        assert "the base learned PBE (5), code VASP, u MP; these are PBEsol (6), code Quantum ESPRESSO" in printed


class TestPacked:
    def test_columns_say_what_structures_say(self, tmp_path):
        structures = mixture()
        structures[0].info["provenance"] = {"code": "VASP", "u": "4 eV"}
        structures[1].info["provenance"] = "code=GPAW"
        structures[2].info.pop("level")
        packed = pack(structures, tmp_path / "packed", shard_size=3, progress=False)
        for numbers, found in (origins(structures), origins(packed)):
            assert [found[i] for i in numbers] == [
                {"level": "PBE", "code": "VASP", "u": "4 eV"}, {"level": "PBE", "code": "GPAW"}, {},
                *[{"level": "PBE"}] * 3, *[{"level": "r2SCAN"}] * 4,
            ]  # fmt: skip

    def test_what_a_pack_was_told_travels_with_it(self, tmp_path):
        packed = pack(alloys(6), tmp_path / "p", level="PBE", provenance={"code": "VASP"}, progress=False)
        assert trained(packed).card["provenance"] == {"code": "VASP"}
        other = pack(alloys(6, seed=1), tmp_path / "q", level="PBE", provenance={"code": "GPAW"}, progress=False)
        with pytest.raises(tm.InputError, match=r"'code', .*GPAW"):
            trained([packed, other])

    def test_two_packs_of_two_levels_are_refused(self, tmp_path):
        paths = [str(tmp_path / level) for level in ("PBE", "SCAN")]
        for path, level in zip(paths, ("PBE", "SCAN"), strict=True):
            pack(alloys(6), path, level=level, progress=False)
        with pytest.raises(tm.InputError, match="several levels of theory"):
            trained(paths)
        assert trained(paths, level="SCAN").card["levels"] == {"SCAN": 5}


def test_the_command_line_knows_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pack(mixture(), "mixed", progress=False)
    words = "pretrain mixed --objective Potential --backbone PaiNN --backbone.width 8 --backbone.depth 1 --steps 1"
    with pytest.raises(SystemExit):
        main([*words.split(), "--out", "none"])
    assert "several levels of theory" in capsys.readouterr().err
    main([*words.split(), "--out", "one", "--level", "PBE", "--provenance", "code=VASP", "u=none"])
    main([*words.split(), "--out", "both", "--allow-mixed"])
    one, both = (tm.load(f"{name}/model.safetensors").card for name in ("one", "both"))
    assert one["provenance"] == {"code": "VASP", "u": "none"} and set(one["levels"]) == {"PBE"}
    assert set(both["levels"]) == {"PBE", "r2SCAN"}
    config = json.loads((tmp_path / "both/config.json").read_text())
    assert "level" not in config and "provenance" not in config
    main(["pack", "mixed", "--out", "again", "--provenance", "code=VASP"])
    assert read("again")[0].info["provenance"] == "code=VASP"


def trained(structures, **options) -> tm.Model:
    return tm.pretrain(structures, tm.Potential(), painn(), **{**TINY, **options})


def tuned(start: tm.Model | None = None, **options) -> tm.Model:
    """A base of PBE, by default, that goes on to r2SCAN."""
    structures = options.pop("structures", None) or at("r2SCAN", alloys(6, seed=2))
    options = {"strategy": "replay" if "replay" in options else "full", **TINY, **options}
    return tm.finetune(start or trained(at("PBE", alloys(6))), structures, tm.Potential(), **options)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def mixture(key: str = "level") -> list[Atoms]:
    return [*at("PBE", alloys(6), key), *at("r2SCAN", alloys(4, seed=1), key)]


def at(level: str, structures: list[Atoms], key: str = "level") -> list[Atoms]:
    for atoms in structures:
        atoms.info[key] = level
    return structures


def oxides() -> list[Atoms]:
    """With iron, whose oxides have a U, and with magnesium."""
    structures = alloys(8)
    for k, atoms in enumerate(structures):
        atoms.numbers[:] = np.array([26 if k % 2 else 12, 8, 8, 26 if k % 4 == 1 else 12])
    return structures
