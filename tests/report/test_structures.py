"""Structures in a page: the plot that is there without scripts, in a real browser, offline."""

import base64
import gzip
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

import transfermium as tm
from tests.alloys import QUICK, alloys, painn
from tests.browser import CHROMIUM, Browser
from transfermium.card import MOST_ATOMS, MOST_STRUCTURES, some_of
from transfermium.cli import main
from transfermium.errors import InputError
from transfermium.report import Column, Page, need_viewer, parity_columns, run_report
from transfermium.report import structures as module

pytestmark = pytest.mark.skipif(not module.find_spec("chemiscope"), reason="chemiscope is not installed")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

AXES = {"x": "energy, label", "y": "energy, prediction"}
NASTY = '</script><script>alert("x")</script><img src=x onerror=y> & "q"'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "potential"
    tm.pretrain(alloys(12), tm.Potential(), painn(), out=out, steps=4, valid_fraction=0.5, **QUICK)
    return out


class TestFile:
    def test_several_viewers_share_one_script(self, tmp_path: Path) -> None:
        columns = parity_columns("energy", [1.0], [1.1])
        page = Page("t").structures([bulk("Cu")], columns, "c", **AXES).structures([bulk("Al")], columns, "c", **AXES)
        html = page.write(tmp_path / "page.html").read_text()
        assert [one["structures"][0]["names"] for one in contents(tmp_path / "page.html")] == [["Cu"], ["Al"]]
        assert re.findall(r'id="(\w+)"', html) == ["v1", "v2", "chemiscope"]

    def test_without_structures_a_page_runs_no_script(self, run: Path) -> None:
        assert "script-src" not in run_report(run).read_text()

    def test_only_our_scripts_may_run_and_no_request_be_made(self, run: Path) -> None:
        html = run_report(run, viewer=True).read_text()
        policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
        assert policy and policy[0].startswith("default-src 'none'; script-src 'sha256-")
        assert not re.search(r"connect-src|unsafe-inline'[^;]*script|https?:|\*", policy[0].split("style-src")[0])
        scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        assert len(scripts) == 1 and f"'sha256-{module._hash(scripts[0])}'" in policy[0]

    def test_the_same_run_gives_the_same_bytes(self, run: Path) -> None:
        first = run_report(run, viewer=True).read_bytes()
        assert run_report(run, viewer=True).read_bytes() == first

    def test_points_are_those_of_the_parity_plot_and_belong_to_their_structures(self, run: Path) -> None:
        parity = json.loads((run / "validation.json").read_text())["parity"]["energy_per_atom"]
        (content,) = contents(run_report(run, viewer=True))
        properties = content["properties"]
        for what in ("label", "prediction"):
            shown = properties[f"energy per atom, {what}"]
            assert shown["units"] == "meV/atom"
            assert shown["values"] == [1000 * value for value in parity[what]]

        for structure, label in zip(content["structures"], properties["energy per atom, label"]["values"], strict=True):
            positions = np.array([structure[axis] for axis in "xyz"]).T
            atoms = Atoms(structure["names"], positions, cell=np.reshape(structure["cell"], (3, 3)), pbc=True)
            found = next(other for other in alloys(12) if same(atoms, other))
            assert label == pytest.approx(1000 * found.get_potential_energy() / len(atoms), abs=0.01)

    def test_the_spread_of_forces_adds_up_to_their_error(self, run: Path) -> None:
        error = json.loads((run / "validation.json").read_text())["errors"]["forces"]["rmse"]
        (content,) = contents(run_report(run, viewer=True))
        each = np.array(content["properties"]["forces, RMSE"]["values"])
        sizes = [structure["size"] for structure in content["structures"]]
        assert math.sqrt(np.average(each**2, weights=sizes)) == pytest.approx(1000 * error)

    def test_the_numbers_stand_beside_the_page(self, run: Path) -> None:
        run_report(run, viewer=True)
        beside = json.loads((run / "report.json").read_text())["structures"]
        assert beside == json.loads((run / "validation.json").read_text())["structures"]
        assert "structures" not in json.loads(run_report(run).with_suffix(".json").read_text())

    def test_a_run_keeps_its_validation_structures(self, run: Path) -> None:
        kept = ase.io.read(run / "validation.extxyz", ":")
        split = json.loads((run / "split.json").read_text())
        assert all(same(atoms, alloys(12)[i]) for atoms, i in zip(kept, split["valid"], strict=True))
        assert all(atoms.calc is None and not atoms.info for atoms in kept)

    def test_the_command_line_has_it(self, run: Path, tmp_path: Path) -> None:
        ase.io.write(tmp_path / "data.extxyz", alloys(4))
        common = ["--objective", "Potential", "--backbone", "PaiNN", "--backbone.width", "4", "--steps", "1"]
        words = ["pretrain", str(tmp_path / "data.extxyz"), *common, "--out", str(tmp_path / "run")]
        main([*words, "--split_by", "random"])
        assert "script-src" not in (tmp_path / "run" / "report.html").read_text()
        main([*words, "--split_by", "random", "--viewer"])  # of a finished run, only the page is made again
        assert contents(tmp_path / "run" / "report.html")

    def test_a_run_of_an_older_version_has_no_viewer(self, run: Path, tmp_path: Path) -> None:
        for file in run.glob("*.*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "validation.extxyz").unlink()
        with pytest.raises(InputError, match=r"has no validation\.extxyz"):
            run_report(tmp_path, viewer=True)

    def test_missing_values_and_classes_are_left_out(self, tmp_path: Path) -> None:
        structures = [bulk("Cu")] * 3
        columns = {**parity_columns("energy", [1.0, math.nan, 2.0], [1.0, 1.0, 1.0], "eV"), "name": Column(list("abc"))}
        page = Page("t").structures(structures, columns, "c", **AXES).write(tmp_path / "page.html")
        (content,) = contents(page)
        assert content["properties"]["name"]["values"] == ["a", "c"]
        assert "2 of 3 structures" in page.read_text()

    def test_structures_without_any_point_make_no_viewer(self, tmp_path: Path) -> None:
        columns = parity_columns("energy", [math.nan], [1.0])
        page = Page("t").structures([bulk("Cu")], columns, "c", **AXES).write(tmp_path / "page.html")
        assert "<script" not in page.read_text()

    @pytest.mark.parametrize(
        "column",
        [{}, {"energy, label": Column([1.0, 2.0])}, {"energy, label": Column(["a"])}],
        ids=["missing", "too long", "a text"],
    )
    def test_columns_that_do_not_fit_are_refused(self, column: dict[str, Column]) -> None:
        with pytest.raises(InputError, match="energy, label"):
            Page("t").structures([bulk("Cu")], {"energy, prediction": Column([1.0]), **column}, "c", **AXES)

    def test_a_missing_chemiscope_is_said_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module._library.cache_clear()
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install 'transfermium\[viewer\]'"):
            need_viewer()

    def test_pages_stay_small(self) -> None:
        many, large = [bulk("Cu")] * 1300, [bulk("Cu").repeat(12)] * 100
        assert len(some_of(many)) == MOST_STRUCTURES and some_of(many)[-1] == 1299
        assert 0.9 * MOST_ATOMS < sum(len(large[i]) for i in some_of(large)) <= MOST_ATOMS
        assert some_of(many[:7]) == list(range(7))
        assert some_of([]) == []

    def test_parts_of_several_objectives_have_their_own_structures(self, tmp_path: Path) -> None:
        objective = tm.Together({"a": tm.Potential(), "b": tm.Property("gap")})
        structures = [*alloys(8)]
        parts = {"a": structures[:4], "b": structures[4:]}
        tm.pretrain(parts, objective, painn(), out=tmp_path, steps=1, valid=parts, **{**QUICK, "split_by": "auto"})
        kept = json.loads((tmp_path / "validation.json").read_text())["structures"]
        known = {name: [i for i, value in enumerate(found.get("label", [])) if value is not None]
                 for name, found in kept["known"].items()}  # fmt: skip
        assert known["a energy_per_atom"] == [0, 1, 2, 3]
        assert known["b gap"] == [4, 5, 6, 7]
        assert run_report(tmp_path, viewer=True).exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One that shows a molecule and two crystals, under a nasty name."""
    folder = tmp_path_factory.mktemp("browser")
    structures = [molecule("CH3CH2OH"), bulk("NaCl", "rocksalt", 5.6, cubic=True), bulk("Cu").repeat(2)]
    columns = parity_columns("energy", [-4.0, -3.0, -1.0], [-3.8, -3.1, -1.3], "eV/atom")
    columns["forces, RMSE"] = Column([0.1, math.nan, 0.3], "meV/Å")
    columns[NASTY] = Column([NASTY] * 3)
    page = Page("t").structures(structures, columns, NASTY, **AXES, parity=True)
    with Browser(folder / "profile") as browser:
        browser.open(page.write(folder / "page.html"))
        browser.wait(f"{VIEWER}.visualizer !== undefined")
        yield browser


@browsing
class TestBrowser:
    def test_atoms_are_seen(self, browser: Browser) -> None:
        assert colours(settled(browser, "structure")) > 100

    def test_the_plot_has_the_points_the_units_and_the_line_of_equality(self, browser: Browser) -> None:
        assert plot(browser, "data[0].x") == [-4000, -3000, -1000]
        assert plot(browser, "data[0].y") == [-3800, -3100, -1300]
        assert "meV/atom" in plot(browser, "layout.xaxis.title.text")
        (line,) = plot(browser, "layout.shapes")
        assert line["x0"] == line["y0"] < -4000 and line["x1"] == line["y1"] > -1000
        assert plot(browser, "layout.xaxis.range") == plot(browser, "layout.yaxis.range")

    def test_a_click_on_a_point_shows_its_structure(self, browser: Browser) -> None:
        pictures = [settled(browser, "structure")]
        for index in (2, 1):
            browser.click(*place(browser, index))
            browser.wait(f"{SHOWN} === {index}")
            pictures.append(settled(browser, "structure"))
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert np.abs(pictures[one] - pictures[other]).max(axis=2).mean() > 0.002

    def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(self, browser: Browser) -> None:
        assert [url for url in browser.requests if not url.startswith(("data:", "blob:"))] == browser.requests[:1]
        assert browser.requests[0].startswith("file:")
        assert browser.complaints == []

    def test_the_network_is_closed_to_scripts(self, browser: Browser) -> None:
        before = list(browser.complaints), list(browser.requests)
        assert browser.value("fetch('https://example.org').then(() => 'open', () => 'closed')") == "closed"
        browser.complaints, browser.requests = before


VIEWER = "document.querySelector('.viewer')"
SHOWN = f"{VIEWER}.visualizer.saveSettings().pinned[0]"
PLOT = f"{VIEWER}.visualizer.map._plot"


def plot(browser: Browser, what: str) -> Any:
    return json.loads(browser.value(f"JSON.stringify({PLOT}.{what}, (_, v) => ArrayBuffer.isView(v) ? [...v] : v)"))


def place(browser: Browser, index: int) -> tuple[float, float]:
    """Where in the window a point is."""
    browser.value(f"{VIEWER}.scrollIntoView({{block: 'center'}})")
    x, y = browser.value(
        f"""(() => {{
            const box = {PLOT}.getBoundingClientRect();
            const [trace, axes] = [{PLOT}.data[0], {PLOT}._fullLayout];
            return [["xaxis", trace.x, box.left], ["yaxis", trace.y, box.top]].map(
                ([axis, values, start]) => start + axes[axis]._offset + axes[axis].d2p(values[{index}]));
        }})()"""
    )
    return x, y


def settled(browser: Browser, part: str) -> np.ndarray:
    """A picture of a part of the viewer, when it does not change any more."""
    browser.value(f"{VIEWER}.scrollIntoView({{block: 'center'}})")
    box = browser.value(
        f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height}}))"
        f"({VIEWER}.querySelector('.{part}').getBoundingClientRect())"
    )
    picture = browser.picture(box)
    for _ in range(50):
        time.sleep(0.1)
        before, picture = picture, browser.picture(box)
        if np.array_equal(before, picture):
            return picture
    raise TimeoutError("the picture keeps changing")


def colours(picture: np.ndarray) -> int:
    return len(np.unique((picture.reshape(-1, 3) * 255).astype(int), axis=0))


def contents(page: Path) -> list[dict[str, Any]]:
    """What the viewers of a page show."""
    packed = re.findall(r'<script type="application/gzip">(.*?)</script>', page.read_text(), re.DOTALL)
    return [json.loads(gzip.decompress(base64.b64decode(one))) for one in packed]


def same(atoms: Atoms, other: Atoms) -> bool:
    """Whether one structure is the other, but for a turn."""
    return (
        list(atoms.numbers) == list(other.numbers)
        and np.allclose(atoms.get_scaled_positions(wrap=False), other.get_scaled_positions(wrap=False), atol=1e-4)
        and np.allclose(atoms.cell @ atoms.cell.T, other.cell @ other.cell.T, atol=5e-3)
        and atoms.cell.handedness == other.cell.handedness
    )
