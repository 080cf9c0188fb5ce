"""Learning curves: what is counted, what is compared, and what may be said of it."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import alloys, without
from transfermium.data import read
from transfermium.data.split import independent
from transfermium.errors import InputError
from transfermium.model import load
from transfermium.report import need_viewer
from transfermium.study.curve import _print, _without_training, curve
from transfermium.study.curve_figures import grown_drawn, worth_drawn
from transfermium.study.curve_laws import Curves, goal_of, runs_in_words, summary
from transfermium.study.curve_page import page
from transfermium.study.curve_study import Study, chosen_sizes, validation_error
from transfermium.study.curve_tables import forgotten, of_slopes, worths
from transfermium.study.judged import absolute
from transfermium.study.points import valid_fraction, validating_in_words


def points(arm, law, sizes, seeds=3, n_pretraining=None, scatter=0.02, n_test=40):
    """Synthetic points with errors that follow a law, each seed with an offset of its own."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        shift = scatter * rng.normal()
        for n in sizes:
            each = law(n) * np.exp(shift + scatter * rng.normal()) * np.linspace(0.9, 1.1, n_test)
            found.append(
                {
                    "arm": arm, "n_train": n, "n_pretraining": n_pretraining, "seed": seed, "lr": 1e-3,
                    "errors": {"gap": each.tolist()}, "units": {"gap": "eV"}, "validation": {"gap": law(n)},
                }
            )  # fmt: skip
    return found


SIZES = [10, 20, 40, 80, 160]


def scratch(n):
    return 3.0 * n**-0.4


def worth_four(n):
    return scratch(4 * n)


class TestSummary:
    def test_a_label_worth_four_is_found_to_be_worth_four(self):
        curves = Curves(points("scratch", scratch, SIZES) + points("full", worth_four, SIZES))
        result = summary(curves, chosen=("full", None), goal=goal_of("500meV", curves.units), cost=2.0, labels=160)
        for row in result["factors"]["gap"]["full"]:
            assert row["value"] == pytest.approx(4, rel=0.15)
            assert row["ci"][0] <= 4 <= row["ci"][1]
            assert row["hours saved"]["value"] == pytest.approx((row["value"] - 1) * row["n_train"] * 2)
        needed = (3.0 / 0.5) ** 2.5
        assert result["labels needed"]["scratch"]["value"] == pytest.approx(needed, rel=0.1)
        assert result["labels needed"]["full"]["value"] == pytest.approx(needed / 4, rel=0.1)
        assert result["verdict"].startswith("Gap, full: Pre-training helps")
        assert "at hand are enough" in result["verdict"]

    def test_labels_that_are_missing_are_told(self):
        curves = Curves(points("scratch", scratch, SIZES) + points("full", worth_four, SIZES))
        result = summary(curves, chosen=("full", None), goal=goal_of(0.3, curves.units), labels=50)
        missing = (3.0 / 0.3) ** 2.5 / 4 - 50
        assert "With 50 labels at hand" in result["verdict"]
        assert f"{result['labels needed']['full']['value'] - 50:.3g}" in result["verdict"]
        assert result["labels needed"]["full"]["value"] - 50 == pytest.approx(missing, rel=0.25)

    def test_no_gain_is_said_to_be_none(self):
        same = points("full", scratch, SIZES)
        result = summary(Curves(points("scratch", scratch, SIZES) + same), chosen=("full", None), labels=160)
        assert "does not help here" in result["verdict"]

    def test_nothing_is_said_far_beyond_the_largest_size(self):
        curves = Curves(points("scratch", scratch, SIZES) + points("full", lambda n: scratch(100 * n), SIZES))
        result = summary(curves, chosen=("full", None), goal=goal_of(1e-3, curves.units), labels=160)
        assert result["factors"]["gap"]["full"][-1]["value"] == math.inf
        assert result["factors"]["gap"]["full"][-1]["said"].startswith("more than 4")
        assert "more than 480 are missing" in result["verdict"]

    def test_structures_to_pretrain_on_have_a_law_too(self):
        def grown(m):
            return points("full", lambda n: scratch(n) * (m / 30) ** -0.3, SIZES, n_pretraining=m)

        several = [point for m in (30, 60, 120, 240) for point in grown(m)]
        curves = Curves(points("scratch", scratch, SIZES) + several)
        result = summary(curves, chosen=("full", 240), labels=160, margin=0.2)
        found = result["pre-training sizes"]["full"]["gap"]
        assert found["slopes"]["pre-training"][0] == pytest.approx(0.3, abs=0.05)
        assert found["slopes"]["labels"][0] == pytest.approx(0.4, abs=0.05)
        assert found["slopes"]["answer"] == "equal"
        assert summary(curves, chosen=("full", 240), labels=160, margin=0.02)["pre-training sizes"]["full"]["gap"][
            "slopes"
        ]["answer"] in ("differ", "not clear")
        assert {law["form"] for law in found["surface"]} == {"sum", "product"}

    def test_a_seed_that_diverged_is_left_out_of_both_arms(self):
        broken = points("full", worth_four, SIZES)
        broken[-1] = {**broken[-1], "errors": None}
        curves = Curves(points("scratch", scratch, SIZES) + broken)
        transfer, other = curves.pair(("full", None), "gap")
        assert curves.seeds(("full", None)) == (0, 1)
        assert len(transfer.logs) == len(other.logs) == 2

    def test_arms_whose_seeds_have_nothing_in_common_with_scratch_are_not_compared(self):
        broken, other = points("full", worth_four, SIZES, seeds=2), points("scratch", scratch, SIZES, seeds=2)
        broken[0], other[-1] = {**broken[0], "errors": None}, {**other[-1], "errors": None}  # of seeds 0 and 1
        result = summary(Curves(other + broken), chosen=("full", None), labels=160)
        assert result["factors"]["gap"] == {}
        assert "So many runs diverged" in result["verdict"]

    def test_runs_that_all_diverged_are_told(self):
        with pytest.raises(InputError, match="all trainings diverged"):
            Curves([{**point, "errors": None} for point in points("full", scratch, SIZES)])

    def test_what_is_needed_is_not_told_as_a_negative_number(self):
        few = SIZES[:3]
        curves = Curves(points("scratch", scratch, few) + points("full", worth_four, few, scatter=0.1))
        law = curves.fit(("full", None), "gap", (0, 1, 2))
        error = float(law.predict([25])[0])
        assert law.inverse(error).low < 20  # the labels at hand lie in the interval
        told = summary(curves, chosen=("full", None), goal=goal_of(error, curves.units), labels=20)["verdict"]
        assert told.endswith("more are needed.")
        assert "-" not in told.split("at hand")[1]
        told = summary(curves, chosen=("full", None), goal=goal_of(1e-3, curves.units), labels=200)["verdict"]
        assert told.endswith("The curve ends at 40 labels above 0.001 eV: measure more, up to 200.")

    def test_labels_are_enough_where_the_whole_interval_says_so(self):
        curves = Curves(points("scratch", scratch, SIZES) + points("full", worth_four, SIZES, scatter=0.1))
        needed = curves.fit(("full", None), "gap", (0, 1, 2)).inverse(0.5)
        for labels, said in ((needed.high + 1, "are enough"), (needed.value + 0.1, "are probably enough")):
            assert (
                said
                in summary(curves, chosen=("full", None), goal=goal_of(0.5, curves.units), labels=labels)["verdict"]
            )

    def test_a_difference_is_not_called_pretraining(self):
        for arm, words in (("delta", "Learning the difference helps"), ("multi-fidelity", "Learning both levels")):
            both = points("scratch", scratch, SIZES) + points(arm, worth_four, SIZES)
            told = summary(Curves(both), chosen=(arm, None), labels=160)["verdict"]
            assert words in told
            assert "Pre-training" not in told

    def test_a_better_difference_is_told_and_a_worse_one_is_not(self):
        usual = points("scratch", scratch, SIZES) + points("full", worth_four, SIZES)
        better = points("delta", lambda n: worth_four(n) / 3, SIZES)
        told = summary(Curves(usual + better), chosen=("full", None), labels=160)["verdict"]
        assert "Where the cheap value of each new structure is known" in told
        assert "errors with delta are 0.33" in told
        for worse in (worth_four, scratch):
            told = summary(Curves(usual + points("delta", worse, SIZES)), chosen=("full", None), labels=160)["verdict"]
            assert "delta" not in told

    def test_what_was_learned_is_judged(self):
        assert Curves(energies_and_forces()).quantities[0] == "forces"
        assert Curves(energies_and_forces(), learned=["energy"]).quantities == ["energy_per_atom", "forces"]

    def test_classes_that_are_never_wrong_count_half_a_mistake(self):
        perfect = points("full", lambda n: 0.0, SIZES)
        curves = Curves([{**p, "units": {"gap": "wrong"}} for p in points("scratch", scratch, SIZES) + perfect])
        assert np.allclose(curves.errors(("full", None), "gap").mean(axis=2), 0.5 / 40)


def energies_and_forces():
    return [
        {**p, "errors": {q: p["errors"]["gap"] for q in UNITS}, "units": UNITS} for p in points("full", scratch, SIZES)
    ]


UNITS = {"forces": "eV/Å", "energy_per_atom": "eV/atom"}


@pytest.mark.parametrize(
    ("text", "quantity", "error"),
    [
        ("43meV/atom", "energy_per_atom", 0.043),
        ("43meV", "energy_per_atom", 0.043),
        ("50 meV/Å", "forces", 0.05),
        ("50 meV/A", "forces", 0.05),
        ("0.05", "forces", 0.05),
        (0.05, "forces", 0.05),
        ("1e-2 eV/atom", "energy_per_atom", 0.01),
    ],
)
def test_target_errors(text, quantity, error):
    assert goal_of(text, UNITS) == (quantity, pytest.approx(error))


def test_target_errors_of_labels_with_a_prefix():
    assert goal_of("0.3eV", {"gap": "meV"}) == ("gap", pytest.approx(300))
    assert goal_of("300meV", {"gap": "meV"}) == ("gap", pytest.approx(300))


def test_target_errors_of_classes_are_a_percentage():
    curves = Curves(
        [{**p, "units": {"gap": "wrong"}} for arm in ("scratch", "full") for p in points(arm, scratch, SIZES)]
    )
    told = summary(curves, chosen=("full", None), goal=goal_of(0.2, curves.units), labels=160)["verdict"]
    assert "20 % wrong" in told


def test_target_stresses_are_given_as_they_are_printed():
    assert goal_of("1 GPa", {"stress": "eV/Å^3"}) == ("stress", pytest.approx(1 / 160.21766208))


def test_a_target_error_in_a_unit_that_is_not_here_is_said_at_once(tmp_path):
    with pytest.raises(InputError, match=r"errors here are in eV/Å \(forces\)"):
        small(tmp_path, target="5kcal/mol", dry_run=True)


def test_elements_that_only_tests_have_are_told(tmp_path, capsys):
    tests = alloys(4, seed=11)
    small(tmp_path, test=tests, sizes=[5], seeds=1, dry_run=True, quiet=False)
    assert "No label has" not in capsys.readouterr().err
    for atoms in tests:
        atoms.numbers[0] = 47
    small(tmp_path, test=tests, sizes=[5], seeds=1, dry_run=True, quiet=False)
    assert "No label has Ag, but test structures do" in " ".join(capsys.readouterr().err.split())


def test_frames_of_one_composition_are_one_material():
    frames = [atoms for atoms in alloys(40, seed=5) if set(atoms.symbols) == {"Au"}]
    assert len(frames) > 1 and len(set(independent(frames))) == 1
    named = [atoms.copy() for atoms in frames]
    for number, atoms in enumerate(named):
        atoms.info["material_id"] = str(number)
    assert len(set(independent(named))) == len(frames)


@pytest.mark.parametrize("text", ["small", "-3", "0", "5 kcal/mol", "meV", "1..2", "."])
def test_target_errors_that_are_none(text):
    with pytest.raises(InputError, match="target error"):
        goal_of(text, UNITS)


def test_labels_that_validate_are_counted():
    assert valid_fraction("full", 10) == valid_fraction("scratch", 160) == 0.2
    assert valid_fraction("full", 9) == valid_fraction("aligned", 100) == valid_fraction("probe", 100) == 0


def test_the_arm_of_the_verdict_is_chosen_without_test_errors():
    flattered = points("head", lambda n: 0.01, [10, 20])
    for point in flattered:
        point["validation"] = {"gap": 9.0}
    assert validation_error(("head", None), flattered) > validation_error(("full", None), points("full", scratch, [10]))
    assert validation_error(("none", None), flattered) == math.inf


def test_an_arm_that_diverged_is_chosen_last():
    diverged = points("head", lambda n: 0.01, [10, 20])
    diverged[0] = {**diverged[0], "errors": None, "validation": {}}
    assert validation_error(("head", None), diverged) == math.inf


def test_an_arm_without_validation_errors_is_chosen_first():
    assert validation_error(("full", None), points("full", lambda n: 0.0, [10])) < 1e-6


def test_the_validation_error_of_what_was_learned_counts():
    both = [{**p, "validation": {"energy_per_atom": 0.2, "forces": 3.0}} for p in points("full", scratch, [10])]
    assert validation_error(("full", None), both, ["energy"]) == pytest.approx(0.2)
    assert validation_error(("full", None), both, ["energy", "forces"]) == pytest.approx(3.0)


def test_arms_are_chosen_by_the_quantity_of_the_target(tmp_path, monkeypatch):
    found = {}

    def measured(study, fan_out, halving):
        found["judged"] = study.judged
        return [
            {**p, "errors": {q: p["errors"]["gap"] for q in UNITS}, "units": UNITS, "validation": errors}
            for arm, errors in VALIDATED.items()
            for p in points(arm, scratch, [5, 10, 16], seeds=2, n_test=study.n_test)
        ]

    monkeypatch.setattr(Study, "run", measured)
    monkeypatch.setattr(Study, "baselines", lambda *_: [])
    monkeypatch.setattr(Study, "example", lambda *_: None)
    for target, arm in ((None, "full"), ("20meV/Å", "full"), ("20meV/atom", "head")):
        result = small(tmp_path, arms=["full", "head"], target=target)
        assert f", {arm}: " in result["verdict"]
    cases = [(arm, None) for arm in VALIDATED]
    said = measured(SimpleNamespace(judged=["energy"], n_test=4), {}, False)
    assert Study._halved(SimpleNamespace(judged=["energy"], dropped=[]), cases, said) == [cases[0], cases[2]]


VALIDATED = {
    "scratch": {"forces": 1.0, "energy_per_atom": 1.0},
    "full": {"forces": 0.45, "energy_per_atom": 0.1},
    "head": {"forces": 0.5, "energy_per_atom": 0.01},
}


def test_the_sizes_of_the_base_of_an_arm_are_dropped_together():
    cases = [("scratch", None), ("head", 60), ("full", 30), ("full", 60)]
    errors = {("scratch", None): 9.0, ("head", 60): 2.0, ("full", 30): 3.0, ("full", 60): 1.0}
    said = [p for (arm, m), e in errors.items() for p in points(arm, lambda n, e=e: e, [10], n_pretraining=m)]
    study = SimpleNamespace(judged=["gap"], dropped=[])
    assert Study._halved(study, cases, said) == [("scratch", None), ("full", 30), ("full", 60)]
    assert study.dropped == ["head (60)"]


def test_unknown_classes_are_not_wrong():
    model = SimpleNamespace(card={"quantities": {}}, outputs={})
    likely = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    errors, units = absolute(model, {"site": [(np.array([1.0, 1.0, np.nan, 0.0]), likely)]})
    assert (errors["site"], units["site"]) == ([pytest.approx(1 / 3)], "wrong")


SMALL = {
    "base_data": alloys(30, seed=7), "backbone": tm.PaiNN(8, 1, 4.0, 6), "sizes": [5, 10, 16], "seeds": 2,
    "pretraining": "6steps", "tuning": "4steps", "rates": [2e-3], "edges": 400, "quiet": True,
}  # fmt: skip


OF_BASES = {"base_data": None, "backbone": None, "pretraining": None}  # which a finished base makes needless


def small(out, **changes):
    with ThreadPoolExecutor(1) as pool:
        return curve(alloys(24, seed=3), tm.Potential(), out, **{**SMALL, "executor": pool, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("curve")
    return out, small(out, target="100meV/Å", cost_per_label="30min", base_sizes=[10, 25])


class TestEqualCompute:
    """Scratch for as long as both stages is a rival of its own, where it was asked for."""

    def summary(self, longer):
        all_points = points("scratch", scratch, SIZES) + points("full", worth_four, SIZES)
        all_points += points("scratch_long", longer, SIZES)
        return summary(Curves(all_points), chosen=("full", None), labels=160)

    def test_what_a_label_is_worth_is_smaller_against_it(self):
        result = self.summary(lambda n: scratch(2 * n))
        found = result["equal compute"]["gap"]
        assert list(found) == ["full"]  # neither scratch nor itself
        assert found["full"]["ratio"][0] == pytest.approx(2**-0.4, rel=0.05)
        assert [row["value"] for row in found["full"]["factors"]] == pytest.approx([2] * 5, rel=0.15)
        assert [row["value"] for row in result["factors"]["gap"]["full"]] == pytest.approx([4] * 5, rel=0.15)

    def test_the_verdict_says_where_compute_alone_does_as_much(self):
        said = self.summary(worth_four)["verdict"]
        assert said.startswith("Gap, full: Pre-training helps")
        assert "Against scratch for as long as both stages: pre-training does not help here" in said

    def test_there_is_none_without_it(self):
        result = summary(
            Curves(points("scratch", scratch, SIZES) + points("full", worth_four, SIZES)),
            chosen=("full", None), labels=160,
        )  # fmt: skip
        assert "equal compute" not in result and "as long as both" not in result["verdict"]


def test_arms_of_which_nothing_is_known_are_named_once():
    said = {"full": ["3.1 (2 to 4)", "more than 4 (without bounds)"], "head": ["2 (without bounds)"] * 2}
    factors = {arm: [{"n_train": 10 * k, "said": one} for k, one in enumerate(row, 1)] for arm, row in said.items()}
    assert worths({"factors": {"gap": factors}}, "gap", "said") == [
        {"labels": "10", "full": "3.1 (2 to 4)"}, {"labels": "20", "full": "more than 4 (without bounds)"},
    ]  # fmt: skip


@pytest.mark.parametrize("bounded", [True, False])
def test_what_has_no_bounds_is_not_drawn_as_if_it_were_sure(bounded):
    interval = ("2 to 4", [2.0, 4.0]) if bounded else ("without bounds", [None, None])
    rows = [{"n_train": n, "value": 3.1, "said": f"3.1 ({interval[0]})", "ci": interval[1]} for n in (10, 20)]
    errors = [{"arm": arm, "quantity": "gap"} for arm in ("scratch", "full")]
    figure, of_one_size = (
        worth_drawn({"errors": errors, "factors": {"gap": {"full": some}}}, "gap") for some in (rows, rows[:1])
    )
    assert (figure is not None) is bounded
    assert of_one_size is None
    vague = {**rows[0], "ci": [None, None]}
    assert worth_drawn({"errors": errors, "factors": {"gap": {"full": [vague, rows[1]]}}}, "gap") is None


class TestCurve:
    def test_all_arms_sizes_seeds_and_quantities_are_there(self, study):
        _, result = study
        assert result["arms"] == ["scratch", "aligned (25)", "full (10)", "full (25)"]
        assert len(result["errors"]) == 4 * 3 * 2 * 3
        assert list(result["units"]) == ["forces", "energy_per_atom", "stress"]
        assert {row["unit"] for row in result["errors"]} == {"eV/Å", "eV/atom", "eV/Å^3"}
        assert set(result["fits"]) == set(result["factors"]) == set(result["units"])
        assert all(row["pretrain_seconds"] == 0 for row in result["errors"] if row["arm"] == "scratch")

    def test_numbers_lie_beside_the_page(self, study):
        out, result = study
        assert json.loads((out / "curve.json").read_text()) == json.loads(json.dumps(result))
        html = (out / "report.html").read_text()
        assert result["verdict"].split(":")[0] in html
        assert "http" not in html.split("</style>")[-1].replace("https://doi.org", "").replace("http://www.w3.org", "")

    def test_labels_are_nested_and_counted(self, study):
        out, result = study
        for seed in (0, 1):
            runs = {n: next(out.glob(f"cells/point-scratch-{n}-{seed}-*/run")) for n in (5, 10, 16)}
            splits = {n: json.loads((run / "split.json").read_text()) for n, run in runs.items()}
            for n, found in splits.items():
                assert len(found["train"]) + len(found["valid"]) == n
                assert (len(found["valid"]) >= 2) == (n >= 10)
                if n >= 10:
                    assert result["validation labels"][str(n)][seed] == len(found["valid"])
        assert list(result["validation labels"]) == ["10", "16"]
        page = (out / "report.html").read_text()
        assert f"are counted: {validating_in_words(result['validation labels'])}; below 10" in page

    def test_no_test_structure_is_among_the_labels_or_in_the_base(self, study):
        out, result = study
        tests = {a.positions.tobytes() for a in read(next(out.glob("data/test-*")))}
        assert len(tests) == result["test structures"]
        for name in ("pool", "base"):
            assert not tests & {a.positions.tobytes() for a in read(next(out.glob(f"data/{name}-*")))}

    def test_the_same_call_does_nothing_again(self, study):
        out, result = study
        before = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/result.json")}
        assert small(out, target="100meV/Å", cost_per_label="30min", base_sizes=[10, 25]) == result
        assert {file: file.stat().st_mtime_ns for file in out.glob("cells/*/result.json")} == before

    def test_what_is_done_is_not_priced_again(self, study, capsys):
        out, _ = study
        for seeds, said in ((2, "Nothing is left to train (22 are done already)"), (3, "2 pre-trainings and 9 fine-")):
            small(out, base_sizes=[10, 25], seeds=seeds, dry_run=True)
            assert said in " ".join(capsys.readouterr().err.split())

    def test_aligned_does_not_depend_on_what_trains(self, study):
        out, _ = study
        steps = [json.loads(f.read_text())["result"]["steps"] for f in out.glob("cells/point-aligned-*/result.json")]
        assert steps == [0] * 6

    def test_baselines_go_through_what_the_base_says(self, study):
        _, result = study
        laws = {row["arm"] for row in result["baselines"]}
        assert laws == {"base as it is", "constant shift", "per-element shift", "linear map"}
        assert {row["quantity"] for row in result["baselines"]} == {"energy_per_atom"}


def test_structures_that_test_are_taken_out_of_the_base(tmp_path):
    tests = alloys(4, seed=11)
    result = small(tmp_path, base_data=[*alloys(12, seed=7), *tests], test=tests, sizes=[5], seeds=1)
    assert result["leaks"].startswith("4 of 16")
    assert "One size makes no curve" in result["verdict"]
    assert re.search(r"At 5 labels errors of forces with \w+ are [\d.]+ times those from scratch \(", result["verdict"])
    assert "; one seed, so that others may say otherwise)" in result["verdict"]
    said = (tmp_path / "report.html").read_text()
    assert "one seed" in said and "span the seeds" not in said and "From laws through the curves" not in said


def test_frames_of_one_system_are_compared_frame_by_frame(tmp_path):
    """They are one material, and only those that repeat a test frame are left out, of labels and of the base."""

    def copper(n, seed):
        frames = [bulk("Cu", cubic=True) * (2, 2, 1) for _ in range(n)]
        for i, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=100 * seed + i)
            atoms.info |= {"gap": 1.0, "system": "copper"}
            atoms.calc = SinglePointCalculator(atoms, energy=float(i), forces=np.zeros((len(atoms), 3)))
        return frames

    frames, tests = copper(12, 1), copper(4, 2)
    given = {**SMALL, "base_data": [*copper(9, 3), *tests], "test": tests, "sizes": [5], "seeds": 1}
    with ThreadPoolExecutor(1) as pool:
        result = curve([*frames, tests[0]], tm.Potential(stress=0.0), tmp_path, executor=pool, **given)
    assert result["labels at hand"] == 12
    assert result["left out of the labels"].startswith("train and test are frames of one system, 1 of 13")
    assert result["leaks"].startswith("4 of 13")
    with pytest.raises(InputError, match="0 labelled structures to train on"):
        curve(frames, tm.Property("gap"), tmp_path / "other", **given)


def test_a_base_that_exists(tmp_path):
    base = tm.pretrain(alloys(20, seed=7), tm.Potential(), tm.PaiNN(8, 1, 4.0, 6), steps=4, edges=400, verbose=False)
    options = {**OF_BASES, "sizes": [5, 10], "arms": ["zero-shot", "head", "full"]}
    base.card["levels"] = {"PBE": 20}
    base.save(tmp_path / "base.safetensors")
    first = small(tmp_path / "a", base=base, **options)
    second = small(tmp_path / "b", base=tmp_path / "base.safetensors", **options)
    errors = {row["mae"] for row in first["errors"] if row["arm"] == "zero-shot" and row["quantity"] == "forces"}
    assert len(errors) == 1  # no label changes it
    assert [row["mae"] for row in first["errors"]] == [row["mae"] for row in second["errors"]]
    assert "no test structure is a copy of one that it learned from" in first["base"]
    assert first["theory"]["base"] == second["theory"]["base"] == "PBE (20)"


def test_arms_that_chose_an_end_of_the_rates_are_named(tmp_path):
    result = small(tmp_path, arms=["scratch", "full", "aligned"], sizes=[5, 16], rates=[2e-3, 5e-4])
    of_all = [row for row in result["errors"] if row["seed"] == 0 and row["n_train"] == 16 and row["arm"] != "aligned"]
    said = dict(
        re.findall(r"(\w+(?: and \w+)?) learned best at the \w+ rate tried, ([\d.]+): try", result["beyond the rates"])
    )
    named = {(arm, float(rate)) for arms, rate in said.items() for arm in arms.split(" and ")}
    assert named == {(row["arm"], row["lr"]) for row in of_all}
    assert result["beyond the rates"] in (tmp_path / "report.html").read_text()


def test_a_base_that_exists_replays_what_it_generates(tmp_path):
    base = tm.pretrain(alloys(20, seed=7), tm.Potential(), tm.PaiNN(8, 1, 4.0, 6), steps=4, edges=400, verbose=False)
    result = small(tmp_path, base=base, **OF_BASES, sizes=[10], seeds=1, arms=["replay"])
    cell = next(row["cell"] for row in result["errors"] if row["arm"] == "replay")
    replayed = load(tmp_path / "cells" / cell / "run/model.safetensors").card["history"][-1]["replay"]
    assert replayed["from"] == "generated"


def test_what_was_forgotten_is_shown(tmp_path, capsys):
    result = small(tmp_path, sizes=[5], seeds=2, arms=["full", "replay"], quiet=False)
    tables = forgotten(result)
    assert list(tables) == [
        f"Errors of {what} on the bases' own task ({unit}), before → after"
        for what, unit in (("energies", "meV/atom"), ("forces", "meV/Å"), ("stress", "GPa"))
    ]
    before, after = (
        np.mean([
            1000 * row["forgetting"]["forces"][side]
            for row in result["errors"] if (row["arm"], row["quantity"]) == ("replay", "forces")
        ])
        for side in ("before", "after")
    )  # fmt: skip
    forces = tables["Errors of forces on the bases' own task (meV/Å), before → after"]
    assert forces == [{"labels": "5", "full": forces[0]["full"], "replay": f"{before:.4g} → {after:.4g}"}]
    assert forces[0]["replay"] in (tmp_path / "report.html").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    assert "bases' own task" in printed


def test_a_budget_is_shared_out_and_drops_the_worse_half(tmp_path, monkeypatch):
    monkeypatch.setattr("transfermium.study.curve_study.LEAST", 0.1)
    shared = {"budget": "5s", "pretraining": None, "tuning": None}
    options = {**shared, "sizes": [10, 12], "seeds": 2, "arms": ["head", "full", "aligned"]}
    result = small(tmp_path, **options)
    assert len(result["dropped"]) == 1
    assert result["dropped"][0] in ("head", "full")
    seeds = {arm: {row["seed"] for row in result["errors"] if row["arm"] == arm} for arm in result["arms"]}
    assert seeds["scratch"] == seeds["aligned"] == {0, 1}
    assert seeds[result["dropped"][0]] == {0}
    assert result["verdict"].startswith("Forces, ")
    assert result["dropped"][0] not in result["verdict"].split(":")[0]


def test_a_dry_run_computes_nothing(tmp_path, capsys):
    assert small(tmp_path, dry_run=True, pretraining="1min", tuning="30s") == {}
    assert not list(tmp_path.iterdir())
    assert "2 pre-trainings and 12 fine-tunings: at most 0.13 hours" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretraining": "1min"}, "2 pre-trainings and 12 fine-tunings: 1min of processor time for each pre-training"),
        ({**OF_BASES, "base": "small", "tuning": "5min"}, "12 fine-tunings: at most 1 hours"),
        ({**OF_BASES, "base": "small"}, "12 fine-tunings: 4 steps for each fine-tuning"),
        ({}, "Only 2 materials test: intervals may be wide"),
        ({"sizes": [5]}, "One size makes no curve: errors will be compared"),
        ({}, "more than a third of the labels only validate: 4 to 5 of 10"),
        ({"arms": ["replay"]}, "5 of 27 are set aside to measure what the arm 'replay' forgets"),
    ],
)
def test_what_a_study_takes_and_what_will_be_vague_is_said_before(tmp_path, capsys, changes, said):
    small(tmp_path, **{**changes, "dry_run": True, "quiet": False})
    assert said in " ".join(capsys.readouterr().err.split())


ONE = {"sizes": [5], "seeds": 1, "pretraining": "2steps", "tuning": "2steps"}


def models(out, arm):
    return [load(file) for file in sorted(out.glob(f"cells/point-{arm}-*/run/model.safetensors"))]


def test_what_is_learned_again_is_what_the_base_learned(tmp_path):
    small(tmp_path, **ONE, arms=["replay", "multi-fidelity"], base_sizes=[8])
    (joint,), (replayed,) = models(tmp_path, "multi-fidelity"), models(tmp_path, "replay")
    assert joint.card["history"][-1]["structures"] == 8 + 5
    assert replayed.card["history"][-1]["replay"]["structures"] == 8


def test_what_a_denoising_model_calls_energy_is_no_cheap_value(tmp_path):
    result = small(tmp_path, **ONE, base_objective=tm.Denoise(0.1), arms=["full"])
    assert {row["arm"] for row in result["baselines"]} == {"mean", "per-element fit"}


def test_a_part_of_a_base_that_is_pretrained_here(tmp_path):
    both = tm.Together({"dft": tm.Potential(), "noise": tm.Denoise(0.1)})
    result = small(tmp_path, **ONE, base_objective=both, part="dft", arms=["full"])
    assert {row["arm"] for row in result["errors"]} == {"scratch", "full"}


def test_isolated_atoms_are_neither_labels_nor_tests(tmp_path, capsys):
    lone = Atoms("Cu", info={"config_type": "IsolatedAtom"})
    lone.calc = SinglePointCalculator(lone, energy=-0.2, forces=np.zeros((1, 3)))
    result = small(tmp_path, **{**ONE, "arms": ["aligned"], "test": [*alloys(4, seed=11), lone]})
    assert result["test structures"] == 4
    assert "1 isolated atoms are no structures of a curve" in capsys.readouterr().err


def deep(structures, per_atom):
    for atoms in structures:
        atoms.calc.results["energy"] += per_atom * len(atoms)
    return structures


def test_elements_that_no_label_has_are_guessed_for_arms_without_a_base_too(tmp_path):
    """With zero for their reference, pre-training would save labels by arithmetic alone."""
    copper = alloys(8, seed=3)
    for atoms in copper:
        labels, atoms.numbers[:] = atoms.calc.results, 29
        atoms.calc = SinglePointCalculator(atoms, **labels)
    arms = {"arms": ["multi-fidelity", "full"], "base_data": deep(alloys(8, seed=7), -90.0)}
    with ThreadPoolExecutor(1) as executor:
        result = curve(
            deep(copper, -100.0), tm.Potential(), tmp_path, test=deep(alloys(4, seed=11), -100.0), executor=executor,
            **{**SMALL, **ONE, **arms},
        )  # fmt: skip
    errors = {row["arm"]: row["mae"] for row in result["errors"] if row["quantity"] == "energy_per_atom"}
    assert set(errors) == {"scratch", "multi-fidelity", "full"}
    assert max(errors.values()) < 5


def test_energies_that_some_structures_lack(tmp_path):
    """Of the labels they cost the baselines nothing but these; of the tests they are not judged, and that is said."""
    pool, tests = alloys(12, seed=3), alloys(4, seed=11)
    some = [*without(pool[:1], "energy"), *pool[1:]]
    options = {**ONE, "sizes": [10], "arms": ["aligned"]}
    with ThreadPoolExecutor(1) as executor:
        result = curve(some, tm.Potential(), tmp_path / "a", **{**SMALL, **options}, test=tests, executor=executor)
        assert result["not judged"] == []
        assert {row["quantity"] for row in result["baselines"]} == {"energy_per_atom"}
        tests = [*without(tests[:1], "energy"), *tests[1:]]
        result = curve(pool, tm.Potential(), tmp_path / "b", **{**SMALL, **options}, test=tests, executor=executor)
    assert result["not judged"] == ["energy"]
    assert list(result["units"]) == ["forces", "stress"]
    assert "no errors of energy" in (tmp_path / "b/report.html").read_text()


def test_frames_of_one_material_are_drawn_one_by_one(tmp_path):
    tests = alloys(4, seed=11)
    for atoms in tests:
        atoms.info["traj_id"] = "melt"
    result = small(tmp_path, **{**ONE, "sizes": [5, 6], "arms": ["aligned"]}, test=tests)
    assert result["test materials"] == 1
    assert "structures of one material test" in (tmp_path / "report.html").read_text()


def test_of_arms_without_validation_the_one_that_fits_most_is_judged(tmp_path):
    result = small(tmp_path, sizes=[5], seeds=2, arms=["zero-shot", "aligned", "probe"])
    assert "with probe are" in result["verdict"]
    assert result["verdict by"] == "its place among the arms"
    assert all(row["train_seconds"] > 0 for row in result["errors"] if row["arm"] == "probe")


def metals(n, seed):
    structures = alloys(n, seed)
    for atoms in structures:
        atoms.info["rich"] = int((atoms.numbers == 29).sum() > 1)
    return structures


def test_classes_are_chosen_by_their_validation(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        result = curve(
            metals(24, 3), tm.Property("rich", task="classification"), tmp_path, executor=pool,
            **{**SMALL, **ONE, "base_data": metals(20, 7), "sizes": [10, 16], "arms": ["head", "full"]},
        )  # fmt: skip
    assert result["verdict by"] == "validation errors"
    assert result["units"] == {"rich": "wrong"}


def volumes(n, seed):
    structures = alloys(n, seed)
    for atoms in structures:
        atoms.calc = None
        atoms.info["cheap"] = atoms.get_volume() / len(atoms)
        atoms.info["dear"] = atoms.info["cheap"] + 0.1 * (atoms.numbers == 29).sum() / len(atoms) + 3.0
    return structures


def test_a_difference_from_a_cheap_label(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        result = curve(
            volumes(24, 3), tm.Property("dear"), tmp_path, base_data=volumes(20, 7), label={"v": "cheap"}, cheap="v",
            base_label={"dear": "cheap"}, arms=["delta"], sizes=[8], seeds=1, pretraining="2steps", tuning="4steps",
            rates=[2e-3], backbone=tm.PaiNN(8, 1, 4.0, 6), edges=400, quiet=True, executor=pool,
        )  # fmt: skip
    errors = {row["arm"]: row["mae"] for row in [*result["baselines"], *result["errors"]]}
    assert errors["cheap value"] > 3 > 1 > errors["constant shift"] > errors["per-element shift"]
    assert errors["delta"] < 0.2 * errors["cheap value"]  # it begins with the mean difference
    assert "Without a network, the per-element shift makes smaller errors of dear with 8 labels" in result["verdict"]
    assert result["cheap"] == "v"
    assert {row["unit"] for row in result["errors"]} == {""}


def test_all_sizes_of_bases_are_drawn_for_an_arm_that_has_a_base(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        result = curve(
            volumes(24, 3), tm.Property("dear"), tmp_path, label={"v": "cheap"}, cheap="v",
            base_label={"dear": "cheap"}, executor=pool,
            **{**SMALL, **ONE, "base_data": volumes(20, 7), "arms": ["delta", "aligned"], "base_sizes": [6, 12]},
        )  # fmt: skip
    assert result["arms"] == ["scratch", "delta", "aligned (6)", "aligned (12)"]


def test_a_cheap_label_that_is_not_there_is_missed_before_anything_is_trained(tmp_path):
    data = volumes(24, 3)
    with pytest.raises(InputError, match="no cheap label 'w'"):
        curve(data, tm.Property("dear"), tmp_path, cheap="w", **{**SMALL, "base_data": data, "arms": ["delta"]})
    assert not list(tmp_path.iterdir())


def test_structures_are_beside_the_parity_plot(study):
    try:
        need_viewer()
    except InputError:
        pytest.skip("chemiscope is not installed")
    out, _ = study
    small(out, target="100meV/Å", cost_per_label="30min", base_sizes=[10, 25], viewer=True)
    html = (out / "report.html").read_text()
    assert html.count('class="viewer card"') == 1
    assert "Test structures: full (25), 16 labels, one seed" in html


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_data": None}, "needs a base model, or else data"),
        ({"base": "small"}, "needs a base model, or else data"),
        ({"arms": ["full", "fuller"]}, "no arm 'fuller'"),
        ({"sizes": [2, 10]}, "begin below 5"),
        ({"sizes": [5, 100]}, "not 100"),
        ({"base_sizes": [10, 1000]}, "cannot be taken from 27"),
        ({"seeds": 0}, "at least one"),
        ({"rates": []}, "no learning rate"),
        ({"budget": "3s", "pretraining": None, "tuning": None}, "give more time"),
        ({"arms": ["delta"]}, "learned of a property"),
        ({"cheap": "dft"}, "learned of a property"),
        ({**OF_BASES, "base": "small", "arms": ["multi-fidelity"]}, "give them as base_data"),
        ({**OF_BASES, "base": "small", "arms": ["scratch_long"]}, "was not measured here"),
        ({"cost_per_label": 0}, "must cost something"),
        ({"cost_per_label": "inf"}, "must cost something"),
        ({"margin": 0}, "margin is 0, but must be above zero"),
        ({"test": [*alloys(5, seed=9), *without(alloys(1, seed=10), "stress")], "target": "1GPa"}, "target error"),
        ({"split_key": "nothing"}, "nothing"),
        ({"arms": ["multi-fidelity"], "base_objective": tm.Denoise(0.1)}, "other outputs"),
        ({"test": alloys(1, seed=11)}, "one test structure gives no interval"),
        ({"base_label": {"energy": "E_pbe"}}, "to pre-train on: .*E_pbe"),
        ({"target": "1..2"}, "not a number above zero"),
        ({**OF_BASES, "base": "small", "base_sizes": [3]}, "base_sizes is of bases that are pre-trained here"),
        ({**OF_BASES, "base": "small", "pretraining": "3min"}, "pretraining is of bases that are pre-trained here"),
        ({**OF_BASES, "base": "small", "base_label": {"energy": "e"}}, "base_label is of bases"),
        ({**OF_BASES, "base": "small", "base_unit": {"energy": "eV"}}, "base_unit is of bases"),
        ({"budget": "30min", "tuning": None}, "a budget shares out .* 6steps is given"),
        ({"budget": "30min", "pretraining": None}, "a budget shares out .* 4steps is given"),
        ({"part": "dft"}, "no part 'dft': leave it out"),
        (
            {"part": "pbe", "base_objective": tm.Together({"dft": tm.Potential(), "noise": tm.Denoise(0.1)})},
            "no part 'pbe': choose among dft, noise",
        ),
        (
            {"base_sizes": [25], "arms": ["replay"]},
            "cannot be taken from 22 structures .5 of 27 are set aside .*'replay'",
        ),
    ],
)
def test_what_makes_no_curve(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        small(tmp_path, **changes)


def test_an_arm_that_cannot_learn_the_objective_is_refused(tmp_path):
    with pytest.raises(InputError, match="'probe' learns one number per structure, or an energy with its derivatives"):
        curve(alloys(24, seed=3), tm.Potential(conservative=False), tmp_path, **SMALL, arms=["probe"])


@pytest.mark.parametrize("arm", ["probe", "multi-fidelity"])
def test_a_potential_may_be_probed_and_learned_jointly_with_labels_that_validate(tmp_path, arm):
    result = small(tmp_path, arms=[arm], sizes=[10], seeds=2)
    assert {row["quantity"] for row in result["errors"] if row["arm"] == arm} >= {"energy_per_atom", "forces"}


def test_sizes_are_doubled_from_ten_on_where_that_makes_four():
    assert chosen_sizes(None, 200) == [10, 20, 40, 80, 160]
    assert chosen_sizes(None, 79) == [5, 13, 31, 79]
    assert chosen_sizes(None, 39) == [5, 10, 20, 39]
    assert chosen_sizes(None, 7) == [5, 6, 7]
    assert chosen_sizes(None, 5) == [5]
    assert chosen_sizes([20, 5, 20], 45) == [5, 20]


class TestVerdict:
    """What is said of labels at hand, of runs that diverged, and of what is not known."""

    def told(self, transfer, own=scratch, sizes=SIZES[:4], **options):
        """Of arms that follow these laws, with the error of scratch at 60 labels as the goal."""
        scatter = options.pop("scatter", 0.02)
        both = points("scratch", own, sizes) + points("full", transfer, sizes, scatter=scatter)
        options = {"goal": goal_of(own(60), UNIT), "labels": 100, **options}
        return summary(Curves(both), chosen=("full", None), **options)["verdict"]

    def test_labels_are_counted_from_scratch_where_pretraining_does_not_help(self):
        worse = self.told(lambda n: 3 * scratch(n))
        assert "makes errors larger" in worse
        assert "From scratch: the 100 labels at hand are " in worse and "missing" not in worse
        assert "From scratch" not in self.told(worth_four)

    def test_both_arms_are_told_where_curves_cross(self):
        crossed = self.told(lambda n: 0.8 * n**-0.05, lambda n: 6 * n**-0.8)
        assert "helps with 10 labels" in crossed and "hurts with 80" in crossed
        assert "From scratch: the 100 labels at hand are " in crossed
        assert crossed.endswith("With full: with 100 labels at hand, more than 220 are missing.")

    def test_intervals_are_part_of_what_is_missing(self):
        missing = self.told(worth_four, goal=goal_of(scratch(1500), UNIT), scatter=0.1)
        assert re.search(r"With 100 labels at hand, (more than )?[\d.]+ \(.* to more than 220\)", missing)
        enough = self.told(worth_four, goal=goal_of(scratch(340), UNIT), scatter=0.1)
        assert re.search(r"are probably enough, though it may take (more than )?[\d.]+\.", enough)

    def test_nothing_is_said_without_bounds(self):
        vague = self.told(lambda n: 0.9 * scratch(n), scatter=1.0)
        assert "With full: whether the 100 labels at hand are enough cannot be said." in vague

    def test_runs_that_diverged_are_told(self):
        every = points("scratch", scratch, SIZES) + points("full", worth_four, SIZES)
        lost = [("full", 160, 0), ("full", 160, 2)]
        broken = [{**p, "errors": None} if (p["arm"], p["n_train"], p["seed"]) == lost[0] else p for p in every]
        result = summary(Curves(broken), chosen=("full", None), labels=160)
        assert result["diverged"] == [["full", 160, 0]]
        said = "Runs that diverged are left out: full at 160 labels (seed 0)"
        assert f"{said}; compared are 2 of 3 seeds." in result["verdict"]
        assert summary(Curves(every), chosen=("full", None), labels=160)["diverged"] == []
        assert runs_in_words(lost) == "full at 160 labels (seeds 0, 2)"

    def test_an_exact_regression_is_better_than_any_other(self):
        exact = points("full", lambda n: small_error(n) * (n < 80), SIZES[:4])
        curves = Curves(points("scratch", small_error, SIZES[:4]) + exact)
        assert curves.errors(("full", None), "gap")[:, -1].max() < curves.errors(("scratch", None), "gap").min()


UNIT = {"gap": "eV"}


def small_error(n):
    return 1e-4 * scratch(n)


@pytest.mark.parametrize("unit", ["eV/Ang", "eV/Angstrom", "eV/A", "eV/Å"])
def test_spellings_of_angstrom(unit):
    assert goal_of(f"0.1 {unit}", UNITS) == ("forces", pytest.approx(0.1))


def test_what_is_no_angstrom_is_left_as_it_is():
    with pytest.raises(InputError, match="has the unit meV/Atom,"):
        goal_of("43meV/Atom", UNITS)
    with pytest.raises(InputError, match="not a number above zero"):
        goal_of("1e999", UNITS)


def test_the_page_says_what_is_not_known(study, tmp_path):
    def shown(changes):
        path = page({**study[1], **changes}).write(tmp_path / "report.html")
        return " ".join(path.read_text().split())

    assert "test structures that no model has seen" in shown({})
    unbounded = [{"n_train": 5, "said": "2 (without bounds)", "value": 2, "ci": [None, None]}]
    factors = {quantity: {"full": unbounded} for quantity in study[1]["units"]}
    changes = {"base sizes": [], "diverged": [["full", 5, 1]], "factors": factors}
    told = shown({**changes, "scarce": {quantity: {"full": "independent test structures"} for quantity in factors}})
    assert "test structures (whether the base has seen them is not known)" in told
    assert "Runs that diverged are left out: full at 5 labels (seed 1)" in told
    assert "no bounds at any size for full, mostly for want of independent test structures." in told
    assert "no bounds at any size for full." in shown({**changes, "scarce": {}})


def test_what_structures_to_pretrain_on_are_worth_is_drawn_and_told(study, tmp_path):
    _, result = study
    figure = grown_drawn(result, "forces")
    assert figure.axes[0].get_xlabel() == "structures to pre-train on"
    drawn = [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata()) == 2]
    errors = {
        m: np.mean([
            1000 * row["mae"] for row in result["errors"]
            if (row["arm"], row["quantity"], row["n_pretraining"], row["n_train"]) == ("full", "forces", m, 16)
        ])
        for m in (10, 25)
    }  # fmt: skip
    assert any(np.allclose(line, [(m, errors[m]) for m in (10, 25)]) for line in drawn)
    assert grown_drawn({**result, "pre-training sizes": {}}, "forces") is None
    slopes = {
        "labels": [0.4, 0.3, 0.5], "pre-training": [0.1, -0.1, 0.3], "difference": [0.3, 0.05, 0.55], "margin": 0.1,
        "answer": "not clear",
    }  # fmt: skip
    surface = [{"form": "product", "parameters": {"a": 0.4, "b": 0.1}, "ci": {"a": [0.3, 0.5]}, "aicc": -3.0}]
    grown = {"full": {"forces": {"sizes": [10, 25], "fits": {}, "slopes": slopes, "surface": surface}}}
    assert of_slopes({"pre-training sizes": grown}) == [
        "Forces, full: errors fall with the number of labels to the power 0.40 (0.30 to 0.50), with that of structures "
        "to pre-train on to the power 0.10 (-0.10 to 0.30); the difference is 0.30 (0.05 to 0.55); within a margin of "
        "0.1 they are: not clear."
    ]
    html = page({**result, "pre-training sizes": grown}).write(tmp_path / "report.html").read_text()
    assert "product *" in html
    assert "a = 0.40 (0.30 to 0.50)" in html


def test_what_a_label_is_worth_is_printed(study, capsys):
    _, result = study
    saved = {"said": "30 hours (10 to 70)", "value": 30.0, "ci": [10.0, 70.0]}
    row = {"n_train": 5, "said": "4 (2 to 8)", "value": 4.0, "ci": [2.0, 8.0], "hours saved": saved}
    _print({**result, "factors": {quantity: {"full": [row]} for quantity in result["units"]}})
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("4 (2 to 8)") == printed.count("30 hours (10 to 70)") == len(result["units"])
    assert printed.endswith(result["verdict"])


def test_arms_that_bases_have_no_output_for_are_refused_or_left_out(tmp_path):
    options = {**SMALL, **ONE, "base_data": volumes(20, 7), "base_objective": tm.Denoise(0.1), "sizes": [8, 10]}
    with pytest.raises(tm.InputError, match="the base has no output 'dear' of this kind, which aligned"):
        curve(volumes(24, 3), tm.Property("dear"), tmp_path / "a", **{**options, "arms": ["aligned", "full"]})
    with ThreadPoolExecutor(1) as pool:
        usual = {**options, "executor": pool, "arms": None}
        assert curve(volumes(24, 3), tm.Property("dear"), tmp_path / "b", **usual)["arms"] == ["scratch", "full"]
        for part in (None, "noise"):
            learned = tm.Together({"gaps": tm.Property("cheap"), "noise": tm.Denoise(0.1)})
            several = {**usual, "base_objective": learned, "part": part}
            found = curve(volumes(24, 3), tm.Property("dear"), tmp_path / f"c{part}", **several)
            assert found["arms"] == ["scratch", "full"]


def test_units_that_cannot_be_converted_are_refused_before_anything_trains(tmp_path):
    units = {"unit": {"dear": "eV"}, "base_unit": {"dear": "THz"}, "base_label": {"dear": "cheap"}}
    with pytest.raises(tm.InputError, match="bases give 'dear' in THz, and these labels are in eV"):
        curve(
            volumes(24, 3), tm.Property("dear"), tmp_path / "a", **units,
            **{**SMALL, **ONE, "base_data": volumes(20, 7), "arms": ["full"], "sizes": [8, 10]},
        )  # fmt: skip
    assert not (tmp_path / "a" / "cells").exists()


def test_what_a_base_says_in_another_unit_is_converted_for_baselines(tmp_path):
    found = []
    for factor, unit in ((1.0, "eV"), (1e3, "meV")):
        structures, cheap = volumes(24, 3), volumes(20, 7)
        for atoms in structures:
            atoms.info["dear"] *= factor
        with ThreadPoolExecutor(1) as pool:
            result = curve(
                structures, tm.Property("dear"), tmp_path / unit, base_label={"dear": "cheap"}, executor=pool,
                base_unit={"dear": "eV"}, unit={"dear": unit},
                **{**SMALL, **ONE, "base_data": cheap, "arms": ["zero-shot"], "sizes": [8, 10]},
            )  # fmt: skip
        found.append({(row["arm"], row["n_train"]): row["mae"] for row in [*result["baselines"], *result["errors"]]})
    for key in ((arm, n) for arm in ("base as it is", "per-element shift", "zero-shot") for n in (8, 10)):
        assert found[1][key] == pytest.approx(1e3 * found[0][key], rel=1e-3)


class TestWithoutTraining:
    """What the verdict says of fits that take no training."""

    @staticmethod
    def said(baseline, seeds=2, cheap=None, law="linear map", delta=None):
        rows = [("full", {10: 2.0, 20: 1.0}), *([("delta", delta)] if delta else [])]
        errors = [
            {"arm": arm, "n_train": n, "n_pretraining": None, "seed": seed, "quantity": "gap", "mae": mae}
            for arm, maes in rows for n, mae in maes.items() for seed in range(seeds)
        ]  # fmt: skip
        baselines = [
            {"arm": law, "n_train": n, "seed": seed, "quantity": "gap", "mae": maes[seed]}
            for n, maes in baseline.items() for seed in range(seeds)
        ]  # fmt: skip
        result = {"errors": errors, "baselines": baselines, "sizes": [10, 20], "units": {"gap": "eV"}, "cheap": cheap}
        return _without_training(result, "full")

    def test_sizes_at_which_all_seeds_agree_are_named(self):
        assert "with 10 labels" in self.said({10: [1.0, 1.0], 20: [0.5, 1.5]}, cheap="pbe")
        assert "with 10 and 20 labels (0.5 instead" in self.said({10: [1.0, 1.0], 20: [0.5, 0.5]}, cheap="pbe")
        assert self.said({10: [1.0, 3.0], 20: [0.5, 1.5]}, cheap="pbe") == ""

    def test_what_a_base_says_takes_a_network(self):
        low = {10: [1.0, 1.0], 20: [0.5, 0.5]}
        assert self.said(low, cheap="pbe").startswith(" Without a network, the linear map makes")
        assert "the linear map of what the base says makes" in self.said(low)
        assert self.said(low).startswith(" Without training on them, the ")
        assert "the base as it is makes" in self.said(low, law="base as it is")
        assert self.said(low, law="mean").startswith(" Without a network, the mean makes")

    def test_the_error_of_the_difference_is_told_too(self):
        low = {10: [1.0, 1.0], 20: [0.5, 0.5]}
        assert "and 0.7 with delta at 20" in self.said(low, cheap="pbe", delta={10: 0.8, 20: 0.7})
