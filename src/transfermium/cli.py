"""The verbs as a command line; no logic of its own."""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from rich.text import Text

from . import __version__, distributed
from .backbones import Backbone, TensorNet
from .console import console, results, table, track, visible
from .data.labels import KEYS
from .errors import InputError
from .model import asked, subclasses
from .objectives import Objective, Property
from .objectives.together import Parts
from .run import plain
from .train import TrainConfig

Arguments = dict[str, Any]
ONE_SOURCE = (
    "evaluate",
    "predict",
    "features",
    "pack",
    "doctor",
    "relax",
)  # verbs that read structures of `data` alone
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, or what one file may have


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; exits with 0, or with 2 and one sentence when the input cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    files: Sequence[str] = []
    try:
        _end_in_order()
        if not _takes_part(next(iter(argv), "")):
            return
        _import_what_is_typed(argv)
        arguments = _parsed(_spelled(argv))
        verb = arguments["verb"]
        values = arguments[verb].as_dict()
        values.pop("config", None)
        values.pop("debug", None)
        _check_teacher(values.get("teacher"), argv)
        files = values.get("data") or [] if verb in ONE_SOURCE else []
        VERBS[verb](values)
    except Misuse as error:
        _trace(argv)
        _fail(_readable(str(error), _options(next(iter(argv), "")), argv))
    except InputError as error:
        _trace(argv)
        _fail(f"{files[0]}: {error}" if len(files) == 1 and re.match(r"structure \d", str(error)) else str(error))
    except ValueError as error:
        if not isinstance(error.__cause__, InputError):  # raised by a constructor, wrapped by jsonargparse
            raise
        _trace(argv)
        _fail(str(error.__cause__))
    except KeyboardInterrupt as error:
        ended = error.args[:1] == (signal.SIGTERM,)
        _fail("interrupted: the same command goes on where it was last saved", 143 if ended else 130)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        _fail(
            "a process that prepares batches died (killed, or out of memory): the same command goes on where it was "
            "last saved, with fewer --workers if memory is short"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _trace(argv)
        again = ": make room, and the same command goes on where it was last saved" if error.errno in FULL else ""
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}{again}")


def demo(arguments: Arguments) -> None:
    """Transfer from PBE to r2SCAN on the crystals that come with the package, in minutes."""
    from .study.demo import demo as run

    run(**arguments)


def pretrain(arguments: Arguments) -> None:
    """Train a new model on any objective."""
    from .transfer import pretrain as run

    _check_out("pretrain", arguments)
    arguments["backbone"] = arguments["backbone"] or TensorNet()
    viewer = _viewer(arguments)
    _show_configuration("pretrain", arguments, run)
    run(
        _by_part(arguments.pop("data"), arguments["objective"]),
        **_with_pairs(_valid_by_part(arguments), TRAINING_PAIRS),
    )
    _report(arguments, viewer)


def finetune(arguments: Arguments) -> None:
    """Train a copy of a model on new labels."""
    from .transfer import finetune as run

    _check_out("finetune", arguments)
    viewer = _viewer(arguments)
    _show_configuration("finetune", arguments, run)
    data = _by_part(arguments.pop("data"), arguments["objective"])
    run(arguments.pop("base"), data, **_with_pairs(_valid_by_part(arguments), TRAINING_PAIRS))
    _report(arguments, viewer)


def evaluate(arguments: Arguments) -> None:
    """Errors of a model, in physical units."""
    from .evaluate import evaluate as run
    from .evaluate import printable, printable_elements

    as_json = arguments.pop("json")
    result = run(arguments.pop("model"), arguments.pop("data"), verbose=not as_json, **_with_pairs(arguments))
    if distributed.rank() > 0:
        return
    if as_json:
        _print_json(result)
        return
    results.print(table(f"Errors on {result['n']} structures", printable(result)))
    if rows := printable_elements(result):
        results.print(table("Mean absolute error by element", rows))


def predict(arguments: Arguments) -> None:
    """Predictions for structures, as extended XYZ or CSV."""
    from .evaluate import predict as run

    out = arguments["out"]
    results = run(arguments.pop("model"), arguments.pop("data"), **_with_pairs(arguments))
    console.print(f"{len(results)} structures written to {out}")


def features(arguments: Arguments) -> None:
    """What a model sees in structures, as a table for other tools."""
    from .features import features as run

    out = arguments["out"]
    table = run(arguments.pop("model"), arguments.pop("data"), **arguments)
    console.print(f"{len(table.values)} rows of {len(table.names)} features written to {out}")


def suggest(arguments: Arguments) -> None:
    """Which structures of a pool to label next: a batch of those that would teach most."""
    from .suggest import printable
    from .suggest import suggest as run

    as_json, out = arguments.pop("json"), arguments["out"]
    chosen = run(arguments.pop("model"), arguments.pop("data"), verbose=not as_json, **arguments)
    if distributed.rank() > 0:
        return
    if as_json:
        _print_json([atoms.info for atoms in chosen])
        return
    results.print(table("To label next, in this order", printable(chosen)))
    console.print(f"{len(chosen)} structures written to {out}", markup=False, soft_wrap=True)


def info(arguments: Arguments) -> None:
    """What is known of a model: architecture, labels, elements, history."""
    from .model import load

    model = load(arguments["model"])
    card = {
        "file": str(arguments["model"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        **model.architecture(),
        **model.card,
    }
    if arguments["json"]:
        _print_json(card)
        return
    print(_yaml(card), end="")


def pack(arguments: Arguments) -> None:
    """Structures and labels as one folder of Arrow files, for random access out of core."""
    from .data import pack as run
    from .data import resolve, stream

    arguments = _with_pairs(arguments, TRAINING_PAIRS)
    data, label, unit, labels = arguments["data"], arguments["label"], arguments["unit"], None
    if label or unit:
        structures = track(stream(data), "looking for labels")
        labels = resolve(structures, [*label, *unit], labels=label, units=unit)
        console.print(labels.table())
    packed = run(data, arguments["out"], labels=labels, level=arguments["level"], provenance=arguments["provenance"])
    levels = ", ".join(f"{n} {level}" for level, n in packed.levels.items() if level)
    console.print(f"{len(packed)} structures packed into {arguments['out']}{f' ({levels})' if levels else ''}")


def leaks(arguments: Arguments) -> None:
    """Structures that a test set has too, or that belong to a material of it."""
    from .data import leaks as run
    from .data import read
    from .data.leakage import summary

    structures, held_out = read(arguments["data"]), read(arguments["held_out"])
    found = run(structures, held_out, tolerance=arguments["tolerance"])
    if arguments["json"]:
        _print_json({"structures": len(structures), "leaks": [vars(leak) for leak in found]})
        return
    for leak in found:
        print(f"{leak.index}\t{leak.other}\t{visible(leak.why)}")
    console.print(summary(found, len(structures)))


def doctor(arguments: Arguments) -> None:
    """What is wrong with structures and labels, before any training; exits with 1 where there are errors."""
    from .doctor import doctor as run

    as_json = arguments.pop("json")
    data, base = arguments.pop("data"), arguments.pop("base")
    diagnosis = run(data, base, verbose=not as_json, **_with_pairs(arguments))
    if as_json:
        _print_json(diagnosis.to_json())
    if diagnosis.errors:  # which have been said
        sys.exit(1)


def bakeoff(arguments: Arguments) -> None:
    """Which pre-training helps: objectives at equal compute, with intervals."""
    from .study.bakeoff import Target
    from .study.bakeoff import bakeoff as run

    pairs = _with_pairs(arguments, ("label", "unit", "base_label", "base_unit"))
    objective, properties = pairs.pop("objective"), pairs.pop("property")
    if (objective is None) == (not properties):
        raise InputError("bakeoff needs --property NAME..., or else an --objective, to be learned from the target")
    goals = {name: Property(name) for name in properties or []} or {"target": objective}
    target, test = pairs.pop("target"), pairs.pop("test")
    own, cheap = {}, {}
    for option in ("label", "unit"):
        own[option], base = pairs.pop(option), pairs.pop(f"base_{option}")
        cheap[option] = {k: v for k, v in own[option].items() if k in KEYS} | base
        _check_names(option, own[option], [*KEYS, *(name for goal in goals.values() for name in goal.labels())])
        _check_names(f"base-{option}", base, list(KEYS))
    targets = {name: Target(target, goal, test, **_named_in(own, goal)) for name, goal in goals.items()}
    backbone = pairs.pop("backbone")
    backbones = None if backbone is None else {type(backbone).__name__: backbone}
    as_json = pairs.pop("json")
    data, out = pairs.pop("data"), pairs.pop("out")
    pairs |= {"rates": _numbers("rates", pairs["rates"], float), "sizes": _numbers("sizes", pairs["sizes"])}
    pairs |= {"arms": pairs["arms"] and _apart(pairs["arms"])}
    result = run(data, targets, out, backbones=backbones, quiet=as_json, **{**pairs, **cheap})
    if as_json:
        _print_json(result)


def curve(arguments: Arguments) -> None:
    """How many labels pre-training saves: errors against numbers of labels, with intervals."""
    from .study.curve import curve as run

    options = ("label", "unit", "provenance")
    pairs = _with_pairs(arguments, (*options, *(f"base_{option}" for option in options)))
    as_json = pairs.pop("json")
    pairs |= {name: _numbers(name, pairs[name]) for name in ("sizes", "base_sizes")}
    pairs |= {"rates": _numbers("rates", pairs["rates"], float)}
    pairs |= {"arms": pairs["arms"] and _apart(pairs["arms"])}
    result = run(pairs.pop("data"), pairs.pop("objective"), pairs.pop("out"), quiet=as_json, **pairs)
    if as_json:
        _print_json(result)


def md(arguments: Arguments) -> None:
    """Molecular dynamics with a model, with a page about it; exits with 1 where it did not hold together."""
    from .report.simulation import held_together, rows
    from .simulate import md as run

    as_json = arguments.pop("json")
    if not as_json:
        _show_configuration("md", arguments, run)
    model, structure, out = (arguments.pop(name) for name in ("model", "structure", "out"))
    result = run(model, structure, out, verbose=not as_json, **arguments)
    if as_json:
        _print_json(result)
    elif averages := rows(result):
        results.print(table("Averages, with 95 % intervals", averages))
    if not held_together(result):  # which has been said
        sys.exit(1)


def relax(arguments: Arguments) -> None:
    """Structures at the minimum of a model's energy."""
    from .simulate import relax as run

    as_json = arguments.pop("json")
    model, structures, out = (arguments.pop(name) for name in ("model", "data", "out"))
    relaxed = run(model, structures, out, verbose=not as_json, **arguments)
    if as_json:
        _print_json([atoms.info for atoms in relaxed])
    console.print(f"{len(relaxed)} structures written to {out}", markup=False, soft_wrap=True)
    if not all(atoms.info["relaxed"] for atoms in relaxed):  # which has been said
        sys.exit(1)


def _check_names(option: str, pairs: Mapping[str, str], wanted: Sequence[str]) -> None:
    if unknown := [name for name in pairs if name not in wanted]:
        known = ", ".join(dict.fromkeys(wanted))
        raise InputError(f"--{option} {unknown[0]}=... is of nothing that is learned here: name one of {known}")


def _named_in(named: Mapping[str, Mapping[str, str]], objective: Objective) -> dict[str, dict[str, str]]:
    wanted = objective.labels()
    return {option: {k: v for k, v in pairs.items() if k in wanted} for option, pairs in named.items()}


VERBS: dict[str, Callable[[Arguments], None]] = {
    verb.__name__: verb
    for verb in (
        *(demo, pretrain, finetune, evaluate, predict, features, suggest),
        *(info, pack, leaks, doctor, bakeoff, curve, md, relax),
    )
}


TRAINING_PAIRS = ("label", "unit", "provenance")  # options of the form NAME=VALUE
SHARED = ("pretrain", "finetune", "evaluate", "predict", "features", "suggest")  # that several processes work on


def _end_in_order() -> None:
    """Let SIGTERM end a process on its own like Ctrl-C, so that nothing is left behind; of several, at once."""
    if threading.current_thread() is threading.main_thread() and distributed.place() is None:
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(signal.SIGTERM)


def _takes_part(verb: str) -> bool:
    """Whether this process has something to do: under torchrun or srun, verbs that are not shared are run by one."""
    if verb in SHARED:
        distributed.join()
        return True
    here = distributed.place()
    if here is None:
        return True
    distributed.stay_alone()
    return here.rank == 0


class Misuse(InputError):
    """What jsonargparse says of a command line, before it is put into one sentence."""


class Parser(jsonargparse.ArgumentParser):
    """A parser that raises what is wrong, and takes options only by their whole names."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Misuse(message)


def _spelled(argv: Sequence[str]) -> list[str]:
    """The same arguments; an option may be spelled with - or _ between its words, and the base of a model as one."""
    known = {option.replace("_", "-"): option for option in _options(next(iter(argv), ""))}
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        words.append(known.get(option.replace("_", "-"), option) + equals + value if word.startswith("--") else word)
    if words[:1] == ["finetune"]:
        words = list(chain(*(word.split("=", 1) if word.startswith("--base=") else [word] for word in words)))
        if "--base" in words:
            at = words.index("--base")
            given = list(takewhile(lambda word: not word.startswith("--"), words[at + 1 :]))  # the base, and data
            if not (given and given[0]) or words.count("--base") > 1:
                raise InputError("--base needs one model: a file, a run folder, or small")
            words = [words[0], *given, *words[1:at], *words[at + 1 + len(given) :]]
    return words


def _parsed(argv: Sequence[str]) -> jsonargparse.Namespace:
    """Arguments with objects made of classes; options of a backbone that is not named are those of TensorNet.

    TensorNet is offered as default only then: jsonargparse would leave its arguments to the class that is named.
    """
    verb = next(iter(argv), "")
    try:
        parser = _parser(verb)
        return parser.instantiate(parser.parse_args(argv))
    except UnicodeDecodeError as error:
        raise InputError(f"{_config_of(argv)}: this is not text ({error}); save it as UTF-8") from error
    except Misuse:
        parser = _parser(verb, backbone={"class_path": "TensorNet"})
        return parser.instantiate(parser.parse_args(argv))


def _parser(verb: str, backbone: Arguments | None = None) -> Parser:
    """A parser for one verb, or for all of them, which takes longer to make."""
    parsers: dict[str, Callable[[], Parser]] = {
        "demo": _demo_parser,
        "pretrain": lambda: _training_parser(backbone=backbone),
        "finetune": lambda: _training_parser("base"),
        "evaluate": _evaluate_parser,
        "predict": _predict_parser,
        "features": _features_parser,
        "suggest": _suggest_parser,
        "info": _info_parser,
        "pack": _pack_parser,
        "leaks": _leaks_parser,
        "doctor": _doctor_parser,
        "bakeoff": lambda: _bakeoff_parser(backbone),
        "curve": lambda: _curve_parser(backbone),
        "md": _md_parser,
        "relax": _relax_parser,
    }
    parser = Parser(
        prog="transfermium", description="Pre-train on cheap data, transfer to few labels.", version=__version__
    )
    verbs = parser.add_subcommands(dest="verb", metavar="VERB")
    for name in [verb] if verb in parsers else parsers:
        own = parsers[name]()
        own.add_argument("--debug", action="store_true", help="on an error, show where in the code it came up")
        verbs.add_subcommand(name, own, help=VERBS[name].__doc__)
    return parser


def _training_parser(base: str | None = None, backbone: Arguments | None = None) -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    if base:
        parser.add_argument("base", type=str, help="model to start from: a file, a run folder or small; or as --base")
    parser.add_argument(
        "data", nargs="+", type=str, help="structures: files, folders, packed sets; for several parts also PART=FILE"
    )
    parser.add_subclass_arguments(Objective, "objective", required=True, help="what to learn")
    if base:
        _part_argument(parser)
        help = "full, lora, head, probe, aligned, zero-shot or replay: what changes; auto tries all but replay"
        parser.add_argument("--strategy", type=str, default="full", help=help)
        parser.add_argument("--rank", type=int, default=None, help="of the updates of lora, 8 by default")
        help = "structures with the base's own labels, to learn beside the new ones; or generated, of the new ones"
        parser.add_argument("--replay", nargs="+", type=str, default=None, help=help)
        help = "of the base's loss beside the new one, 1 by default"
        parser.add_argument("--replay-weight", type=float, default=None, help=help)
        parser.add_argument("--pseudo", action="store_true", help="let the base label the structures of --replay")
        help = "structures with the base's own labels, on which errors before and after tell what was forgotten"
        parser.add_argument("--ledger", nargs="+", type=str, default=None, help=help)
        parser.add_argument("--align", type=bool, default=True, help="fit reference energies to the new labels first")
        help = "energies of elements without new labels: refuse, isolated, group or keep"
        parser.add_argument("--unseen", type=str, default="refuse", help=help)
    else:
        help = "the architecture, TensorNet by default"
        parser.add_subclass_arguments(Backbone, "backbone", required=False, default=backbone, help=help)
    parser.add_argument("--out", type=str, default=None, help="run folder; the same command resumes")
    parser.add_argument("--valid", nargs="+", type=str, default=None, help="structures that choose the checkpoint")
    parser.add_argument("--valid-fraction", type=float, default=0.1, help="or this fraction of the data")
    parser.add_argument(
        "--split-by", type=str, default="auto", help="auto, random, composition, prototype, a key, or a split.json"
    )
    parser.add_argument(
        "--split-key", type=str, default=None, help="KEY with train, val and test, or KEY=VALUE of the test set"
    )
    _label_arguments(parser)
    _provenance_argument(parser)
    parser.add_argument("--level", type=str, default=None, help="use structures at this level of theory only")
    help = "let labels of several levels of theory share a head"
    parser.add_argument("--allow-mixed", action="store_true", help=help)
    help = "keep with the model how large its errors are, by its validation structures"
    parser.add_argument("--calibrate", type=bool, default=True, help=help)
    parser.add_argument(
        "--held-out", nargs="+", type=str, default=None, help="test structures: what matches them is not trained on"
    )
    help = "labels the structures first: MODULE:FUNCTION that makes an ASE calculator, or a model"
    parser.add_argument("--teacher", type=str, default=None, help=help)
    parser.add_argument("--teacher-skip", action="store_true", help="leave out structures on which the teacher fails")
    parser.add_argument("--teacher-overwrite", action="store_true", help="let it replace labels that structures have")
    parser.add_argument("--dry-run", action="store_true", help="only say what a run would take, and write nothing")
    help = "show validation structures in the report, which then is 1.3 MB larger"
    parser.add_argument("--viewer", action="store_true", help=help)
    parser.add_class_arguments(TrainConfig, None)
    return parser


def _evaluate_parser() -> Parser:
    parser = _model_parser()
    parser.add_argument("--split-key", type=str, default=None, help="only the test set: KEY, or KEY=VALUE, of training")
    _label_arguments(parser)
    help = "also say which share of labels lies within intervals of this probability, where the model knows its errors"
    parser.add_argument("--interval", type=float, default=None, help=help)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _predict_parser() -> Parser:
    parser = _model_parser()
    parser.add_argument("--out", type=str, required=True, help="an .extxyz or .csv file")
    _label_arguments(parser)
    help = "give energies also of structures with elements that no label had"
    parser.add_argument("--allow-unseen", action="store_true", help=help)
    help = "probability with which a label lies within its interval, where the model knows its errors"
    parser.add_argument("--interval", type=float, default=0.9, help=help)
    return parser


def _suggest_parser() -> Parser:
    parser = _model_parser(parts=False)
    parser.add_argument("--out", type=str, required=True, help="an .extxyz file for the chosen structures, in order")
    parser.add_argument("--n", type=int, default=50, help="how many structures to choose")
    help = "structures that have labels already, or will have"
    parser.add_argument("--labelled", nargs="+", type=str, default=None, help=help)
    help = "variance, of what remains unknown of the pool; k-center, of the features; or random"
    parser.add_argument("--method", type=str, default="variance", help=help)
    parser.add_argument("--seed", type=int, default=0, help="of random choice")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _features_parser() -> Parser:
    parser = _model_parser(parts=False)
    parser.add_argument("--out", type=str, required=True, help="a .parquet or .csv file")
    parser.add_argument("--per-atom", action="store_true", help="a row for each atom, not for each structure")
    return parser


def _model_parser(parts: bool = True) -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("model", type=str, help="model: a file, a run folder, or small, which ships with the package")
    parser.add_argument("data", nargs="+", type=str, help="structures: files, folders, packed sets")
    if parts:
        _part_argument(parser)
    parser.add_argument("--edges", type=int, default=10_000, help="most edges in a batch")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    return parser


def _info_parser() -> Parser:
    parser = Parser()
    parser.add_argument("model", type=str, help="model: a file, a run folder, or small, which ships with the package")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _pack_parser() -> Parser:
    parser = Parser()
    parser.add_argument("data", nargs="+", type=str, help="structures: files, folders, packed sets")
    parser.add_argument("--out", type=str, required=True, help="new folder")
    parser.add_argument("--level", type=str, default=None, help="level of theory of the labels, such as PBE")
    _provenance_argument(parser)
    _label_arguments(parser)
    return parser


def _leaks_parser() -> Parser:
    parser = Parser()
    parser.add_argument("data", nargs="+", type=str, help="structures to train on: files, folders, packed sets")
    parser.add_argument("--held-out", nargs="+", type=str, required=True, help="structures to test on")
    parser.add_argument("--tolerance", type=float, default=0.05, help="fraction by which distances may differ")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _doctor_parser() -> Parser:
    parser = Parser()
    parser.add_argument("data", nargs="+", type=str, help="structures: files, folders, packed sets")
    parser.add_argument("--base", type=str, default=None, help="model to fine-tune: a file, a run folder or small")
    help = "structures that the base was trained on, to look for test structures among them"
    parser.add_argument("--base-data", nargs="+", type=str, default=None, help=help)
    parser.add_argument("--held-out", nargs="+", type=str, default=None, help="test structures to look for in the data")
    parser.add_argument("--split-key", type=str, default=None, help="KEY that splits the data; else all that look so")
    _label_arguments(parser)
    help = "fraction of the sum of covalent radii below which atoms are too close"
    parser.add_argument("--shortest", type=float, default=0.5, help=help)
    parser.add_argument("--out", type=str, default=None, help="folder for doctor.html and doctor.json")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _bakeoff_parser(backbone: Arguments | None = None) -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("data", nargs="+", type=str, help="structures to pre-train on")
    parser.add_argument("--target", nargs="+", type=str, required=True, help="labelled structures to fine-tune on")
    parser.add_argument("--test", nargs="+", type=str, default=None, help="test structures; or a fifth of the target")
    parser.add_argument("--property", nargs="+", type=str, default=[], help="labels of the target, one study of each")
    parser.add_subclass_arguments(Objective, "objective", required=False, help="or what to learn of the target")
    help = "the architecture, a small TensorNet by default"
    parser.add_subclass_arguments(Backbone, "backbone", required=False, default=backbone, help=help)
    parser.add_argument("--out", type=str, required=True, help="folder of the study; the same command resumes")
    parser.add_argument("--arms", nargs="+", type=str, default=None, help="by default all that the labels allow")
    help = "of each pre-training: processor time, or operations such as 20TFLOP"
    parser.add_argument("--pretraining", type=str, default="5min", help=help)
    parser.add_argument("--tuning", type=str, default="1min", help="of each fine-tuning, likewise")
    help = "numbers of labels, 20,100 or 20 100; all up to 500 by default"
    parser.add_argument("--sizes", nargs="+", type=int | str, default=None, help=help)
    parser.add_argument("--seeds", type=int, default=3, help="of weights and labels")
    _label_arguments(parser, "base-", " of the structures to pre-train on, where it is another one")
    _study_arguments(parser)
    return parser


def _curve_parser(backbone: Arguments | None = None) -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("data", nargs="+", type=str, help="structures with the expensive labels")
    parser.add_subclass_arguments(Objective, "objective", required=True, help="what to learn of them")
    parser.add_argument("--base", type=str, default=None, help="pre-trained model: a file, a run folder or small")
    _part_argument(parser)
    parser.add_argument("--base-data", nargs="+", type=str, default=None, help="or structures to pre-train bases on")
    help = "what bases learn of them; as --objective by default"
    parser.add_subclass_arguments(Objective, "base_objective", required=False, help=help)
    help = "numbers of structures to pre-train on, for a curve over them too"
    parser.add_argument("--base-sizes", nargs="+", type=int | str, default=None, help=help)
    help = "the architecture of bases, a small TensorNet by default"
    parser.add_subclass_arguments(Backbone, "backbone", required=False, default=backbone, help=help)
    parser.add_argument("--out", type=str, required=True, help="folder of the study; the same command resumes")
    help = (
        "among scratch, scratch_long, zero-shot, aligned, probe, head, lora, full, replay, multi-fidelity, delta; "
        "by default scratch, aligned (where a base has the output), full, and delta where --cheap is given"
    )
    parser.add_argument("--arms", nargs="+", type=str, default=None, help=help)
    help = "a cheap label of the same property, for the arm delta and for baselines"
    parser.add_argument("--cheap", type=str, default=None, help=help)
    help = "numbers of labels, 5,10,20 or 5 10 20; doubled from ten on by default, or four of them where that is fewer"
    parser.add_argument("--sizes", nargs="+", type=int | str, default=None, help=help)
    parser.add_argument("--seeds", type=int, default=3, help="of labels, weights and bases")
    parser.add_argument("--test", nargs="+", type=str, default=None, help="test structures; or a fifth of the data")
    parser.add_argument("--split-key", type=str, default=None, help="or those that KEY names, or KEY=VALUE")
    help = "of each pre-training: processor time, operations such as 20TFLOP, or 800steps; 5min by default"
    parser.add_argument("--pretraining", type=str, default=None, help=help)
    parser.add_argument("--tuning", type=str, default=None, help="of each fine-tuning, likewise; 30s by default")
    help = "or the time of the whole study, such as 30min; the worse half of the arms is dropped after each seed"
    parser.add_argument("--budget", type=str, default=None, help=help)
    parser.add_argument("--target", type=str, default=None, help="an error to reach, such as 43meV/atom")
    help = "hours, or a time such as 90min, of one calculation"
    parser.add_argument("--cost-per-label", type=str, default=None, help=help)
    parser.add_argument("--margin", type=float, default=0.1, help="of exponents, below which slopes are equal")
    _label_arguments(parser, "base-", " of the base's structures")
    for of, use, said in (
        ("", "to train and to test on", "of the labels"),
        ("base-", "to pre-train on", "of the base's"),
    ):
        help = f"only take structures at this level of theory {use}"
        parser.add_argument(f"--{of}level", type=str, default=None, help=help)
        _provenance_argument(parser, of, said)
    parser.add_argument("--viewer", action="store_true", help="test structures beside the parity plot, in the report")
    _study_arguments(parser)
    return parser


def _study_arguments(parser: Parser) -> None:
    """What all studies take."""
    from .study.rates import RATES

    help = "learning rates that arms try, 2e-3,5e-4 or 2e-3 5e-4"
    parser.add_argument("--rates", nargs="+", type=float | str, default=list(RATES), help=help)
    parser.add_argument("--edges", type=int, default=5_000, help="most edges in a batch")
    parser.add_argument("--executor", type=str, default=None, help="address of a Dask scheduler; else local processes")
    parser.add_argument("--workers", type=int, default=None, help="cells at once")
    _label_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what the study would take")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _md_parser() -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("model", type=str, help="model: a file, a run folder, or small, which ships with the package")
    parser.add_argument("structure", type=str, help="a file; where it has momenta they are kept")
    parser.add_argument("--index", type=int, default=None, help="which structure of the file, -1 is the last")
    parser.add_argument("--out", type=str, required=True, help="folder; the same command goes on, a longer time too")
    parser.add_argument("--ensemble", type=str, default="nvt", help="nve, nvt or npt")
    parser.add_argument("--thermostat", type=str, default=None, help="of nvt: langevin, bussi or nose-hoover")
    parser.add_argument("--temperature", type=float, default=300.0, help="in K; of nve that of random momenta")
    parser.add_argument("--pressure", type=str, default=None, help="of npt, such as 1bar or 0.1GPa")
    parser.add_argument("--timestep", type=str, default="0.5fs", help="2fs where there is no hydrogen")
    parser.add_argument("--time", type=str, default="2ps", help="of the whole, or 1000steps")
    parser.add_argument("--every", type=str, default="10fs", help="between rows of log and trajectory")
    parser.add_argument("--tau", type=str, default=None, help="in which the thermostat acts, 100fs by default")
    parser.add_argument("--tau-pressure", type=str, default=None, help="in which the barostat acts, 1ps by default")
    parser.add_argument("--shape", action="store_true", help="of npt: the shape of the cell changes too, as in solids")
    parser.add_argument("--seed", type=int, default=0, help="of momenta and thermostat")
    parser.add_argument("--skip", type=str, default="0ps", help="left out of averages at the beginning")
    help = "frames of the same substance, to compare radial distribution functions with"
    parser.add_argument("--reference", nargs="+", type=str, default=None, help=help)
    parser.add_argument("--pairs", nargs="+", type=str, default=None, help="of elements to compare, such as O-O")
    parser.add_argument("--most-force", type=float, default=50.0, help="in eV/Å, beyond which it has exploded")
    _simulation_arguments(parser)
    return parser


def _relax_parser() -> Parser:
    parser = Parser()
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("model", type=str, help="model: a file, a run folder, or small, which ships with the package")
    parser.add_argument("data", nargs="+", type=str, help="structures: files, folders, packed sets")
    parser.add_argument("--out", type=str, required=True, help="an .extxyz file; the same command goes on")
    parser.add_argument("--fmax", type=float, default=0.05, help="in eV/Å, the largest force that is left")
    parser.add_argument("--cell", action="store_true", help="relax the cells too")
    parser.add_argument("--optimizer", type=str, default="FIRE", help="FIRE or LBFGS")
    parser.add_argument("--steps", type=int, default=500, help="of each structure, at most")
    parser.add_argument("--engine", type=str, default="ase", help="ase, or torch-sim (an extra): many at once")
    help = "of structures that move at once, with torch-sim; a GPU takes some 100000"
    parser.add_argument("--edges", type=int, default=10_000, help=help)
    _simulation_arguments(parser)
    return parser


def _simulation_arguments(parser: Parser) -> None:
    _part_argument(parser)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    parser.add_argument("--allow-unseen", action="store_true", help="also with elements that the model never saw")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _demo_parser() -> Parser:
    parser = Parser()
    parser.add_argument("--out", type=str, default="transfermium-demo", help="folder for models and report")
    return parser


def _part_argument(parser: Parser) -> None:
    parser.add_argument("--part", type=str, default=None, help="of a model of several objectives or levels: which one")


def _label_arguments(parser: Parser, of: str = "", said: str = "") -> None:
    for option, value, help in (("label", "KEY", "the key of a label"), ("unit", "UNIT", "the unit of a label")):
        parser.add_argument(
            f"--{of}{option}", nargs="+", type=str, action="extend", default=[], metavar=f"NAME={value}",
            help=help + said,
        )  # fmt: skip


def _provenance_argument(parser: Parser, of: str = "", said: str = "of the labels") -> None:
    help = f"what else is known {said}: functional, u, pseudopotentials, code, corrections"
    parser.add_argument(
        f"--{of}provenance", nargs="+", type=str, action="extend", default=[], metavar="NAME=TEXT", help=help
    )


def _by_part(sources: list[str], objective: Objective) -> list[str] | dict[str, list[str]]:
    """Sources as they are, or those of each part where they are given as PART=FILE."""
    parts = objective.parts if isinstance(objective, Parts) else {}
    named = [source.partition("=") for source in sources]
    if not parts or not any(name in parts for name, equals, _ in named if equals):
        return sources
    found: dict[str, list[str]] = {}
    for source, (name, equals, path) in zip(sources, named, strict=True):
        if not equals or name not in parts:
            raise InputError(f"'{source}' is for no part: give all structures as PART=FILE, of {', '.join(parts)}")
        found.setdefault(name, []).append(path)
    return found


def _valid_by_part(arguments: Arguments) -> Arguments:
    valid = arguments.get("valid")
    return {**arguments, "valid": _by_part(valid, arguments["objective"])} if valid else arguments


def _numbers(option: str, words: Sequence[Any] | None, kind: type[int | float] = int) -> list[int | float] | None:
    """Numbers, given as 5 10 20 or as 5,10,20."""
    if words is None:
        return None
    found = []
    for word in _apart(words):
        try:
            found.append(kind(word))
        except ValueError:
            wanted = "whole number: give them as 5,10,20" if kind is int else "number: give them as 2e-3,5e-4"
            raise InputError(f"--{option.replace('_', '-')} has '{word}', which is no {wanted}") from None
    return found


def _apart(words: Sequence[Any]) -> list[str]:
    """What is given as a b c or as a,b,c."""
    return [part for word in words for part in str(word).split(",") if part]


def _with_pairs(arguments: Arguments, options: Sequence[str] = ("label", "unit")) -> Arguments:
    """`NAME=KEY` options as mappings, and names as Python spells them."""
    for option in options:
        pairs = [text.partition("=") for text in arguments[option]]
        names = [name for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--{option} {twice[0]}=... is given twice: leave one")
        for name, equals, value in pairs:
            if not (name and equals and value):
                wanted = {"label": "KEY", "unit": "UNIT"}.get(option.rpartition("_")[2], "TEXT")
                raise InputError(f"--{option} {name}{equals}{value} is not NAME={wanted}")
        arguments[option] = {name: value for name, _, value in pairs}
    return arguments


def _check_out(verb: str, arguments: Arguments) -> None:
    if arguments["out"] is None and not arguments["dry_run"]:
        raise InputError(f"{verb} needs --out, or --dry-run")


def _viewer(arguments: Arguments) -> bool:
    """Whether the page shows structures; what that needs is looked for before the work."""
    viewer: bool = arguments.pop("viewer")
    if viewer:
        from .report import need_viewer

        need_viewer()
    return viewer


def _report(arguments: Arguments, viewer: bool) -> None:
    if arguments["dry_run"] or distributed.rank() > 0:
        return
    from .report import run_report

    out = Path(arguments["out"])
    report = run_report(out, viewer=viewer)
    console.print(f"Model: {out / 'model.safetensors'}\nReport: {report}", markup=False, soft_wrap=True)


def _show_configuration(verb: str, arguments: Arguments, run: Callable[..., Any]) -> None:
    """What was asked for beyond the defaults."""
    signatures = (inspect.signature(of) for of in (run, TrainConfig))
    usual = {name: one.default for signature in signatures for name, one in signature.parameters.items()}
    given = {name: value for name, value in arguments.items() if value not in (None, [], usual.get(name))}
    console.print(f"[bold]transfermium {verb}[/bold] (other options as usual; config.json has them all)")
    console.print(
        _yaml({name: _short(value) for name, value in given.items()}).rstrip(),
        style="dim",
        markup=False,
        soft_wrap=True,
    )


def _short(value: Any) -> Any:
    """An objective or backbone by its class and what is not usual of its arguments."""
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    if not isinstance(value, Objective | Backbone):
        return value
    arguments = {name: _short(given) for name, given in asked(value).items()}
    return {type(value).__name__: arguments} if arguments else type(value).__name__


def _yaml(content: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True, width=110)


def _readable(message: str, options: Sequence[str], argv: Sequence[str] = ()) -> str:
    """What jsonargparse says in one sentence, with the valid names nearest to an unknown one."""
    text = " ".join(message.split())
    if found := re.search(r"(?:Problems parsing|Unexpected) config: (.*)", text):
        cause = found[1].replace(' in "<unicode string>",', " in")
        cause = cause if len(cause) < 300 else f"{cause[:297]}..."
        return f"Problems parsing config {_config_of(argv)}: {cause}; write the options in it as YAML"
    keys = re.findall(r'Parser key "([\w.-]+)"', text)  # the outer first
    option = f"--{'.'.join(keys)}"
    bases: dict[str, type] = {"objective": Objective, "backbone": Backbone}
    classes = subclasses(bases[keys[0]]) if keys and keys[0] in bases else []

    if found := re.search(r"(?:nrecognized arguments:|does not accept option) '?([\w.-]+)", text):
        names = options if found[1].startswith("-") else [option.lstrip("-") for option in options]
        return f"there is no option {found[1]}{_nearest(found[1], names)}"
    if found := re.search(r"Option '([\w.-]+)' is not accepted", text):
        outer = f"--{keys[0]}" if keys else ""
        paths = _values(argv, outer, f"{outer}.class_path") + re.findall(r"'class_path': '([\w.]+)'", text)
        named = [path.rpartition(".")[2] for path in paths]
        meant = [cls for cls in classes if cls.__name__ in named] or classes
        names = [name for cls in meant for name in inspect.signature(cls).parameters if name != found[1]]
        return f"{option} has no option '{found[1]}'{_nearest(found[1], names)}"
    if found := re.search(r"Importing '([\w.]+)' is not allowed", text):
        return (
            f"{found[1]} is code, which a configuration cannot name: give it on the command line (--{'.'.join(keys)})"
        )
    if classes and (found := re.search(r"Expected a (?:path but|dot import path string:) (\S+)", text)):
        names = sorted(cls.__name__ for cls in classes)
        return f"there is no {keys[0]} '{found[1]}', only {', '.join(names)}{_nearest(found[1], names)}"
    if found := re.search(r"arguments are required: ([\w.]+)", text):
        verb, _, name = found[1].rpartition(".")
        positional = name in ("data", "model", "base", "structure")
        return f"{verb or keys[0]} needs {name if positional else '--' + '.'.join([*keys, name])}"
    if found := re.search(r"invalid choice: '(\S+)'", text):
        return f"there is no verb '{found[1]}', only {', '.join(VERBS)}{_nearest(found[1], list(VERBS))}"
    if 'expected "verb"' in text:
        return f"give a verb: {', '.join(VERBS)}"
    if found := re.search(r"File does not exist: (\S+)", text):
        return f"{option}: there is no file {found[1]}"
    if value := re.search(r"(?:Given|Got) value: (\S+)", text):
        choices = re.search(r"Expected a typing.Literal\[(.*?)\]", text)
        kinds = [kind for kind in re.findall(r"Expected a <class '(\w+)'>", text) if kind != "NoneType"]
        if choices or kinds:
            return f"{option} is {value[1]}, but must be {f'one of {choices[1]}' if choices else kinds[0]}"
    return text


def _options(verb: str) -> list[str]:
    """The options of a verb."""
    if verb not in VERBS:
        return []
    verbs = next(action._name_parser_map for action in _parser(verb)._actions if hasattr(action, "_name_parser_map"))
    return [option for action in verbs[verb]._actions for option in action.option_strings]


def _print_json(content: Any) -> None:
    print(json.dumps(plain(content), ensure_ascii=False, allow_nan=False))


def _check_teacher(teacher: str | None, argv: Sequence[str]) -> None:
    """Refuse code that a configuration names; only who types runs it."""
    words = chain(*(word.split("=", 1) if word.startswith("--teacher=") else [word] for word in argv))
    typed = teacher is not None and ("--teacher", teacher) in pairwise(words)
    if teacher is not None and ":" in teacher and not typed and not Path(teacher).exists():
        raise InputError(
            f"the teacher {teacher} is code, which a configuration cannot name: give it on the command line (--teacher)"
        )


def _import_what_is_typed(argv: Sequence[str]) -> None:
    """Let no configuration name a module to import; classes of one's own are those of the command line."""
    typed = chain(*(re.findall(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+", word) for word in argv))
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=["transfermium", *filter(_is_own_path, typed)],
    )


def _is_own_path(path: str) -> bool:
    return all(map(str.isidentifier, path.split("."))) and not path.startswith("jsonargparse")


def _config_of(argv: Sequence[str]) -> str | None:
    """The last configuration file of a command."""
    return next(reversed(_values(argv, "--config")), None)


def _values(argv: Sequence[str], *options: str) -> list[str]:
    """What follows these options."""
    words = chain(*(word.split("=", 1) if word.startswith("--") else [word] for word in argv))
    return [after for word, after in pairwise(words) if word in options]


def _trace(argv: Sequence[str]) -> None:
    """The traceback of an error, where it was asked for."""
    if "--debug" in argv or os.environ.get("TRANSFERMIUM_DEBUG"):
        traceback.print_exc()


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(names), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _fail(message: str, status: int = 2) -> NoReturn:
    if not distributed.fail():  # another process was first, and says it
        sys.exit(status)
    console.quiet = False
    line = " ".join(part.strip() for part in message.splitlines())
    console.print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
