"""The page of a run: offline, as it is in the files, and always the same."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.waters import waters
from transfermium.data.labels import Labels
from transfermium.errors import InputError
from transfermium.report import Page, label_curves, loss_curves, parity, run_report

NASTY = '</script><script>alert("x")</script><img src=x onerror=y> $a_b$ & "q"'
RESOURCES = ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "base"
    tm.pretrain(crystals(), tm.Potential(), tm.PaiNN(width=4, depth=1), out=out, steps=4, verbose=False)
    return out


@pytest.fixture(scope="module")
def second_run(run: Path) -> Path:
    out = run.parent / "second"
    tm.finetune(run / "model.safetensors", crystals(), tm.Potential(), out=out, steps=2, verbose=False)
    return out


def test_the_page_needs_no_network_and_runs_no_script(run: Path) -> None:
    html = run_report(run).read_text()
    seen = read_html(html)

    for tag, name, value in seen.attributes:
        if name in RESOURCES:
            allowed = ("https://doi.org/", "report.json") if tag == "a" else ("#", "data:")
            assert value.startswith(allowed), f"<{tag} {name}={value}>"
        assert not name.startswith("on")
    assert [kind for tag, kind, value in seen.attributes if tag == "script"] == ["type", "id"]
    assert not re.search(r"url\((?!#)|@import|<link(?! rel=\"icon\" href=\"data:)", html)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_all_references_within_the_page_exist(run: Path) -> None:
    html = run_report(run).read_text()
    ids = [value for _, name, value in read_html(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = run_report(run).read_bytes()
    assert run_report(run).read_bytes() == first


def test_the_numbers_beside_the_page_are_those_within_and_those_of_the_run(run: Path) -> None:
    page = run_report(run)
    beside = json.loads((run / "report.json").read_text())
    assert beside == embedded(page)

    validation = json.loads((run / "validation.json").read_text())
    assert beside["errors"] == validation["errors"]
    assert beside["parity"] == validation["parity"]
    assert beside["split"]["train"] + beside["split"]["valid"] == len(crystals())
    assert [row["step"] for row in beside["metrics"]["rows"]] == [0, 1, 2, 3, 4]


def test_errors_are_shown_in_the_units_of_tables(run: Path) -> None:
    forces = json.loads((run / "validation.json").read_text())["errors"]["forces"]
    text = read_html(run_report(run).read_text()).text
    assert f"forces {1000 * forces['mae']:.4g} meV/Å" in text
    assert "meV/atom" in text


def test_a_fine_tuned_run_tells_its_history_and_its_alignment(second_run: Path) -> None:
    text = read_html(run_report(second_run).read_text()).text
    assert "trained before by Potential on" in text
    assert "Reference energies were fitted again" in text
    assert "shift (eV)" in text and "in last stage" in text


def test_a_run_that_validated_nothing_has_a_page_without_errors(tmp_path: Path) -> None:
    tm.pretrain(
        crystals(), tm.Denoise(), tm.PaiNN(width=4, depth=1), out=tmp_path, steps=2, valid_fraction=0, verbose=False
    )
    assert not (tmp_path / "validation.json").exists()
    page = run_report(tmp_path)
    assert "Nothing was validated" in read_html(page.read_text()).text
    assert embedded(page)["errors"] == {}


@pytest.mark.parametrize("objective", [tm.MaskAtoms(), tm.MaskPositions()])
def test_a_run_whose_outputs_have_no_labels_shows_its_loss_and_the_floor(objective: Any, tmp_path: Path) -> None:
    structures = [waters(8, seed) for seed in range(6)]
    model = tm.pretrain(
        structures, objective, tm.PaiNN(width=4, depth=1), out=tmp_path, steps=2, split_by="random", valid_fraction=0.5,
        verbose=False,
    )  # fmt: skip
    ((name, found),) = model.card["metrics"]["validation"].items()
    assert name == objective.target and found["loss"] == pytest.approx(model.card["metrics"]["validation loss"])
    page = run_report(tmp_path)
    text = read_html(page.read_text()).text
    assert f"Loss on 3 validation structures: {name} {found['loss']:.3f} (floor {found['floor']:.3f})." in text
    assert "othing was validated" not in text and f"MAE {name}" not in text and f"on {name}" not in text
    assert embedded(page)["errors"] == {name: found}


def test_losses_are_told_apart_from_errors(tmp_path: Path) -> None:
    objective = tm.Together({"mask": tm.MaskAtoms(), "noise": tm.Denoise()})
    tm.pretrain(
        [waters(8, seed) for seed in range(6)], objective, tm.PaiNN(width=4, depth=1), out=tmp_path, steps=2,
        split_by="random", valid_fraction=0.5, verbose=False,
    )  # fmt: skip
    text = read_html(run_report(tmp_path).read_text()).text
    assert re.search(r"Mean absolute error on 3 [\w ]+: noise forces [\d.]+ Å\. Loss on 3 [\w ]+: "
                     r"mask direction [\d.]+ \(floor [\d.]+\)\.", text)  # fmt: skip


def test_a_run_that_never_improved_says_so(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    rows = [{"step": 0, "valid": 1.0}, {"step": 1, "forces": 0.5, "valid": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "No step had a lower validation loss" in read_html(run_report(folder).read_text()).text


def test_what_files_say_stays_text(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    labels = Labels.from_json(json.loads((folder / "labels.json").read_text())).to_json()
    labels["labels"][0]["keys"] = [["info", NASTY, 3]]
    (folder / "labels.json").write_text(json.dumps(labels))
    validation = json.loads((folder / "validation.json").read_text())
    for part in (validation["errors"], validation["parity"], validation["structures"]["known"]):
        part[NASTY] = part.pop("forces")
    (folder / "validation.json").write_text(json.dumps(validation))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, NASTY: 0.5, "valid": 1.0}) + "\n")

    page = run_report(folder)
    seen = read_html(page.read_text())
    assert not {"img", "b"} & set(seen.tags)
    assert seen.tags.count("script") == 1
    assert NASTY in seen.text
    assert NASTY in embedded(page)["errors"]


def test_every_part_of_a_page_is_escaped(tmp_path: Path) -> None:
    page = Page(NASTY, NASTY).heading(NASTY).text(NASTY).verdict(NASTY).details(NASTY, NASTY)
    page.table([{NASTY: NASTY}], NASTY, notes=[NASTY]).figure(parity(points(), NASTY), NASTY).numbers({NASTY: NASTY})
    page.figure(label_curves({NASTY: [(10, 1.0, 0.9, 1.1, [1.0])]}, NASTY, NASTY), NASTY)
    seen = read_html(page.write(tmp_path / "page.html").read_text())
    assert "img" not in seen.tags and seen.tags.count("script") == 1


def test_tables_hold_rows_of_different_columns_and_numbers_stand_right(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "mae": 12.3456789, "n": 1234},
        {"name": "b", "mae": None, "r2": "-0.5", "empty": ""},
    ]
    html = Page("t").table(rows, "caption").write(tmp_path / "page.html").read_text()
    assert '<td class="number">12.35</td>' in html
    assert '<td class="number">1,234</td>' in html
    assert '<th scope="col" class="number">r2</th>' in html
    assert "empty" not in html
    assert not (tmp_path / "page.json").exists()


def test_numbers_are_plain_json(tmp_path: Path) -> None:
    numbers = {"a": np.arange(2), "b": np.float32(0.5), "c": math.nan, "d": (1, None), "e": Path("x"), 4: True}
    page = Page("t").numbers(numbers).write(tmp_path / "page.html")
    assert embedded(page) == {"a": [0, 1], "b": 0.5, "c": None, "d": [1, None], "e": "x", "4": True}


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"arm": []},
        {"arm": [(0, 1.0, None, None, [1.0]), (10, 0.9, math.nan, math.nan, [])]},
        {f"arm {i}": [(10, 5.0, 4.0, 6.0, [4.0, 6.0]), (40, 0.1, 0.1, 0.1, [0.1] * 3)] for i in range(9)},
        {"all the same": [(10, 0.0, 0.0, 0.0, [0.0, 0.0])]},
    ],
    ids=["nothing", "no points", "zero labels, one seed", "many arms", "no error"],
)
def test_label_curves_can_be_drawn(series: dict[str, Any], tmp_path: Path) -> None:
    html = Page("t").figure(label_curves(series, "labels", "error"), "c").write(tmp_path / "page.html").read_text()
    assert all(name.split()[0] in html for name, found in series.items() if found)


def test_label_curves_tick_the_actual_sizes(tmp_path: Path) -> None:
    series = {"transfer": [(n, 1 / n, 0.9 / n, 1.1 / n, [1 / n]) for n in (10, 25, 1000)]}
    html = Page("t").figure(label_curves(series, "labels", "error"), "c").write(tmp_path / "page.html").read_text()
    assert [tick in read_html(html).text for tick in ("10", "25", "1,000")] == [True] * 3


@pytest.mark.parametrize("n", [0, 1, 50, 2000])
def test_parity_can_be_drawn_for_any_number_of_points(n: int, tmp_path: Path) -> None:
    page = Page("t").figure(parity(points(n), "forces"), "c").write(tmp_path / "page.html")
    assert "meV/Å" in page.read_text()


def test_parity_converts_units_and_prefers_the_errors_of_the_whole_set(tmp_path: Path) -> None:
    found = {"label": [0.0, 1.0], "prediction": [0.1, 0.9], "unit": "eV/Å"}
    own = Page("t").figure(parity(found, "forces"), "c").write(tmp_path / "own.html").read_text()
    whole = parity(found, "forces", {"mae": 0.25, "rmse": 0.5, "r2": 0.75, "n": 9})
    given = Page("t").figure(whole, "c").write(tmp_path / "given.html").read_text()
    assert "MAE 100 meV/Å" in own
    assert "MAE 250 meV/Å" in given and "R² 0.750" in given


@pytest.mark.parametrize("n", [0, 1, 3000])
def test_loss_curves_stay_small(n: int, tmp_path: Path) -> None:
    rows = [{"step": i, "energy": 1.0 + i % 7, "forces": 0.0, "valid": 2.0 if i % 3 else None} for i in range(n)]
    page = Page("t").figure(loss_curves(rows), "c").write(tmp_path / "page.html")
    assert page.stat().st_size < 400_000


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(InputError, match="is not a run of transfermium"):
        run_report(tmp_path)
    folder = copied(run, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the run has not finished"):
        run_report(folder)


def crystals(n: int = 12) -> list[Atoms]:
    """Small cells with made-up labels."""
    rng = np.random.default_rng(0)
    result = []
    for i in range(n):
        atoms = Atoms(("LiF", "Li2", "Li2F")[i % 3], cell=[4.0, 4.1, 4.2], pbc=True)
        atoms.positions = rng.uniform(0, 4, (len(atoms), 3))
        forces = rng.normal(size=(len(atoms), 3))
        stress = 0.01 * rng.normal(size=6)
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0 * len(atoms) + rng.normal(), forces=forces, stress=stress)
        result.append(atoms)
    return result


def points(n: int = 5) -> dict[str, Any]:
    label = np.random.default_rng(0).normal(size=n)
    return {"label": label.tolist(), "prediction": (label + 0.1).tolist(), "unit": "eV/Å"}


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in run.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def embedded(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found.group(1))


def read_html(html: str) -> "Reader":
    reader = Reader()
    reader.feed(html)
    return reader


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"]:
            self.text += data
