"""Files of every format version stay loadable; each is tiny and lies in tests/files."""

from pathlib import Path

import pytest
from ase.build import bulk

import transfermium as tm
from transfermium.graph import to_graph

FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize(("name", "energy"), [("model-1.safetensors", -10.342893)])
def test_a_model_of_an_earlier_version_predicts_what_it_did(name: str, energy: float) -> None:
    model = tm.load(FILES / name)
    atoms = bulk("MgO", "rocksalt", a=4.3)
    outputs = model(to_graph([atoms], model.backbone.edges))
    assert float(outputs["energy"][0]) == pytest.approx(energy, abs=1e-5)
    assert set(outputs) == {"energy", "forces", "stress"}
    assert model.card["elements"]["Mg"] > 0
    assert model.card["history"][0]["verb"] == "pretrain"
