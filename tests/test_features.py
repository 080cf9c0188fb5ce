"""Features: invariant, the same alone and in company, and written where they can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

import transfermium as tm
from tests.alloys import alloys
from transfermium import cli
from transfermium.features import features

BACKBONES = [tm.TensorNet(8, 2), tm.PaiNN(8, 2), tm.ET(8, 2), tm.CGCNN(8, 8, 2)]


def model_of(backbone: tm.Backbone) -> tm.Model:
    return tm.Model(backbone, tm.Potential().outputs(backbone.width), {"elements": {"Cu": 1, "Au": 1}})


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: type(b).__name__)
def test_they_do_not_see_orientation_order_or_company(backbone):
    model, structures = model_of(backbone), alloys(4)
    found = features(model, structures, verbose=False)
    turned = []
    for atoms in structures:
        other = atoms[np.random.default_rng(0).permutation(len(atoms))]
        other.rotate(50, (1, 2, 3), rotate_cell=True)
        turned.append(other)
    np.testing.assert_allclose(features(model, turned, verbose=False).values, found.values, atol=1e-4)
    alone = [features(model, [atoms], verbose=False).values[0] for atoms in structures]
    np.testing.assert_allclose(alone, found.values, atol=1e-4)
    layers = {name.removeprefix("mean ").rsplit(" ", 1)[0] for name in found.names if name.startswith("mean ")}
    assert {"element", "final"} <= layers and len(layers) >= 4
    assert found.values.std(axis=0).max() > 1e-3  # or they would say nothing


def test_per_atom_and_per_structure_agree():
    model, structures = model_of(BACKBONES[1]), alloys(3)
    atoms = features(model, structures, per_atom=True, verbose=False)
    assert atoms.values.shape == (sum(map(len, structures)), len(atoms.names))
    means = [part.mean(axis=0) for part in np.split(atoms.values, np.cumsum([len(a) for a in structures])[:-1])]
    whole = features(model, structures, verbose=False)
    np.testing.assert_allclose(whole.values[:, : len(atoms.names)], means, rtol=1e-6)
    assert whole.names[: len(atoms.names)] == [f"mean {name}" for name in atoms.names]


def test_the_final_ones_are_those_of_the_backbone():
    model, structures = model_of(BACKBONES[0]), alloys(2)
    found = features(model, structures, per_atom=True, verbose=False)
    graph = tm.graph.to_graph(structures, model.backbone.edges).to("cpu", next(model.parameters()).dtype)
    own = [k for k, name in enumerate(found.names) if name.startswith("final ")]
    np.testing.assert_allclose(found.values[:, own], model.backbone(graph).scalars.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(("ending", "options"), [("parquet", ""), ("csv", "--per-atom")])
def test_the_command_line_writes_a_table(ending, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_of(BACKBONES[1]).save("m.safetensors")
    structures = alloys(3)
    import ase.io

    ase.io.write("a.extxyz", structures)
    cli.main(f"features m.safetensors a.extxyz --out x/f.{ending} {options}".split())
    reader = {"parquet": pyarrow.parquet.read_table, "csv": pyarrow.csv.read_csv}[ending]
    table = reader(Path("x") / f"f.{ending}")
    assert table.num_rows == (sum(map(len, structures)) if options else 3)
    assert table.column_names[0] == "structure" and ("atom" in table.column_names) == bool(options)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(tm.InputError, match=r"ends in '.txt', but features are written to .parquet or .csv"):
        features(model_of(BACKBONES[1]), alloys(1), tmp_path / "f.txt", verbose=False)
