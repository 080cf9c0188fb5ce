"""Comparing ways to pre-train: what is compared with what, and what may be said of it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ase.build import bulk

import transfermium as tm
from tests.alloys import alloys
from transfermium.study import stages
from transfermium.study.bakeoff import ARMS, Arm, Target, bakeoff
from transfermium.study.plan import Plan, nearest_equilibrium
from transfermium.study.ranking import answers, comparisons, verdict


def gaps(n: int, seed: int) -> list:
    structures = alloys(n, seed)
    for atoms in structures:
        atoms.calc = None
        atoms.info["gap"] = float(atoms.get_volume()) / len(atoms)
    return structures


def small(out, **changes):
    options = {
        "arms": ["scratch", "scratch_long", "efs_derivative"],
        "backbones": {"PaiNN": tm.PaiNN(8, 1, 4.0, 6)},
        "pretraining": "0.4s",
        "tuning": "0.2s",
        "seeds": 2,
        "rates": [2e-3],
        "edges": 400,
        "quiet": True,
    }
    structures = changes.pop("structures") if "structures" in changes else alloys(30, seed=7)
    targets = changes.pop("targets", {"gap": Target(gaps(20, 3), tm.Property("gap"))})
    with ThreadPoolExecutor(1) as pool:
        return bakeoff(structures, targets, out, **{**options, "executor": pool, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("bakeoff")
    return out, small(out)


class TestBakeoff:
    def test_every_arm_has_the_same_labels_tests_and_time(self, study):
        _, result = study
        runs = result["runs"]
        assert len(runs) == 6
        assert len({(run["n_train"], run["n_test"], run["test_ids_sha"]) for run in runs}) == 1
        for run in runs:
            assert run["pretrain_seconds"] == 0 or run["pretrain_seconds"] >= 0.4
            assert run["train_seconds"] >= (0.6 if run["arm"] == "scratch_long" else 0.2)
            assert run["train_seconds"] < 0.6 or run["arm"] == "scratch_long"
        assert {run["arm"] for run in runs if run["pretrain_seconds"]} == {"efs_derivative"}

    def test_the_same_call_does_nothing_again(self, study):
        out, result = study
        before = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/result.json")}
        assert small(out) == result
        assert {file: file.stat().st_mtime_ns for file in out.glob("cells/*/result.json")} == before

    def test_a_study_that_was_moved_is_not_done_again(self, study, tmp_path):
        out, result = study
        shutil.copytree(out, tmp_path / "moved")
        before = len(list(out.glob("cells/*")))
        assert small(tmp_path / "moved") == result
        assert len(list((tmp_path / "moved").glob("cells/*"))) == before

    def test_another_arm_adds_its_own_cells(self, study, tmp_path):
        out, result = study
        before = set(out.glob("cells/*"))
        more = small(out, arms=["scratch", "scratch_long", "efs_derivative", "denoise_derivative"])
        new = {cell.name.rsplit("-", 1)[0] for cell in set(out.glob("cells/*")) - before}
        assert all("denoise_derivative" in name for name in new)
        assert [run for run in more["runs"] if run["arm"] != "denoise_derivative"] == result["runs"]

    def test_an_arm_may_have_structures_of_its_own_but_none_of_a_test_set(self, tmp_path):
        test, own = gaps(5, 4), [*gaps(8, 5), *gaps(5, 4)]
        clean = len(own) - len(tm.leaks(own, test, quiet=True))
        assert 0 < clean <= 8
        with ThreadPoolExecutor(1) as pool:
            result = bakeoff(
                alloys(12, seed=7), {"gap": Target(gaps(20, 3), tm.Property("gap"), test)}, tmp_path,
                arms={"other": Arm(tm.Denoise(), own)}, backbones={"PaiNN": tm.PaiNN(8, 1, 4.0, 6)},
                pretraining="0.2s", tuning="0.2s", seeds=1, rates=[2e-3], edges=400, quiet=True, executor=pool,
            )  # fmt: skip
        assert {run["arm"] for run in result["runs"]} == {"scratch", "scratch_long", "other"}
        (base,) = tmp_path.glob("cells/pretrained-*/run")
        stage = tm.load(base).card["history"][0]
        assert stage["structures"] + stage["validation structures"] == clean

    def test_of_equal_operations_derivatives_take_fewer_steps(self, tmp_path):
        result = small(
            tmp_path, arms=["scratch", "scratch_long", "efs_direct", "efs_derivative"], pretraining="0.3GFLOP",
            tuning="0.03GFLOP", seeds=1,
        )  # fmt: skip
        (first, *others), (long,) = (
            [run["steps"] for run in result["runs"] if (run["arm"] == "scratch_long") == is_long]
            for is_long in (False, True)
        )
        assert others == [first, first] and long == pytest.approx(11 * first, abs=6)
        steps = {
            arm: tm.load(next(tmp_path.glob(f"cells/pretrained-*{arm}*/run"))).card["history"][0]["steps"]
            for arm in ("efs_direct", "efs_derivative")
        }
        assert steps["efs_direct"] > 1.5 * steps["efs_derivative"]
        assert "pre-trained for 0.3GFLOP on" in (tmp_path / "report.html").read_text()

    def test_there_is_a_page_that_says_it(self, study):
        out, result = study
        page = (out / "report.html").read_text()
        assert "efs_derivative" in result["verdict"]
        assert "Does pre-training beat the same fine-tuning from scratch?" in page
        assert "<svg" in page

    def test_what_is_tested_on_is_not_pretrained_on(self, tmp_path):
        test = alloys(30, seed=7)[:4]
        for atoms in test:
            atoms.calc, atoms.info["gap"] = None, 1.0
        target = Target(gaps(10, 3), tm.Property("gap"), test)
        with ThreadPoolExecutor(1) as pool:
            result = bakeoff(
                alloys(30, seed=7), {"gap": target}, tmp_path, arms=["efs_derivative"], executor=pool, quiet=True,
                backbones={"PaiNN": tm.PaiNN(8, 1, 4.0, 6)}, pretraining="0.1s", tuning="0.1s", seeds=1, rates=[1e-3],
            )  # fmt: skip
        assert result["leaks"] != "none of 30 structures leaks"

    def test_what_is_not_labelled_is_left_out_and_said(self, tmp_path, capsys):
        pool, test = gaps(16, 3), gaps(8, 4)
        for atoms in (*pool[:4], test[0]):
            del atoms.info["gap"]
        with ThreadPoolExecutor(1) as pool_of_threads:
            result = bakeoff(
                alloys(20, seed=7), {"gap": Target(pool, tm.Property("gap"), test)}, tmp_path, arms=["efs_derivative"],
                backbones={"PaiNN": tm.PaiNN(8, 1, 4.0, 6)}, pretraining="0.1s", tuning="0.1s", seeds=1,
                rates=[1e-3, 1e8], executor=pool_of_threads, quiet=True,
            )  # fmt: skip
        assert {run["n_test"] for run in result["runs"]} == {7}
        assert max(run["n_train"] for run in result["runs"]) <= 12
        assert {rate["lr"] for rate in result["rates"]} == {1e-3}, "the rate that diverges was chosen"
        assert "at the smallest rate tried, 0.001: try" in result["beyond the rates"]
        assert "Infinity" not in (tmp_path / "results.json").read_text()

    def test_energies_of_several_levels_are_not_confused(self, tmp_path):
        with pytest.raises(tm.InputError, match="the target emt has energies, and one, other each have their own"):
            bakeoff(
                {"one": alloys(6, seed=7), "other": alloys(6, seed=8)},
                {"emt": Target(alloys(8, 1), tm.Potential())}, tmp_path, quiet=True,
            )  # fmt: skip

    def test_levels_of_theory_have_energies_of_their_own(self, tmp_path):
        with ThreadPoolExecutor(1) as pool:
            bakeoff(
                {"one": alloys(10, seed=7), "other": alloys(10, seed=8)},
                {"gap": Target(gaps(10, 3), tm.Property("gap"))}, tmp_path, arms=["efs_derivative"], executor=pool,
                backbones={"PaiNN": tm.PaiNN(8, 1, 4.0, 6)}, pretraining="0.1s", tuning="0.1s", seeds=1, rates=[1e-3],
                quiet=True,
            )  # fmt: skip
        (base,) = tmp_path.glob("cells/pretrained-*/run/model.safetensors")
        assert {"one_energy", "other_energy"} <= tm.load(base).outputs.keys()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"arms": ["efs"]}, "there is no arm 'efs': choose among scratch, scratch_long, denoise_direct"),
            ({"seeds": 0}, "seeds is 0"),
            ({"rates": []}, "no learning rate to try"),
            ({"arms": {"scratch": tm.Denoise()}}, "'scratch' is the name of a control"),
            ({"sizes": [500]}, "gap has 13 structures to train on, not 500"),
        ],
    )
    def test_senseless_questions_are_refused(self, changes, words, tmp_path):
        with pytest.raises(tm.InputError, match=words):
            small(tmp_path, **changes)

    def test_a_run_that_diverges_is_said_and_left_out(self, tmp_path, monkeypatch):
        """Of two seeds one, or at one of two rates both."""
        learned = stages.finetune

        def diverging(*given, **options):
            if options["seed"] == 1 or options["lr"] == 1.0:
                raise tm.InputError("the loss is not finite")
            return learned(*given, **options)

        monkeypatch.setattr(stages, "finetune", diverging)
        result = small(tmp_path, seeds=3, rates=[1.0, 2e-3])
        assert {rate["lr"] for rate in result["rates"] if rate["arm"] == "efs_derivative"} == {2e-3}
        where = {"target": "gap", "backbone": "PaiNN", "arm": "efs_derivative", "n_train": 13, "seed": 1}
        assert result["diverged"] == [where]
        assert "Runs that diverged: efs_derivative on gap (PaiNN) with seed 1" in result["verdict"]
        rows = {row["arm"]: row["seeds"] for row in result["comparisons"]}
        assert rows == {"scratch": 3, "scratch_long": 3, "efs_derivative": 2}
        assert {a["seeds"] for a in result["answers"] if a["arm"] == "efs_derivative"} == {2}
        assert "diverged" in (tmp_path / "report.html").read_text()

    def test_where_nothing_validates_the_first_rate_that_works_is_taken(self, tmp_path, monkeypatch):
        learned = stages.pretrain

        def diverging(*given, **options):
            if options.get("lr") == 1.0:
                raise tm.InputError("the loss is not finite")
            return learned(*given, **options)

        monkeypatch.setattr(stages, "pretrain", diverging)
        result = small(tmp_path, sizes=[1], rates=[1.0, 2e-3, 1e-3], arms=["scratch"], seeds=1)
        assert [rate["lr"] for rate in result["rates"]] == [2e-3]

    def test_one_seed_has_no_interval(self, tmp_path):
        result = small(tmp_path, seeds=1)
        assert "one seed has no interval" in result["verdict"]
        assert "inf" not in (tmp_path / "report.html").read_text().replace("info", "")

    def test_energies_of_elements_without_labels_are_guessed_and_said(self, tmp_path):
        """Of a reference of zero, an energy of -30 eV per atom would be all error."""
        known, new = alloys(12, seed=3), alloys(6, seed=4)
        for atoms in new:
            atoms.numbers[atoms.numbers == 29] = 47
        for atoms in (*known, *new):
            atoms.info["energy"] = -30.0 * len(atoms) + 0.01 * atoms.get_volume()
            atoms.calc = None
        goal = Target(known, tm.Potential(forces=0.0, stress=0.0), new)
        result = small(tmp_path, targets={"energy": goal}, seeds=1)
        assert all(run["mae"] < 3 for run in result["runs"])
        assert "Test structures have Ag" in result["verdict"]

    def test_frames_of_a_material_without_an_id_are_drawn_together(self, tmp_path):
        structures = alloys(20, seed=3)
        frames = [atoms for one in structures[:5] for atoms in (one, one.copy(), one.copy())]
        for i, atoms in enumerate(frames):
            atoms.info["gap"] = 1.0 + 0.01 * i
            atoms.rattle(0.05, seed=i)
        for atoms in structures:
            atoms.info["gap"] = 2.0
        test = Target(structures[5:], tm.Property("gap"), frames)
        small(tmp_path, targets={"gap": test}, arms=["scratch"], seeds=1)
        (cell,) = tmp_path.glob("cells/tuned-*/result.json")
        compositions = len({str(sorted(atoms.symbols)) for atoms in frames})
        assert len(set(json.loads(cell.read_text())["result"]["materials"])) == compositions > 1

    def test_names_are_no_paths_and_no_markup(self, tmp_path):
        out = tmp_path / "study"
        name = "../../[/x] " + "\N{ATOM SYMBOL}" * 90
        structures = gaps(20, 3)
        structures[0].info.pop("gap")
        small(out, targets={name: Target(structures, tm.Property("gap"))}, arms=["scratch"], seeds=1, quiet=False)
        assert [path.name for path in tmp_path.iterdir()] == ["study"]

    def test_the_same_time_in_other_words_is_the_same(self, study):
        out, _ = study
        before = len(list(out.glob("cells/*")))
        small(out, pretraining="0.40s", tuning="0.20s")
        assert len(list(out.glob("cells/*"))) == before

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"arms": {"mine": tm.Property("nothing")}}, "no structure has 'nothing'"),
            ({"arms": {"mine": Arm(tm.Potential(), [bulk("Ni")])}}, "mine learns energy or forces or stress, but"),
            ({"arms": {"mine": "Potential"}}, "must be an objective"),
            ({"arms": "efs_drivative"}, "there is no arm 'efs_drivative'"),
            ({"backbones": {"CGAT": tm.CGAT()}}, "the arm efs_derivative with CGAT: CGAT is not smooth"),
            ({"backbones": {}}, "no backbone"),
            ({"sizes": [5.5]}, "5.5 is no number of labels"),
            ({"seeds": 2.0}, "seeds is 2.0"),
            ({"structures": {}}, "no structures to pre-train on"),
            ({"targets": {"gap": gaps(8, 3)}}, "give Target"),
            ({"targets": {"gap": Target(gaps(8, 3), tm.Property("gap", task="classification"))}}, "classes are"),
        ],
    )  # fmt: skip
    def test_what_no_cell_could_do_is_refused_before_any(self, tmp_path, changes, words):
        with pytest.raises(tm.InputError, match=words):
            small(tmp_path / "study", **changes)
        assert not (tmp_path / "study").exists()

    def test_what_a_backbone_cannot_learn_is_left_out_of_all_arms(self, tmp_path, capsys):
        study = small(tmp_path, arms=None, backbones={"CGAT": tm.CGAT()}, dry_run=True)
        assert study == {} and "e_derivative is left out: CGAT is not smooth" in capsys.readouterr().err

    def test_levels_are_not_mixed_in_one_of_ones_own_objectives(self, tmp_path):
        mine = tm.Together({"x": tm.Potential(), "y": tm.Denoise()})
        levels = {"a": alloys(8, 1), "b": alloys(8, 2)}
        with pytest.raises(tm.InputError, match="the arm mine learns energies together with something else, but a, b"):
            small(tmp_path, structures=levels, arms={"mine": mine})

    def test_keys_are_named_for_ones_own_objectives_of_several_parts(self, tmp_path):
        structures = alloys(20, seed=7)
        for atoms in structures:
            atoms.info["E"] = atoms.get_potential_energy()
            atoms.calc = None
        mine = {"mine": tm.Together({"x": tm.Potential(), "y": tm.Denoise()})}
        result = small(tmp_path, structures=structures, arms=mine, label={"energy": "E"}, seeds=1)
        assert {run["arm"] for run in result["runs"]} == {"scratch", "scratch_long", "mine"}

    def test_arms_need_their_labels(self, tmp_path):
        with pytest.raises(tm.InputError, match="'efs_derivative' needs labels that the structures lack: they have"):
            bakeoff(
                gaps(10, 1), {"gap": Target(gaps(10, 3), tm.Property("gap"))}, tmp_path, arms=["efs_derivative"],
                quiet=True,
            )  # fmt: skip


def test_without_stress_there_are_arms_of_energies_and_forces(tmp_path):
    def arms(structures) -> set[str]:
        data = {"": structures}
        plan = Plan(data, {}, {"gap": Target(gaps(12, 3), tm.Property("gap"))}, tmp_path, {}, {}, None, True)
        return set(plan.objectives(None, {"PaiNN": tm.PaiNN(8, 1, 4.0, 6)}))

    both = {"scratch", "scratch_long", "denoise_direct", "denoise_derivative", "dens_derivative"}
    both |= {"e_derivative", "f_derivative"}
    assert arms(alloys(6)) == both | {"fs_derivative", "efs_direct", "efs_derivative"}
    molecules = alloys(6)
    for atoms in molecules:
        del atoms.calc.results["stress"]
    assert arms(molecules) == both | {"ef_direct", "ef_derivative"}


def test_noise_is_learned_on_the_frame_nearest_to_equilibrium():
    structures = alloys(6)
    for k, atoms in enumerate(structures):
        atoms.info["material_id"] = f"m{k // 3}"
        atoms.calc.results["forces"] = np.full((len(atoms), 3), [3.0, 1.0, 2.0, 0.5, 0.7, 0.1][k])
    assert nearest_equilibrium(structures, {}, {}).tolist() == [1, 5]
    for atoms in structures:
        atoms.calc = None
    assert nearest_equilibrium(structures, {}, {}).tolist() == [0, 3]


def test_every_arm_is_an_objective():
    assert all(isinstance(arm, tm.Objective) for arm in ARMS.values())


class TestRanking:
    def runs(self, effect: float, seeds: int = 3, noise: float = 0.02):
        rng = np.random.default_rng(0)
        for target in ("a", "b"):
            difficulty = rng.lognormal(size=200)
            for seed in range(seeds):
                for arm, factor in (("scratch", 1.0), ("scratch_long", 0.95), ("efs_derivative", effect)):
                    errors = factor * difficulty * rng.lognormal(sigma=0.1, size=200) * (1 + noise * rng.normal())
                    yield {
                        "target": target, "backbone": "PaiNN", "arm": arm, "seed": seed, "n_train": 100, "unit": "eV",
                        "quantity": "gap", "mae": float(errors.mean()), "errors": errors.tolist(),
                    }  # fmt: skip

    def test_a_real_gain_is_found_and_said(self):
        runs = list(self.runs(0.7))
        (found,) = [a for a in answers(runs) if (a["arm"], a["against"]) == ("efs_derivative", "scratch")]
        assert found["answer"] == "yes"
        assert found["low"] < 0.7 < found["high"]
        assert 0.6 < found["targets"]["a"] < 0.8
        assert "efs_derivative beats the same fine-tuning from scratch" in verdict(answers(runs))
        assert all(row["clear"] for row in comparisons(runs) if row["arm"] == "efs_derivative")

    def test_seeds_that_agree_do_not_make_up_for_few_materials(self):
        """Two arms that differ by nothing but which materials they find hard, on ten of them."""
        rng, runs = np.random.default_rng(0), []
        for arm in ("scratch", "efs_derivative"):
            hard = rng.lognormal(sigma=0.8, size=10)
            runs += [
                {
                    "target": "a", "backbone": "PaiNN", "arm": arm, "seed": seed, "n_train": 9, "unit": "",
                    "quantity": "gap", "mae": float(hard.mean()) * (1 + 1e-3 * seed),
                    "errors": (hard * (1 + 1e-3 * seed)).tolist(),
                }
                for seed in range(3)
            ]  # fmt: skip
        (found,) = answers(runs)
        assert found["low"] > 1 or found["high"] < 1
        assert found["answer"] == "not clear"

    def test_sizes_and_properties_of_one_test_set_are_no_more_materials(self):
        """Or what many sizes repeat would look surer than one."""
        one = [run for run in self.runs(1.1) if run["target"] == "a"]
        again = [{**run, "n_train": 2 * run["n_train"]} for run in one]
        other = [{**run, "target": "another property", "test_ids_sha": "same"} for run in one]
        intervals = [answers(runs)[0]["materials interval"] for runs in (one, [*one, *again])]
        intervals.append(answers([*({**run, "test_ids_sha": "same"} for run in one), *other])[0]["materials interval"])
        assert intervals[1] == pytest.approx(intervals[0]) and intervals[2] == pytest.approx(intervals[0])

    def test_few_test_materials_allow_no_answer(self):
        runs = (run for run in self.runs(0.3) if run["target"] == "a")
        few = [{**run, "errors": run["errors"][:8], "mae": float(np.mean(run["errors"][:8]))} for run in runs]
        (answer, *_) = answers(few)
        assert answer["high"] < 1 and answer["materials interval"][1] < 1 and answer["answer"] == "not clear"
        assert not any(row.get("clear") for row in comparisons(few))

    def test_frames_of_a_material_count_together(self):
        runs = [{**run, "materials": np.repeat(np.arange(4), 50).tolist()} for run in self.runs(0.97)]
        alone, together = comparisons(list(self.runs(0.97))), comparisons(runs)
        for one, other in zip(alone, together, strict=True):
            if "ratio" in one:
                assert np.diff(np.log(other["materials interval"]))[0] != np.diff(np.log(one["materials interval"]))[0]

    def test_a_classifier_without_mistakes_can_be_compared(self):
        runs = [{**run, "errors": [0.0] * 200, "mae": 0.0} if run["arm"] != "scratch" else run for run in self.runs(1)]
        assert all(np.isfinite(answer["ratio"]) for answer in answers(runs))
        assert comparisons(runs)

    def test_no_gain_is_called_no_gain(self):
        found = answers(list(self.runs(1.0, noise=0.1)))
        assert {a["answer"] for a in found if a["arm"] == "efs_derivative"} == {"not clear"}
        assert "cannot be told from" in verdict(found)

    def test_harm_is_called_harm(self):
        text = verdict(answers(list(self.runs(1.5))))
        assert "efs_derivative is worse than the same fine-tuning from scratch" in text
        assert text.index("scratch_long (") < text.index("efs_derivative (")
