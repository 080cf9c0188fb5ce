"""What a model has seen is known from its file: copies of structures are found, others are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

import transfermium as tm
from tests.alloys import QUICK, alloys, painn
from transfermium import seen
from transfermium.errors import InputError
from transfermium.seen import copies_of_seen, marks
from transfermium.study.curve import curve


def turned(atoms, seed=0):
    """The same in another place, direction and order, as float32."""
    rng = np.random.default_rng(seed)
    copy = atoms.copy()
    copy.rotate(40, (1, 2, 3), rotate_cell=True)
    copy.translate(rng.normal(size=3))
    copy.wrap()
    copy = copy[rng.permutation(len(copy))]
    copy.positions = copy.positions.astype(np.float32)
    return copy


class TestMarks:
    def test_copies_have_the_same(self):
        structures = [*alloys(20), *tm.crystals("PBE", "test"), molecule("CH3CH2OH")]
        assert (marks([turned(atoms) for atoms in structures]) == marks(structures)).all()
        assert (marks([atoms * (2, 1, 1) for atoms in structures[:20]]) == marks(structures[:20])).all()

    def test_others_do_not(self):
        structures = [*alloys(50), *tm.water("flexible")[:40]]
        assert len(np.unique(marks(structures))) == len(structures)
        for change in (lambda a: a.rattle(0.05), lambda a: a.set_cell(a.cell * 1.002, scale_atoms=True)):
            moved = [atoms.copy() for atoms in structures]
            for atoms in moved:
                change(atoms)
            assert not (marks(moved) == marks(structures)).any()

    def test_exchanged_elements_are_another_structure(self):
        atoms = bulk("NaCl", "rocksalt", a=5.6)
        other = atoms.copy()
        other.numbers = [12, 8]
        assert marks([atoms])[0] != marks([other])[0]


class TestAModelKnows:
    def test_what_it_learned_from_and_validated_with(self, tmp_path):
        model = tm.pretrain(alloys(20), tm.Potential(), painn(), steps=1, **QUICK)
        model.save(tmp_path / "m.safetensors")
        again = tm.load(tmp_path / "m.safetensors")
        assert copies_of_seen(again, [turned(atoms) for atoms in alloys(20)]) == (20, 20)
        assert copies_of_seen(again, alloys(6, seed=9)) == (0, 6)
        assert copies_of_seen(again, [Atoms("Cu"), *alloys(2)]) == (2, 2)  # single atoms are all alike

    def test_what_its_base_learned_from_too(self):
        base = tm.pretrain(alloys(12), tm.Potential(), painn(), steps=1, **QUICK)
        tuned = tm.finetune(base, alloys(6, seed=9), tm.Property("gap"), steps=1, **QUICK)
        assert copies_of_seen(tuned, alloys(12)) == (12, 12)
        assert copies_of_seen(tuned, alloys(6, seed=9)) == (6, 6)

    def test_parts_of_a_model_know_it(self):
        both = tm.Together({"energy": tm.Potential(), "noise": tm.Denoise(0.1)})
        model = tm.pretrain(alloys(12), both, painn(), steps=1, **QUICK)
        assert copies_of_seen(model.part("energy"), alloys(12)) == (12, 12)

    def test_very_many_are_known_in_part(self, monkeypatch):
        monkeypatch.setattr(seen, "MOST", 10)
        model = tm.pretrain(alloys(40), tm.Potential(), painn(), steps=1, **QUICK)
        assert 10 <= len(model.attached["seen"]) <= 12
        monkeypatch.setattr(seen, "MOST", 20_000)
        assert 10 <= copies_of_seen(model, alloys(40)).found <= 12
        monkeypatch.setattr(seen, "KEPT", 5)
        assert len(seen.seen_by([alloys(30, seed=4)], model)) == 5

    @pytest.mark.parametrize("kept", [None, torch.zeros(3), torch.zeros((2, 2), dtype=torch.int64)])
    def test_files_that_do_not_know_say_nothing(self, kept):
        model = tm.Model(painn(), {})
        model.attached = {} if kept is None else {"seen": kept}
        assert copies_of_seen(model, alloys(3)) is None

    def test_the_one_that_ships(self):
        assert copies_of_seen(tm.load("small"), tm.crystals("PBE", "train")).found == 183
        assert copies_of_seen(tm.load("small"), tm.crystals("PBE", "test")).found == 0


def test_tests_that_a_base_has_seen_make_no_curve(tmp_path):
    base = tm.pretrain(alloys(20), tm.Potential(), painn(), steps=1, **QUICK)
    given = {"base": base, "sizes": [5], "seeds": 1, "tuning": "1steps", "arms": ["aligned"], "quiet": True}
    with pytest.raises(InputError, match="a model: the base learned from 3 of 7 test structures"):
        curve(alloys(12, seed=3), tm.Potential(), tmp_path, test=[*alloys(3), *alloys(4, seed=8)], **given)
    result = curve(
        alloys(12, seed=3), tm.Potential(), tmp_path, test=alloys(4, seed=8), workers=1, rates=[2e-3], **given
    )
    assert result["copies that the base has seen"] == 0
    assert "no test structure is a copy of one that it learned from" in result["base"]
    assert "no copies of any that the base has seen" in (tmp_path / "report.html").read_text()
