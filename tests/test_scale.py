"""Sets larger than memory: what is asked of all structures is read as columns, and is what the structures say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, same_bits, weights_of
from transfermium.data import Joined, PackedSet, Split, Subset, by_key, found_split_keys, isolated_atoms, resolve, split
from transfermium.data import columns as columns_module
from transfermium.data.columns import blocks, codes, count_elements, elements, has, info_names
from transfermium.data.labels import Labelled, geometries
from transfermium.data.load import count_edges
from transfermium.data.shard import Shard

KEYS = [("calc", "energy"), ("calc", "forces"), ("calc", "stress"), ("info", "gap"), ("info", "nowhere")]


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    """Alloys, of which some lack labels, a lone atom and splits of all kinds."""
    found = alloys(40)
    for number, atoms in enumerate(found):
        atoms.info |= {"fold": number % 5, "material_id": f"mp-{number // 3}", "part": ["train", "val"][number % 2]}
        if number % 7 == 0:
            del atoms.info["gap"]
        if number % 4 == 0:
            del atoms.calc.results["stress"]
        if number % 11 == 0:
            del atoms.info["material_id"]
    lone = Atoms("Cu", positions=[[0, 0, 0]], info={"config_type": "IsolatedAtom"})
    lone.calc = SinglePointCalculator(lone, energy=-3.0)
    return [*found[:9], lone, *found[9:]]


@pytest.fixture(scope="module")
def packed(structures, tmp_path_factory) -> PackedSet:
    return tm.pack(structures, tmp_path_factory.mktemp("scale") / "packed", shard_size=16, progress=False)


@pytest.fixture(params=["all", "some", "out of order", "joined", "blocks of three"])
def views(request, structures, packed, monkeypatch):
    """The same structures in memory and on disk, seen in several ways."""
    if request.param == "blocks of three":
        monkeypatch.setattr(columns_module, "LONGEST", 3)
    match request.param:
        case "some":
            chosen = np.arange(0, len(structures), 3)
            return Subset(structures, chosen), Subset(packed, chosen)
        case "out of order":
            chosen = np.random.default_rng(0).permutation(len(structures))
            return Subset(structures, chosen), packed[chosen]
        case "joined":
            return Joined([structures, structures[:5]]), Joined([packed, packed[:5]])
    return structures, packed


@pytest.fixture
def unbuilt(monkeypatch) -> None:
    """No structure may be built from a packed set."""

    def refuse(self, *_):
        raise AssertionError("a structure was built")

    monkeypatch.setattr(Shard, "atoms", refuse)


def test_columns_are_what_the_structures_say(views, unbuilt):
    memory, disk = views
    assert np.array_equal(elements(memory), elements(disk))
    assert np.array_equal(count_elements(memory), count_elements(disk))
    assert isolated_atoms(memory) == isolated_atoms(disk)
    assert info_names(memory) == info_names(disk)
    for key in KEYS:
        assert np.array_equal(has(memory, {key}), has(disk, {key})), key
    for name in ("fold", "material_id", "nowhere"):
        (a, values), (b, others) = codes(memory, name, str), codes(disk, name, str)
        assert np.array_equal(a, b) and values == others
    assert [len(block) for block in blocks(memory)] and sum(len(block) for block in blocks(disk)) == len(memory)


def test_nan_is_no_label(tmp_path):
    """All NaN is none, whether structures are in memory or in columns; some NaN is a label with holes."""
    some = alloys(5)
    for atoms, gap in zip(some, (1.0, np.nan, None, 2.0, np.nan), strict=True):
        atoms.info["gap"] = gap
        atoms.arrays["charge"] = np.full(4, np.nan if gap is None else 1.0)
    some[4].arrays["charge"][1:] = np.nan
    del some[2].info["gap"]
    for view in (some, tm.pack(some, tmp_path / "packed", progress=False)):
        assert has(view, {("info", "gap")}).tolist() == [True, False, False, True, False]
        assert has(view, {("arrays", "charge")}).tolist() == [True, True, False, True, True]
        assert [entry.count for entry in resolve(view, ["gap", "charge"]).entries] == [2, 4]


@pytest.mark.parametrize("unit", [{}, {"energy": "kJ/mol", "stress": "-kbar"}, {"energy": "hartree/atom"}], ids=str)
def test_labels_are_those_of_the_structures(views, unbuilt, unit):
    memory, disk = (
        resolve(view, ["energy", "forces", "gap"], optional=["stress", "charge"], units=unit) for view in views
    )
    for a, b in zip(memory.entries, disk.entries, strict=True):
        assert b.rms == pytest.approx(a.rms, rel=1e-12)
        for name in vars(a):
            if name not in ("rms", "minimum", "maximum"):
                assert getattr(a, name) == getattr(b, name)
            elif name != "rms":
                assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-12)


def test_what_columns_cannot_tell_is_read_from_the_structures(structures, tmp_path):
    odd = [atoms.copy() for atoms in structures[:6]]
    for number, atoms in enumerate(odd):
        atoms.info |= {"energy": [0.5, "word"][number == 3], "nested": {"a": 1}}
    packed = tm.pack(odd, tmp_path / "odd", progress=False)
    messages = []
    for view in (odd, packed):
        with pytest.raises(tm.InputError) as error:
            resolve(view, ["energy"])
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "structure 3" in messages[0]
    with pytest.raises(tm.InputError, match=r"no structure has 'charge'.*nested \(6"):
        resolve(packed, ["charge"])


@pytest.mark.parametrize("by", ["auto", "random", "composition", "prototype", "fold", "material_id"])
def test_splits_are_those_of_the_structures(views, unbuilt, by):
    assert same(*(split(view, 0.3, by=by, seed=1) for view in views))


def test_keys_split_alike(structures, packed, unbuilt):
    for key, value in (("part", None), ("fold", "2")):
        assert same(*(by_key(view, key, value) for view in (structures, packed)))
    assert found_split_keys(packed) == found_split_keys(structures) == {"fold": [0, 1, 2, 3, 4]}


def test_edges_are_counted_without_labels(structures, packed):
    view = Subset(Labelled(packed, resolve(packed, ["energy"])), range(5, 25))
    bare = geometries(view)
    assert not bare[0].info and bare[0].calc is None
    edges = painn().edges
    assert count_edges(bare, edges).tolist() == count_edges(structures[5:25], edges).tolist()


def test_a_split_is_written_in_pieces_as_it_was_at_once(tmp_path):
    found = Split(np.arange(20_000), np.arange(20_000, 20_003), None, "random", 'say "so"', 7, 20_003)
    found.save(tmp_path / "split.json")
    assert same(found, Split.load(tmp_path / "split.json"))
    text = (tmp_path / "split.json").read_text()
    assert text.startswith('{"train": [0, 1, 2, ') and text.endswith('"total": 20003}\n')


def test_a_packed_set_trains_as_its_structures_do(structures, packed):
    models = [tm.pretrain(source, tm.Potential(), painn(), steps=2, **QUICK) for source in (structures, packed)]
    history = [model.card["history"][-1] for model in models]
    assert history[0]["best validation loss"] == pytest.approx(history[1]["best validation loss"], rel=1e-6)
    assert models[0].card["elements"] == models[1].card["elements"]


def test_a_run_may_go_on_from_a_packed_set(structures, packed, tmp_path, monkeypatch):
    options = {"steps": 3, "out": tmp_path / "run", **QUICK}
    model = tm.pretrain(structures, tm.Potential(), painn(), **options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    entry = config["labels"]["labels"][0]
    entry["rms"] *= 1 + 1e-9  # as another order of additions would have it
    entry["minimum"] -= 1e-12
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    again = tm.pretrain(packed, tm.Potential(), painn(), **options)
    assert same_bits(weights_of(again), weights_of(model))


def same(a: Split, b: Split) -> bool:
    arrays = all(np.array_equal(getattr(a, side), getattr(b, side)) for side in ("train", "valid"))
    tests = (a.test is None) == (b.test is None) and (a.test is None or np.array_equal(a.test, b.test))
    return arrays and tests and (a.by, a.reason, a.groups, a.total) == (b.by, b.reason, b.groups, b.total)
