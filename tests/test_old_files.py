"""Files of every format version stay loadable; each is tiny and lies in tests/files."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import transfermium as tm
from transfermium import model as model_files
from transfermium.data import shard as packed_files
from transfermium.graph import to_graph

FILES = Path(__file__).parent / "files"


def test_there_is_a_file_of_each_version() -> None:
    models = {f"model-{version}.safetensors" for version in range(1, model_files.FORMAT + 1)}
    sets = {f"packed-{version}" for version in range(1, packed_files.VERSION + 1)}
    assert {path.name for path in FILES.iterdir()} >= models | sets


@pytest.mark.parametrize(("name", "energy"), [("model-1.safetensors", -10.342893)])
def test_a_model_of_an_earlier_version_predicts_what_it_did(name: str, energy: float) -> None:
    model = tm.load(FILES / name)
    atoms = bulk("MgO", "rocksalt", a=4.3)
    outputs = model(to_graph([atoms], model.backbone.edges))
    assert float(outputs["energy"][0]) == pytest.approx(energy, abs=1e-5)
    assert set(outputs) == {"energy", "forces", "stress"}
    assert model.card["elements"]["Mg"] > 0
    assert model.card["history"][0]["verb"] == "pretrain"


@pytest.mark.parametrize("name", ["model-1.safetensors"])
def test_so_do_its_forces_and_stress(name: str) -> None:
    model = tm.load(FILES / name)
    outputs = model(to_graph([distorted()], model.backbone.edges))
    assert float(outputs["energy"][0]) == pytest.approx(-10.338591, abs=1e-5)
    assert outputs["forces"][0].tolist() == pytest.approx([0.002692, 0.0, -0.001048], abs=1e-5)
    assert outputs["stress"][0].diagonal().tolist() == pytest.approx([-0.006684, -0.006596, -0.00661], abs=1e-5)


@pytest.mark.parametrize("name", ["packed-1"])
def test_a_packed_set_of_an_earlier_version_holds_what_it_did(name: str) -> None:
    packed = tm.data.PackedSet.open(FILES / name)
    packed.verify()
    oxide, water, xenon, copper = packed

    assert np.array_equal(oxide.numbers, [12, 8]) and np.allclose(oxide.positions, distorted().positions, atol=0)
    assert np.array_equal(oxide.cell, distorted().cell) and oxide.pbc.all()
    assert oxide.info == {"material_id": "mp-1265", "level": "PBE", "tags": [1, "two", None], "band_gap": 4.5}
    assert oxide.get_potential_energy() == -11.5
    assert oxide.get_forces().tolist() == [[0.5, 0, 0.25], [-0.5, 0, -0.25]]
    assert oxide.get_stress().tolist() == [0.01, 0.02, 0.03, 0, 0, 0.004]

    assert water.info == {"level": "wB97M-V", "charge": -1, "name": "water ≈ H₂O"}
    assert water.arrays["charges"].tolist() == [-0.8, 0.4, 0.4] and not water.pbc.any()
    assert water.constraints[0].index.tolist() == [0]
    assert xenon.info == {"config_type": "IsolatedAtom", "band_gap": "none"} and xenon.calc is None
    assert copper.info["flag"] is True and copper.info["born"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copper.arrays["tags"].tolist() == [0, 0, 1, 1] and copper.pbc.tolist() == [True, True, False]

    assert packed.n_atoms.tolist() == [2, 3, 1, 4]
    assert packed.levels == {"PBE": 1, "wB97M-V": 1}
    assert packed.units["calc.forces"] == "eV/Å"


def distorted() -> Atoms:
    atoms = bulk("MgO", "rocksalt", a=4.25)
    atoms.positions[1] += (0.05, 0, -0.02)
    return atoms
