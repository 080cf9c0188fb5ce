"""MatBench: folds, data and records are those of the official package, key by key."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from hypothesis import given, settings
from hypothesis import strategies as st

from transfermium.errors import InputError
from transfermium.study import matbench
from transfermium.study.matbench import TASKS, Record, Task, folds, read_task

# SHA-256 of the official fold of every sample (one byte each), from matbench_v0.1_validation.json of matbench 0.6
OFFICIAL = {
    "matbench_dielectric": "75ce477812f494b8",
    "matbench_expt_gap": "9ed1c8241ec011cb",
    "matbench_jdft2d": "72e2b4bc7ea4df67",
    "matbench_log_gvrh": "d4f1c38e786d9d8f",
    "matbench_log_kvrh": "d4f1c38e786d9d8f",
    "matbench_mp_e_form": "86b3e1f495cbebb0",
    "matbench_mp_gap": "0e4e0dea8fbe7235",
    "matbench_perovskites": "78012772e6affd65",
    "matbench_phonons": "5139ec1c5736bd95",
    "matbench_steels": "e65cf256c3c10003",
}
PHONONS = TASKS["matbench_phonons"]


def numbers(parts: list[matbench.Fold], size: int) -> np.ndarray:
    """The fold in which each sample is tested."""
    number = np.full(size, 9, np.uint8)
    for fold, part in enumerate(parts):
        number[part.test] = fold
    return number


def some_labels(task: Task, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=task.size)
    return values > 0.3 if task.kind == "classification" else values


def full_record(task: Task, predict: Callable[[np.ndarray], np.ndarray] = lambda labels: labels) -> Record:
    record = Record(task, some_labels(task))
    for fold, part in enumerate(record.folds):
        record.add(fold, predict(record.labels[part.test]))
    return record


# ------------------------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("name", OFFICIAL)
def test_folds_of_regression_are_the_official_ones(name: str) -> None:
    number = numbers(folds(name), TASKS[name].size)
    assert hashlib.sha256(number.tobytes()).hexdigest()[:16] == OFFICIAL[name]


@given(labels=st.lists(st.booleans(), min_size=5, max_size=60))
def test_folds_divide_everything_and_keep_classes_balanced(labels: list[bool]) -> None:
    parts = folds(len(labels), labels)
    assert sorted(np.concatenate([part.test for part in parts]).tolist()) == list(range(len(labels)))
    for train, test in parts:
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
        assert abs(sum(labels[i] for i in test) - sum(labels) / 5) < 1
        assert abs(len(test) - len(labels) / 5) < 1


@settings(max_examples=20)
@given(size=st.integers(25, 300), share=st.floats(0.2, 0.8), seed=st.integers(0, 9))
def test_folds_are_those_of_scikit_learn(size: int, share: float, seed: int) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    labels = np.random.default_rng(seed).random(size) < share
    if min(labels.sum(), (~labels).sum()) < 5:
        return  # scikit-learn warns
    options = {"n_splits": 5, "shuffle": True, "random_state": 18012019}
    for own, theirs in (
        (folds(size), selection.KFold(**options).split(labels)),
        (folds(size, labels), selection.StratifiedKFold(**options).split(labels, labels)),
    ):
        for (train, test), (their_train, their_test) in zip(own, theirs, strict=True):
            assert train.tolist() == their_train.tolist()
            assert test.tolist() == their_test.tolist()


def test_ids_are_padded_to_the_digits_of_the_size() -> None:
    assert TASKS["matbench_jdft2d"].ids[0] == "mb-jdft2d-001"
    assert PHONONS.ids[-1] == "mb-phonons-1265"
    assert TASKS["matbench_mp_e_form"].ids[41] == "mb-mp-e-form-000042"


def test_the_tasks_are_thirteen() -> None:
    kinds = [(task.kind, task.has_structure) for task in TASKS.values()]
    assert len(kinds) == 13
    assert sum(kind == "regression" for kind, _ in kinds) == 10
    assert sum(has for _, has in kinds) == 9
    assert all(task.key.isidentifier() for task in TASKS.values())
    assert TASKS["matbench_log_gvrh"].key == "log10_G_VRH"
    assert matbench.find_task("jdft2d") is TASKS["matbench_jdft2d"]


# -------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task of ten samples under the name of a real one."""
    task = Task("matbench_phonons", 10, "last phdos peak", "cm^-1")
    monkeypatch.setitem(TASKS, task.name, task)
    return task


def table(n: int, index: list[Any] | None = None, **columns: list[Any]) -> dict[str, Any]:
    """What an official file holds."""
    structure = {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": None,
        "lattice": {"matrix": [[0.0, 2.1, 2.1], [2.1, 0.0, 2.1], [2.1, 2.1, 0.0]]},
        "sites": [
            {"species": [{"element": "Mg", "occu": 1}], "abc": [0.0, 0.0, 0.0], "label": "Mg"},
            {"species": [{"element": "O", "occu": 1}], "abc": [0.5, 0.5, 0.5], "label": "O"},
        ],
    }
    columns = columns or {"last phdos peak": [100.0 * i for i in range(n)]}
    data = [[structure, *row] for row in zip(*columns.values(), strict=True)]
    return {"index": index or list(range(n)), "columns": ["structure", *columns], "data": data}


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def test_an_official_file_is_read_in_order_with_its_ids(small: Task, tmp_path: Path) -> None:
    task, structures, labels = read_task(written(tmp_path / "matbench_phonons.json.gz", table(10)))
    assert task is small
    assert [atoms.info["mbid"] for atoms in structures] == small.ids
    assert labels.tolist() == [100.0 * i for i in range(10)]
    assert structures[3].get_chemical_formula() == "MgO"
    assert structures[3].info["last_phdos_peak"] == 300.0


def test_classes_are_read_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TASKS, "matbench_mp_is_metal", Task("matbench_mp_is_metal", 4, "is_metal", "", "classification")
    )
    content = table(4, is_metal=[True, False, False, True])
    found = read_task(written(tmp_path / "matbench_mp_is_metal.json.gz", content))
    assert found.labels.tolist() == [True, False, False, True]
    assert [atoms.info["is_metal"] for atoms in found.structures] == [1, 0, 0, 1]


def test_structures_with_ids_are_put_in_order(small: Task, tmp_path: Path) -> None:
    structures = [bulk("Cu") for _ in range(10)]
    for i, atoms in enumerate(structures):
        atoms.info |= {"mbid": small.ids[9 - i], "last_phdos_peak": float(i)}
    (tmp_path / "matbench_phonons").mkdir()
    write(tmp_path / "matbench_phonons" / "all.extxyz", structures)
    found = read_task(tmp_path / "matbench_phonons" / "all.extxyz")
    assert found.labels.tolist() == [float(9 - i) for i in range(10)]
    assert found.structures[0].info["last_phdos_peak"] == 9.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(9), "9 structures, but matbench_phonons has 10"),
        (table(10, index=["mb-phonons-01"] * 10), "10 structures have the mbid mb-phonons-01"),
        (table(10, index=[f"mb-phonons-{i}" for i in range(10, 20)]), "structure 1 has the mbid mb-phonons-11, which"),
        (table(10, peak=[1.0] * 10), "mb-phonons-01 has no number under 'last phdos peak'"),
        (table(10, **{"last phdos peak": [1.0] * 9 + [None]}), "mb-phonons-10 has no number"),
    ],
)
def test_data_that_cannot_give_the_folds_are_refused(
    small: Task, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_task(written(tmp_path / "matbench_phonons.json.gz", content))


def test_the_task_is_named_or_asked_for(small: Task, tmp_path: Path) -> None:
    path = written(tmp_path / "downloaded.json.gz", table(10))
    assert read_task(path, "phonons").task is small
    with pytest.raises(InputError, match="say which it is"):
        read_task(path)
    with pytest.raises(InputError, match="did you mean matbench_jdft2d"):
        read_task(path, "jdft")
    with pytest.raises(InputError, match="compositions without structures"):
        read_task(path, "steels")


# ----------------------------------------------------------------------------------------------------------- records


def test_a_record_has_the_keys_of_the_official_one(tmp_path: Path) -> None:
    record = Record("steels", some_labels(TASKS["matbench_steels"]))
    for fold, part in enumerate(record.folds):
        record.add(fold, record.labels[part.test] + 1, parameters={"lr": np.float32(0.5), "sizes": np.arange(2)})
    record.save(tmp_path / "results.json.gz", {"model": "none"})

    content = json.loads(gzip.decompress((tmp_path / "results.json.gz").read_bytes()))
    task = content["tasks"]["matbench_steels"]
    fold = task["results"]["fold_0"]
    assert set(content) == {
        "@module", "@class", "version", "tasks", "user_metadata", "benchmark_name", "datestamp", "hash",
    }  # fmt: skip
    assert (content["@module"], content["@class"]) == ("matbench.bench", "MatbenchBenchmark")
    assert (content["benchmark_name"], content["user_metadata"]) == ("matbench_v0.1", {"model": "none"})
    assert set(task) == {"@module", "@class", "benchmark_name", "dataset_name", "results"}
    assert list(task["results"]) == [f"fold_{i}" for i in range(5)]
    assert set(fold) == {"data", "parameters", "scores", "uncertainty"}
    assert set(fold["scores"]) == {"mae", "rmse", "mape", "max_error"}
    assert fold["parameters"] == {"lr": 0.5, "sizes": [0, 1]}
    assert fold["uncertainty"] is None
    assert list(fold["data"]) == [record.ids[i] for i in record.folds[0].test]
    assert all(type(value) is float for value in [*fold["data"].values(), *fold["scores"].values()])


def test_the_hash_is_that_of_the_official_package() -> None:
    content = {"b": {"z": [1.0, True, None], "a": "å"}, "a": 2}
    expected = "1dbd706fa57d9e41c6f8f0b0b0eb29b32f83c3809b05369c02c66b5159fbcedd"  # matbench 0.6, hash_dictionary
    assert matbench.digest({**content, "hash": "x"}) == expected


def test_a_saved_record_keeps_its_hash(tmp_path: Path) -> None:
    matbench.save(tmp_path / "r.json", full_record(TASKS["matbench_steels"]), full_record(TASKS["matbench_glass"]))
    content = json.loads((tmp_path / "r.json").read_text())
    assert set(content["tasks"]) == {"matbench_steels", "matbench_glass"}
    assert content["hash"] == matbench.digest(content)


def test_scores_of_regression() -> None:
    scores = matbench._regression_scores(np.array([1.0, 100, 1000, 0, 1e-8]), np.array([0.9, 81, 1010, 1, 0.0028933]))
    assert scores["mape"] == pytest.approx(0.1)  # labels that are nearly zero do not count
    assert scores["max_error"] == 19
    assert scores["mae"] == pytest.approx(6.02057866)
    assert scores["rmse"] == pytest.approx(np.sqrt((0.01 + 361 + 100 + 1 + 0.0028933**2) / 5))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_scores_of_classes_are_those_of_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    true, predicted = np.array(pairs).T
    if true.all() or not true.any():
        return
    scores = matbench._class_scores(true, predicted)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    assert scores["f1"] == pytest.approx(metrics.f1_score(true, predicted, zero_division=0))
    assert scores["rocauc"] == pytest.approx(metrics.roc_auc_score(true, predicted))


def test_perfect_predictions_score_perfectly() -> None:
    assert full_record(PHONONS).scores["mae"] == {"mean": 0.0, "max": 0.0, "min": 0.0, "std": 0.0}
    probable = full_record(TASKS["matbench_glass"], lambda labels: np.where(labels, 0.7, 0.4))
    assert probable.scores["rocauc"]["mean"] == probable.scores["f1"]["min"] == 1.0


def test_ids_and_order_give_the_same_record() -> None:
    by_order, by_id = Record(PHONONS, some_labels(PHONONS)), Record(PHONONS, some_labels(PHONONS))
    test = by_id.folds[2].test
    values = np.random.default_rng(1).normal(size=len(test))
    by_order.add(2, values, uncertainty=np.full(len(test), 2.0))
    by_id.add(
        2, {by_id.ids[i]: v for i, v in reversed([*zip(test, values, strict=True)])}, uncertainty=[2.0] * len(test)
    )
    assert by_order.results == by_id.results
    first = by_order.results[2]["uncertainty"][by_order.ids[test[0]]]
    assert first == {
        "ci_lower": pytest.approx(values[0] - 3.92, abs=1e-3),
        "ci_upper": pytest.approx(values[0] + 3.92, abs=1e-3),
        "std": 2.0,
    }


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    record = Record(PHONONS, some_labels(PHONONS))
    glass = Record("glass", some_labels(TASKS["matbench_glass"]))
    names = [record.ids[i] for i in record.folds[0].test]
    right = dict.fromkeys(names, 1.0)
    record.add(1, np.zeros(len(record.folds[1].test)))
    attempts: dict[str, Callable[[], Any]] = {
        "numbered 0 to 4": lambda: record.add(5, right),
        "fold 1 of matbench_phonons is recorded already": lambda: record.add(1, right),
        r"mb-phonons-9999 \(1 in all\) is not in the test part": lambda: record.add(
            0, right | {"mb-phonons-9999": 1.0}
        ),
        rf"{names[0]} \(1 in all\) is missing": lambda: record.add(0, {name: 1.0 for name in names[1:]}),
        rf"predictions: {names[1]} is not a finite": lambda: record.add(0, right | {names[1]: np.nan}),
        "give one number for each": lambda: record.add(0, [1.0, 2.0]),
        "are no numbers": lambda: record.add(0, dict.fromkeys(names, "x")),
        "cannot be written as JSON": lambda: record.add(0, right, parameters={"model": object()}),
        "cannot be negative": lambda: record.add(0, right, uncertainty=[-1.0] * len(names)),
        "uncertainties of shape": lambda: record.add(0, right, uncertainty=[1.0]),
        "probability between 0 and 1": lambda: glass.add(0, np.full(len(glass.folds[0].test), 1.5)),
        "no uncertainty for classes": lambda: glass.add(0, glass.labels[glass.folds[0].test], uncertainty=[0.1]),
        "fold 0, 2, 3, 4 not recorded": lambda: record.save(tmp_path / "r.json"),
        "no fold of matbench_glass": lambda: glass.scores,
        "no records": lambda: matbench.save(tmp_path / "r.json"),
        "there are 1265 samples": lambda: Record(PHONONS, [1.0]),
        "finite number": lambda: Record(PHONONS, np.full(1265, np.nan)),
        "samples of both classes": lambda: Record("glass", np.ones(5680)),
        "depend on the labels of all 5680": lambda: folds("glass"),
        "cannot be divided": lambda: folds(4),
    }
    for message, attempt in attempts.items():
        with pytest.raises(InputError, match=message):
            attempt()
    assert list(record.results) == [1]
    assert not (tmp_path / "r.json").exists()


# ------------------------------------------------------------------------------------------------------- public data


@pytest.mark.parametrize("name", ["matbench_phonons", "matbench_jdft2d"])
def test_folds_are_those_of_published_results(public_data: Path, name: str) -> None:
    task, structures, labels = read_task(public_data / name)
    published = [atoms.info["test_fold"] for atoms in structures]
    assert numbers(folds(task), task.size).tolist() == published
    assert isinstance(structures[0], Atoms)

    dummy = Record(task, labels)
    for fold, (train, test) in enumerate(dummy.folds):
        dummy.add(fold, np.full(len(test), labels[train].mean()))
    listed = {"matbench_phonons": (323.9822, 17.7269), "matbench_jdft2d": (67.2851, 10.1832)}
    assert dummy.scores["mae"]["mean"] == pytest.approx(listed[name][0], abs=1e-3)
    assert dummy.scores["mae"]["std"] == pytest.approx(listed[name][1], abs=1e-3)
