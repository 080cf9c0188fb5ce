"""The page of one run: what was trained on what, how well it does, and everything needed to do it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase.data import atomic_numbers

from ..align import not_told_apart, reference_shifts, residual, shifts_in_words
from ..console import and_
from ..data.labels import Label, Labels
from ..data.split import Split
from ..errors import InputError
from ..evaluate import PRINTED, printable
from ..model import Model, load
from ..train import read_metrics
from ..transfer.probe import told_of_probe
from ..transfer.replay import forgetting, told_of_ledger
from ..unseen import unseen_in_words
from .figures import loss_curves, parity
from .page import Page
from .structures import Column, parity_columns

MOST_ROWS = 2_000  # of metrics that the page carries; metrics.csv has them all
VERBS = {"pretrain": "trained from scratch", "finetune": "fine-tuned"}
TITLES = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}

Content = Mapping[str, Any]


def run_report(out: str | Path, *, viewer: bool = False) -> Path:
    """Write report.html, and report.json with its numbers, into the folder of a finished run.

    Args:
        viewer: also show the validation structures beside their parity plot. The page then holds their geometries,
            is at least 1.3 MB large and runs scripts; the package chemiscope must be installed.

    Raises:
        InputError: when `out` is not the folder of a run, the run has not finished, or it kept no structures to show.
    """
    out = Path(out)
    config = _read(out / "config.json", "a run of transfermium")
    if not (out / "model.safetensors").exists():
        raise InputError(f"{out} has no model.safetensors, so the run has not finished: give the same command again")
    model = load(out / "model.safetensors")
    labels = Labels.from_json(_read(out / "labels.json", "a run of transfermium"))
    split = Split.load(out / "split.json")
    metrics = read_metrics(out)
    validation = _read(out / "validation.json") if (out / "validation.json").exists() else {}
    card = model.card
    stage = card["history"][-1]
    names = _names(model)
    errors = {names.get(name, name): found for name, found in validation.get("errors", {}).items()}
    points = {names.get(name, name): found for name, found in validation.get("parity", {}).items()}
    told = any("loss" not in found for found in errors.values())  # losses alone say less than names of outputs
    meant = [name.removesuffix(" per atom") for name in errors if told] or [entry.quantity for entry in labels.entries]
    learned = and_(meant or list(names.values())[:-1])
    backbone = type(model.backbone).__name__
    page = Page(
        f"{TITLES.get(stage['verb'], stage['verb'])} of {backbone} on {learned}",
        f"Run “{out.resolve().name}” · {stage['date']} · transfermium {stage['transfermium']}",
    )
    page.verdict(_result(errors, stage))
    page.text(_story(model, stage, learned))
    if stage["steps"] and any(row.get("valid") is not None for row in metrics) and _best_step(metrics) == 0:
        start = "aligned base" if stage["verb"] == "finetune" else "untrained start"
        page.text(
            f"No step had a lower validation loss than the {start}, which is therefore what the model file holds: "
            "train for longer, lower the learning rate, or give more labels."
        )

    _show_errors(page, errors, points, stage)
    if viewer and validation:
        _show_structures(page, out, validation.get("structures"), names)
    if stage["steps"]:
        _show_training(page, metrics)
    _show_data(page, labels, split, card, stage)
    if stage["verb"] == "finetune":
        _show_alignment(page, stage["alignment"])
        _show_strategy(page, stage)
    page.heading("History of the model").table(
        [_stage_row(number, past) for number, past in enumerate(card["history"], 1)],
        "Stages of training, oldest first.",
        notes="Data is a fingerprint of geometries and labels; two stages with the same one saw the same data.",
    )
    _show_elements(page, card, errors)
    asked = {name: value for name, value in config.items() if name != "labels"}
    page.heading("Settings").details("As the run was asked for", _as_text(asked))
    page.details("Architecture", _as_text(model.architecture()))

    every = max(1, -(-len(metrics) // MOST_ROWS))
    page.numbers(
        {
            "config": asked,
            "labels": labels.to_json()["labels"],
            "split": {**_sizes(split, stage), "by": split.by, "reason": split.reason},
            "errors": validation.get("errors", {}),
            "parity": validation.get("parity", {}),
            **({"structures": validation["structures"]} if viewer and validation else {}),
            "metrics": {"every": every, "rows": [r for i, r in enumerate(metrics) if i % every == 0 or "valid" in r]},
            "parameters": _parameters(model),
            "card": {name: value for name, value in card.items() if name != "labels"},
        }
    )
    return page.write(out / "report.html")


def _result(errors: Content, stage: Content) -> str:
    """Errors in a sentence, and losses in another."""
    said: dict[str, list[str]] = {"Mean absolute error": [], "Accuracy": [], "Loss": []}
    for name, found in errors.items():
        unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0))
        if "mae" in found:
            shown = _power(unit) or "(no unit declared)"
            error = f"{name.removesuffix(' per atom')} {found['mae'] * factor:.4g} {shown}"
            said["Mean absolute error"].append(error)
        elif "accuracy" in found:
            said["Accuracy"].append(f"{name} {100 * found['accuracy']:.1f} %")
        elif "loss" in found:
            floor = f" (floor {found['floor']:.3f})" if "floor" in found else ""
            said["Loss"].append(f"{name} {found['loss']:.3f} {unit}".rstrip() + floor)
    if not any(said.values()):
        return f"Trained on {_count(stage['structures'], 'structure')}; nothing was validated, so no error is known."
    where = f"on {_count(stage['validation structures'], 'validation structure')}"
    return " ".join(f"{what} {where}: {', '.join(some)}." for what, some in said.items() if some)


def _story(model: Model, stage: Content, learned: str) -> str:
    """What was trained on what."""
    history = model.card["history"]
    size = f"{_parameters(model):,} parameters"
    took = f" in {_duration(stage['seconds'])}" if stage.get("seconds") else ""
    trained = (
        f"{learned} of {_count(stage['structures'], 'structure')} "
        f"({_count(stage['steps'], 'optimiser step')}{took}, objective {stage['objective']['class']})"
    )
    levels = model.card.get("levels", {})
    theory = f" Level of theory: {and_([f'{name} ({n:,})' for name, n in levels.items()])}." if levels else ""
    name = type(model.backbone).__name__
    if stage["verb"] != "finetune" or len(history) < 2:
        return f"A {name} with {size} was {VERBS.get(stage['verb'], stage['verb'])} on {trained}.{theory}"
    before = and_([f"{_objective(s)} on {_count(s.get('structures', 0), 'structure')}" for s in history[:-1]])
    return f"A {name} with {size}, trained before by {before}, was fine-tuned on {trained}.{theory}"


def _show_errors(page: Page, errors: Content, points: Content, stage: Content) -> None:
    page.heading("Errors")
    if not errors:
        page.text(
            "Nothing was validated in this run. “transfermium evaluate” measures the model on structures with labels."
        )
        return
    notes = [
        "The validation structures chose the checkpoint, so an error on new structures is likely somewhat larger: "
        "measure it with “transfermium evaluate” on structures that no stage has seen."
        if stage["steps"]
        else "The validation structures had no part in the model, as no step was done."
    ]
    poor = [name for name, found in errors.items() if found.get("r2", 0.0) < 0]
    if poor:
        notes.append(f"R² is below zero for {and_(poor)}: the mean of the labels would be a better prediction.")
    rows = [
        {**{column.replace("R2", "R²"): cell for column, cell in row.items()}, "quantity": name}
        for name, row in zip(errors, printable(errors), strict=True)
    ]
    page.table(rows, "Errors on the validation structures.", notes=notes)
    for name, found in points.items():
        shown, total = len(found["label"]), errors.get(name, {}).get("n", 0)
        some = f", {shown:,} evenly spaced components" if shown >= 2_000 else ""
        page.figure(
            parity(found, name, errors.get(name) if "mae" in errors.get(name, {}) else None),
            f"Predicted against labelled {name}{f' ({total:,} labels{some})' if total else ''}. "
            "The dashed line is where both are equal.",
        )


def _show_structures(page: Page, out: Path, kept: Content | None, names: Mapping[str, str]) -> None:
    file = out / "validation.extxyz"
    if kept is None or not file.exists():
        raise InputError(f"{out} has no {file.name}: it was made by an older version, so give no viewer")
    structures = list(ase.io.iread(file, format="extxyz"))
    columns: dict[str, Column] = {}
    compared, spreads = [], []
    for name, found in kept["known"].items():
        quantity = names.get(name, name)
        if "rmse" in found:
            unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0))
            values = np.array(found["rmse"], float) * factor
            spreads.append(f"{quantity}, RMSE")
            columns[spreads[-1]] = Column(values.tolist(), unit)
        else:
            compared.append(quantity)
            columns |= parity_columns(quantity, found["label"], found["prediction"], found["unit"])
    if not columns:
        return
    columns["atoms"] = Column([len(atoms) for atoms in structures])
    columns["validation structure"] = Column(kept["index"])
    columns["formula"] = Column([str(atoms.symbols) for atoms in structures])
    some = "" if len(structures) == kept["of"] else f" ({len(structures):,} of {kept['of']:,} are kept, evenly spaced)"
    if compared:
        x, y = (f"{compared[0]}, {what}" for what in ("label", "prediction"))
        colour = spreads[0] if spreads else f"{compared[0]}, absolute error"
        text = f"Predicted against labelled {compared[0]} of each validation structure{some}; the colour is {colour}"
    else:
        x, y, colour = "atoms", spreads[0], spreads[0]
        text = f"{y}, of each validation structure{some}, against its number of atoms"
    page.structures(structures, columns, text, x=x, y=y, colour=colour, parity=bool(compared))


def _show_training(page: Page, metrics: Sequence[Content]) -> None:
    page.heading("Training")
    if not metrics:
        page.text("No metrics are kept in this folder.")
        return
    checked = any(row.get("valid") is not None for row in metrics)
    best = (
        f" The validation loss is that of the averaged weights, all terms summed; the ring marks the best, at step "
        f"{_best_step(metrics):,}, whose weights were kept."
        if checked
        else " The last averaged weights were kept."
    )
    page.figure(loss_curves(metrics), f"Weighted mean error of each term in the training batches.{best}")
    for row in metrics:
        if row.get("went back"):
            page.text(
                f"The loss was not finite at step {row['step']:,}: training went back to the last good weights, and on "
                "with a quarter of the learning rate. A lower lr might do better from the start."
            )
    page.text("Every step is in metrics.csv beside this page.")


def _show_data(page: Page, labels: Labels, split: Split, card: Content, stage: Content) -> None:
    page.heading("Data")
    sizes = _sizes(split, stage)
    ways = ("trained the model", "chose the checkpoint") if stage["steps"] else ("were fitted", "validated the fit")
    parts = f"{sizes['train']:,} structures {ways[0]} and {sizes['valid']:,} {ways[1]}"
    test = f"; {sizes['test']:,} more are set apart for a test" if sizes["test"] else ""
    page.text(f"{parts}{test}. Split: {split.reason or split.by}. Its indices are in split.json beside this page.")
    if labels.entries:
        page.table([label_row(entry) for entry in labels.entries], "Labels, where they were found and their range.")
    else:
        page.text("This objective needs no labels.")
    seen = sorted(card.get("elements", {}).items(), key=lambda item: (-item[1], item[0]))
    if seen:
        most = ", ".join(f"{symbol} ({n:,})" for symbol, n in seen[:6])
        page.text(
            f"{_count(len(seen), 'element')} seen in training, all stages together; by number of atoms: "
            f"{most}{' and others' if len(seen) > 6 else ''}."
        )


def _show_alignment(page: Page, report: Content) -> None:
    page.heading("Alignment with the base")
    kept = report.get("kept heads", [])
    if "probe" in report:
        page.text(f"Nothing was trained. {_sentence(told_of_probe(report))}")
        if "residual" not in report:
            return
    page.text(f"Heads kept from the base: {and_(kept)}." if kept else "No head was kept: all outputs are new.")
    for name, factor in report.get("scale", {}).items():
        page.text(f"The scale of {name} was fitted to the new labels (× {factor:.3g}), before the first step.")
    for name, shift in report.get("shift", {}).items():
        page.text(
            f"Predictions of {name} were shifted by {shift:+.4g}{shifts_in_words(report, name)}, before the first step."
        )
    every = reference_shifts(report)
    for of, shifts in every.items():
        low, high = min(shifts, key=shifts.__getitem__), max(shifts, key=shifts.__getitem__)
        between = f"between {shifts[low]:+.3f} ({low}) and {shifts[high]:+.3f} eV ({high})"
        page.text(
            f"Reference energies{of} were fitted again before the first step and moved by "
            f"{between if low != high else f'{shifts[low]:+.3f} eV ({low})'} per atom. Compositions tell "
            f"{report[f'elements told apart{of}']} elements apart: where they do not, only sums of shifts have a "
            "meaning."
        )
        if together := report.get(f"not told apart{of}"):
            page.text(_sentence(not_told_apart(together)))
    for name, found in report.get("residual", {}).items():
        page.text(_sentence(residual(name, found)))
    for words in unseen_in_words(report):
        page.text(_sentence(words))
    if kept and not every and not report.get("shift"):
        page.text("No reference was fitted again.")


def _show_strategy(page: Page, stage: Content) -> None:
    """What LoRA trained, what was replayed, and what the base forgot."""
    if lora := stage.get("lora"):
        page.heading("Low-rank updates").text(
            f"The backbone was frozen but for updates of rank {lora['rank']}: {lora['trained numbers']:,} numbers were "
            f"trained in place of {lora['numbers']:,}, and merged into its weights."
        )
    if replay := stage.get("replay"):
        labels = "the base itself" if replay["labels"] == "base" else "their data"
        page.heading("Replay").text(
            f"The base's own task was learned beside the new one, with weight {replay['weight']:g}, on "
            f"{_count(replay['structures'], 'structure')} ({replay['from']}) labelled by {labels}."
        )
    if entry := stage.get("forgetting"):
        page.heading("What the base forgot").table(
            [{**row, "unit": _power(row["unit"])} for row in forgetting(entry)],
            f"{told_of_ledger(entry)}, before and after this stage; with the base's own references and units, so that "
            "no alignment counts as forgetting.",
        )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _show_elements(page: Page, card: Content, errors: Content) -> None:
    references = card.get("references (eV)", {})
    alignment = card["history"][-1]["alignment"]
    shifts, labelled = alignment.get("reference shift (eV)", {}), alignment.get("labels per element", {})
    rows = []
    for symbol, n in sorted(card.get("elements", {}).items(), key=lambda item: atomic_numbers.get(item[0], 0)):
        row = {"element": symbol, "atoms in training": n}
        if len(card["history"]) > 1:
            row["in last stage"] = symbol in card.get("elements in last stage", [])
        if symbol in references:
            row["reference (eV)"] = f"{references[symbol]:.3f}"
        if symbol in shifts:
            row["shift (eV)"] = f"{shifts[symbol]:+.3f}"
            row["energy labels"] = labelled.get(symbol, 0)
        for name, found in errors.items():
            if "loss" in found:
                continue
            unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0))
            error = found.get("per_element", {}).get(symbol)
            row[f"MAE {name} ({unit})" if unit else f"MAE {name}"] = None if error is None else error * factor
        rows.append(row)
    page.heading("Element by element").table(
        rows,
        "Atoms seen and, where there are any, reference energies and mean absolute errors on validation structures.",
        notes="Errors of what each atom has are those on atoms of the element; others are those of structures that "
        "contain it."
        if errors
        else None,
    )


def label_row(entry: Label) -> dict[str, Any]:
    if entry.classes:
        more = ", …" if len(entry.classes) > 6 else ""
        spread = f"{len(entry.classes)} classes: {', '.join(entry.classes[:6])}{more}"
    elif entry.minimum is None or entry.maximum is None:
        spread = ""
    else:
        spread = f"{entry.minimum:.5g} … {entry.maximum:.5g}"
    converted = entry.given_unit not in (None, entry.unit)
    return {
        "quantity": entry.quantity,
        "key": ", ".join(f"{key} ({place})" for place, key, _ in entry.keys),
        "per": entry.per,
        "unit": _power(f"{entry.given_unit} → {entry.unit}" if converted else entry.unit),
        "structures": f"{entry.count:,} of {entry.total:,}",
        "range": spread,
        "RMS": entry.rms,
        **({"also found": ", ".join(entry.also_found)} if entry.also_found else {}),
    }


def _stage_row(number: int, stage: Content) -> dict[str, Any]:
    best = stage.get("best validation loss")
    return {
        "stage": str(number),
        "verb": stage.get("verb", ""),
        "objective": _objective(stage),
        "structures": stage.get("structures", ""),
        "validation": stage.get("validation structures", ""),
        "steps": stage.get("steps", ""),
        "time": _duration(stage["seconds"]) if stage.get("seconds") else "",
        "best loss": "" if best is None else f"{best:.4g}",
        "data": stage.get("data", ""),
        "date": stage.get("date", ""),
        "version": stage.get("transfermium", ""),
    }


def _objective(stage: Content) -> str:
    """Of a stage, also one of a base that says nothing of it."""
    return str(stage.get("objective", {}).get("class", "an unknown objective"))


def _sizes(split: Split, stage: Content) -> dict[str, int]:
    """Numbers of structures; validation structures that were given are in no split."""
    test = 0 if split.test is None else len(split.test)
    return {"train": stage["structures"], "valid": stage["validation structures"], "test": test}


def _best_step(metrics: Sequence[Content]) -> int:
    return int(min((row["valid"], row["step"]) for row in metrics if row.get("valid") is not None)[1])


def _names(model: Model) -> dict[str, str]:
    """What to call the outputs: forces of a denoising model are displacements."""
    names = {name: meaning for name, (meaning, _) in model.card.get("quantities", {}).items()}
    return {**names, "energy_per_atom": f"{names.get('energy', 'energy')} per atom"}


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def _power(unit: str) -> str:
    return unit.replace("^2", "²").replace("^3", "³")


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _as_text(content: Any, indent: str = "") -> str:
    """Nested settings as indented lines, for people."""
    lines = []
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", _as_text(value, indent + "  ")]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{indent}{name}: {text}")
    return "\n".join(lines)


def _read(path: Path, what: str = "") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path.parent} is not {what}: it has no readable {path.name}") from None
    except ValueError:
        raise InputError(f"{path} is not complete JSON: delete it and give the command of the run again") from None
