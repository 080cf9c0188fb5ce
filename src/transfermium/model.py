"""A backbone with named outputs, their derivatives, and the file that holds them."""

from __future__ import annotations

import contextlib
import copy
import glob
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .backbones.base import Backbone, Edges, Features
from .errors import InputError
from .graph import AtomGraph, Cutoff
from .heads import Head, LevelHead
from .messages import EdgeFormula, Neighborhood, Radii, fixed_weights
from .nn import Bessel, NodeInputs, lengths_and_directions, mlp
from .untrusted import NoLargerThan, check_arguments, check_card, check_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS = bool(fcntl)  # of files and folders
FORMAT = 1
UNFINISHED = ".partial"  # at the end of names of files that are being written
ATTACHED = "attached."  # before names of tensors in a file that are no weights
SMOOTH = 1e-4  # under roots, or features would have a kink where vectors vanish or all atoms are alike
SHIPPED = {file.stem: file for file in sorted((Path(__file__).parent / "pretrained").glob("*.safetensors"))}


@dataclass(frozen=True)
class Gradient:
    """Minus the derivative of a head with respect to positions: forces (eV/Å) of an energy, (n_atoms, 3)."""

    of: str


@dataclass(frozen=True)
class Strain:
    """Derivative of a head with respect to strain, per volume: the stress of an energy, (n_systems, 3, 3).

    In eV/Å³ with ASE's sign (negative when compressed); NaN where a structure is not periodic in three directions.
    """

    of: str


Output = Head | Gradient | Strain


class Model(nn.Module):
    """`model(graph, wanted)` computes only what is asked for.

    Args:
        backbone: `AtomGraph` to `Features`.
        outputs: name to head, or to `Gradient(name)` / `Strain(name)` of a head with one value per structure.
        card: what is known of this model beside its weights; see `save`.
    """

    def __init__(self, backbone: Backbone, outputs: Mapping[str, Output], card: Mapping[str, Any] | None = None):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({name: out for name, out in outputs.items() if isinstance(out, Head)})
        self.derivatives = {name: out for name, out in outputs.items() if not isinstance(out, Head)}
        for name, derivative in self.derivatives.items():
            if derivative.of not in self.heads:
                raise InputError(f"output '{name}' derives '{derivative.of}', which is not a head of this model")
        for name in inspect.signature(type(backbone)).parameters:
            if type(value := getattr(backbone, name, None)) is int and value < 0:
                raise InputError(f"{name} of {type(backbone).__name__} is {value}, but must not be negative")
        if self.derivatives and "derivatives" not in backbone.laws:
            name, derived = type(backbone).__name__, " and ".join(self.derivatives)
            raise InputError(
                f"{name} is not smooth in the positions, so its outputs have no derivatives for {derived}: give the "
                "objective conservative=False, or choose another backbone"
            )
        self.card: dict[str, Any] = dict(card or {})
        self.attached: dict[str, Tensor] = {}  # what the card tells of in numbers, saved beside the weights

        needs = frozenset().union(*(head.needs for head in self._heads().values()))
        self.bond_vectors: BondVectors | FreeVectors | None = None
        if "vectors" in needs and "vectors" not in backbone.laws:
            turns = "rotation" in backbone.laws
            radius = backbone.edges.radius
            self.bond_vectors = (BondVectors if turns else FreeVectors)(backbone.width, radius)

    @property
    def outputs(self) -> dict[str, Output]:
        return {**self._heads(), **self.derivatives}

    def forward(self, graph: AtomGraph, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """Outputs by name; all of them by default. Derivatives can be differentiated again in training mode."""
        parameter = next(self.parameters())
        graph = graph.to(parameter.device, parameter.dtype)
        wanted = list(self.outputs) if wanted is None else list(wanted)
        for name in wanted:
            if name not in self.outputs:
                raise InputError(f"this model has no output '{name}': it has {', '.join(self.outputs)}")
        with contextlib.nullcontext() if self.training else fixed_weights():
            return self._outputs(graph, wanted)

    def _outputs(self, graph: AtomGraph, wanted: Sequence[str]) -> dict[str, Tensor]:
        derived = {name: self.derivatives[name] for name in wanted if name in self.derivatives}
        if not derived:
            with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                return self._evaluate(graph, wanted)

        with torch.enable_grad():
            graph, leaves = differentiable(graph, {type(derivative) for derivative in derived.values()})
            direct = [name for name in wanted if name in self.heads]
            roots = dict.fromkeys(derivative.of for derivative in derived.values())
            results = self._evaluate(graph, dict.fromkeys([*direct, *roots]))
            for number, of in enumerate(roots, start=1):
                names = {name: d for name, d in derived.items() if d.of == of}
                again = self.training or number < len(roots)
                results |= self._differentiate(results[of], names, graph.cell, leaves, again)
        if not self.training:
            results = {name: value.detach() for name, value in results.items()}
        return {name: results[name] for name in wanted}

    def __call__(self, graph: AtomGraph, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        return super().__call__(graph, wanted)

    def part(self, name: str) -> Model:
        """This model as what one of several objectives made it, with outputs by their own names.

        Weights are shared, unless parts are told apart by inputs, which become constants of a copy: then the part is a
        plain model that is told nothing.

        Raises `InputError` when it has no part of this name.
        """
        parts = self.card.get("parts", {})
        if name not in parts:
            raise InputError(f"this model has no part '{name}': it has {', '.join(parts) or 'none, leave it out'}")
        own = {full: short for short, full in parts[name]["outputs"].items()}
        outputs = {
            short: of_level(output, name) if isinstance(output, Head) else type(output)(own[output.of])
            for full, short in own.items()
            for output in [self.outputs[full]]
        }
        inputs = parts[name].get("inputs", {})
        backbone = _fixed(self.backbone, inputs) if inputs else self.backbone
        with torch.random.fork_rng(devices=[]):
            model = Model(backbone, outputs, {**self.card, **parts[name]["card"]})
        del model.card["parts"]
        metrics, start = model.card.get("metrics", {}), f"{name} "
        if "validation" in metrics:
            errors = {k.removeprefix(start): v for k, v in metrics["validation"].items() if k.startswith(start)}
            model.card["metrics"] = {**metrics, "validation": errors}
        if model.bond_vectors is not None:
            model.bond_vectors = self.bond_vectors
        model.attached = self.attached
        if "targets" in (found := model.card.get("uncertainty", {})):
            named = {t.removeprefix(f"{name} "): e for t, e in found["targets"].items() if t.startswith(f"{name} ")}
            named = {t: {**e, "output": own.get(e["output"], e["output"])} for t, e in named.items()}
            model.card["uncertainty"] = {**found, "targets": named}
        return model.train(self.training)

    def whole(
        self, part: str | None = None, wanted: Collection[str] | None = None, told: Collection[str] = ()
    ) -> Model:
        """The model to be used: the part that is named, or all of it where there is nothing to choose between.

        Raises `InputError` when no part is named, and several parts have an output of the same name (one of those
        `wanted`, if these are given), or are told apart by inputs other than those that the model will be `told`.
        """
        if part is not None:
            return self.part(part)
        own = {name: found["outputs"] for name, found in self.card.get("parts", {}).items()}
        several = [
            name
            for name, outputs in own.items()
            if any(short != full and (wanted is None or short in wanted) for short, full in outputs.items())
            or not set(self.card["parts"][name].get("inputs", ())) <= set(told)
        ]
        if several:
            names = " or ".join(several)
            raise InputError(f"this model has several answers: choose one with part (--part): {names}")
        return self

    def per_atom(self, name: str) -> bool:
        """Whether an output has one row per atom, rather than one per structure."""
        output = self.outputs[name]
        return output.per_atom if isinstance(output, Head) else isinstance(output, Gradient)

    def features(self, graph: AtomGraph, needs: Collection[str] = ("vectors", "edges")) -> Features:
        """What the backbone sees, completed with what heads need.

        "layers" are the element and what the structure says beside it, the blocks of the backbone (those of
        `Backbone.atom_blocks`), and its final scalars. Of vectors and tensors (n_atoms, components, width) norms are
        taken.
        """
        with _watched(self.backbone if "layers" in needs else None) as seen:
            features = self.backbone(graph)
        if "layers" in needs:
            found = {name: [_invariant(x) for x in given] for name, given in seen.items()} | {
                "final": [features.scalars]
            }
            features = features._replace(layers={name: torch.cat(given, dim=1) for name, given in found.items()})
        bond_vectors = self.bond_vectors if features.vectors is None and "vectors" in needs else None
        if "edges" in needs:
            lengths, directions = lengths_and_directions(graph.edge_vectors())
            features = features._replace(edges=Edges(lengths, directions, self.backbone.edges.envelope(lengths)))
        if bond_vectors is not None:
            features = features._replace(vectors=bond_vectors(features, graph))
        return features

    def _evaluate(self, graph: AtomGraph, names: Collection[str]) -> dict[str, Tensor]:
        heads = {name: head for name, head in self._heads().items() if name in names}
        features = self.features(graph, frozenset().union(*(head.needs for head in heads.values())))
        return {name: head(features, graph) for name, head in heads.items()}

    def _differentiate(
        self,
        values: Tensor,
        names: Mapping[str, Gradient | Strain],
        cell: Tensor,
        leaves: Mapping[type, Tensor],
        again: bool,
    ) -> dict[str, Tensor]:
        """Forces -dE/dr and stress dE/dε / V, in one backward pass; `again` when others will follow."""
        kinds = list(dict.fromkeys(type(d) for d in names.values()))
        gradients = torch.autograd.grad(
            values.sum(),
            [leaves[kind] for kind in kinds],
            create_graph=self.training,
            retain_graph=again,
            materialize_grads=True,
        )
        by_kind = dict(zip(kinds, gradients, strict=True))
        return {
            name: -by_kind[Gradient] if isinstance(d, Gradient) else per_volume(by_kind[Strain], cell)
            for name, d in names.items()
        }

    def _heads(self) -> dict[str, Head]:
        return dict(self.heads.items())  # type: ignore[arg-type]

    # -- the file ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write weights and card to one safetensors file, at once or not at all.

        The card is JSON under the key "transfermium" of the file's header: classes and arguments, units, label names,
        level of theory, references, elements seen with counts, history of stages and metrics.
        """
        card = {"format": FORMAT, **self.architecture(), **self.card}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        tensors |= {ATTACHED + name: t.contiguous() for name, t in self.attached.items()}
        write_tensors(path, tensors, {"transfermium": json.dumps(card)})

    def architecture(self) -> dict[str, Any]:
        """Classes and arguments of the backbone and the outputs, ready for JSON."""
        outputs: dict[str, Any] = {name: described(head) for name, head in self._heads().items()}
        for name, derivative in self.derivatives.items():
            outputs[name] = {"class": type(derivative).__name__, "arguments": {"of": derivative.of}}
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        return {"backbone": described(self.backbone), "outputs": outputs, "dtype": dtype}


def load(path: str | Path) -> Model:
    """Read a model from its file or the folder of its run, or one of `SHIPPED` by its name; nothing in it is executed.

    Raises `InputError` for files that are not models, or whose classes are not imported here.
    """
    if isinstance(path, str) and path in SHIPPED:
        if Path(path).exists():
            raise InputError(
                f"{path} is here, and a model of that name ships with the package: write ./{path}, or rename"
            )
        path = SHIPPED[path]
    if Path(path).is_dir():  # a run folder
        path = Path(path) / "model.safetensors"
    if isinstance(path, str) and SHIPPED and not Path(path).suffix and not Path(path).exists():
        raise InputError(f"there is no file {path}, and what ships with the package is {', '.join(SHIPPED)}")
    tensors, metadata = read_tensors(path)
    try:
        card = json.loads(metadata["transfermium"])
        found = card.pop("format")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is not a transfermium model: its header has no readable card") from None
    if type(found) is not int or found != FORMAT:
        raise InputError(f"{path} has file format {found}, but this version reads {FORMAT}: update transfermium")
    attached = {n.removeprefix(ATTACHED): tensors.pop(n) for n in list(tensors) if n.startswith(ATTACHED)}
    try:
        check_card(card)
        check_arguments([card["backbone"], card["outputs"]], tensors)
        with NoLargerThan(tensors):
            model = _rebuilt_model(card)
        check_tensors(tensors, model.state_dict())
        model.attached = attached
        model.load_state_dict(tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or from another version: {reason}") from None
    return model.eval()


def _rebuilt_model(card: Mapping[str, Any]) -> Model:
    """The model that a card describes, with new weights."""
    own = dict(card)
    backbone = rebuilt(own.pop("backbone"), Backbone)
    outputs = {name: _rebuilt_output(spec) for name, spec in own.pop("outputs").items()}
    dtype = {"float32": torch.float32, "float64": torch.float64}[own.pop("dtype")]
    return Model(backbone, outputs, own).to(dtype)


def described(thing: Any) -> dict[str, Any]:
    """Class and constructor arguments of an object that remembers them as attributes."""
    names = list(inspect.signature(type(thing)).parameters)
    if forgotten := [name for name in names if not hasattr(thing, name)]:
        raise InputError(
            f"{type(thing).__name__} does not remember its argument '{forgotten[0]}': keep each constructor argument "
            "as an attribute of the same name"
        )
    return {"class": type(thing).__name__, "arguments": {name: _plain(getattr(thing, name)) for name in names}}


def stored_as(model: Model, name: str) -> str:
    """The name under which an output is stored: the quantity it was trained on."""
    return str(model.card.get("quantities", {}).get(name, [name])[0]).replace(" ", "_")


def asked(thing: Any) -> dict[str, Any]:
    """The constructor arguments of an object that are not at their defaults."""
    usual = {name: one.default for name, one in inspect.signature(type(thing)).parameters.items()}
    given = described(thing)["arguments"]
    return {name: getattr(thing, name) for name, value in given.items() if not _same(value, usual[name])}


def _same(value: Any, default: Any) -> bool:
    one, other = (list(x) if isinstance(x, tuple) else x for x in (value, default))
    if type(one) in (int, float) and type(other) in (int, float):
        return bool(one == other)
    return type(one) is type(other) and repr(one) == repr(other)


def _plain(value: Any) -> Any:
    """An argument as JSON can hold it: objects, also those in a mapping, are described."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return described(value) if isinstance(value, Head) or hasattr(value, "outputs") else value


def copied(thing: Any, **changes: Any) -> Any:
    """A new object of the same class and arguments, with new weights; `changes` are of arguments."""
    arguments = {name: getattr(thing, name) for name in described(thing)["arguments"]}
    return type(thing)(**{**arguments, **changes})


def rebuilt(spec: Mapping[str, Any], base: type) -> Any:
    """The object described; only subclasses of `base` that are already imported can be built."""
    known = {cls.__name__: cls for cls in subclasses(base)}
    if spec["class"] not in known:
        raise InputError(f"the class {spec['class']} is not known here: import the module that defines it first")
    arguments = {name: _rebuilt_argument(value, base) for name, value in spec["arguments"].items()}
    return known[spec["class"]](**arguments)


def _rebuilt_argument(value: Any, base: type) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"class", "arguments"}:
            return rebuilt(value, base)
        return {key: _rebuilt_argument(item, base) for key, item in value.items()}
    return value


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside `path`, flush it to disk and rename it: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(dict(tensors), dict(metadata or {})))


def check_file(out: str | Path | None) -> None:
    """Refuse a folder where a file is to be written, before there is anything to write."""
    if out is not None and Path(out).is_dir():
        raise InputError(f"{out} is a folder: give the name of a file")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once or not at all, also across a power cut."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on disk; `OSError` names `path` where a disk is full.

    A process that is killed meanwhile leaves a hidden file, which the next one to write at `path` removes.
    """
    sweep(path.parent, path.name)
    handle, temporary = _temporary(path)
    lock = os.dup(handle) if LOCKS else os.open(os.devnull, os.O_RDONLY)  # Windows renames no open file
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(lock)
    sync_folder(path.parent)


def _temporary(path: Path) -> tuple[int, str]:
    """A new hidden file beside a path, held by this process; another one may sweep it away before it is."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        if LOCKS:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, name
        os.close(handle)


@contextlib.contextmanager
def held(path: str | Path, make: bool = False) -> Iterator[bool | None]:
    """Hold a file or folder until the end, or that of this process: True, or False where somebody else holds it.

    None where there are no locks. With `make` a file that is missing is made.
    """
    if not LOCKS:
        yield None
        return
    while True:
        handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
        ours = _locked(handle)
        if not ours or (os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path))):
            break
        os.close(handle)  # who held it before has removed it
    HANDLES.add(handle)
    try:
        yield ours
    finally:
        if handle in HANDLES:
            HANDLES.remove(handle)
            os.close(handle)


def _locked(handle: int) -> bool | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _let_go() -> None:
    """Close what the parent holds: its locks would else last as long as its workers."""
    while HANDLES:
        os.close(HANDLES.pop())


HANDLES: set[int] = set()  # of what is held
if LOCKS:
    os.register_at_fork(after_in_child=_let_go)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove unfinished files and folders that processes left which were killed: of this name, or all in a folder."""
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.*{UNFINISHED}"):
        with contextlib.suppress(OSError), held(left) as ours:
            if ours and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif ours:
                left.unlink()


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk, as far as its file system can."""
    with contextlib.suppress(OSError):  # Windows cannot open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            head = raw.read(4)
        if head[:1] == b"\x80" or head == b"PK\x03\x04":
            raise InputError(
                f"{path} is a pickle, as torch.save writes them: these run any code and are never loaded; give a model "
                "that transfermium saved"
            ) from None
        raise InputError(f"{path} is not a complete safetensors file: {error}") from None


class BondVectors(nn.Module):
    """Vectors for backbones that have none: learned scalars of each edge times its direction, (n_atoms, 3, width)."""

    def __init__(self, width: int, cutoff: float):
        super().__init__()
        self.cutoff = Cutoff(cutoff)
        self.basis = Bessel(12, cutoff)
        self.filter = nn.Linear(13, width, bias=False)
        self.sender = nn.Linear(width, width)

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        edges = Neighborhood(graph, self.cutoff, self.basis)
        (vectors,) = edges.sum(BOND_VECTORS, self.filters, senders=[self.sender(features.scalars).unsqueeze(1)])
        return vectors

    def filters(self, at: Radii) -> Tensor:
        return (at.basis @ self.filter.weight[:, :-1].mT + self.filter.weight[:, -1]) * at.envelope


class FreeVectors(BondVectors):
    """Vectors for backbones that obey no rotation, (n_atoms, 3, width): decoded from their scalars, and along bonds.

    What is decoded can be anything, but is slow to learn: for long, nothing is the best that it can say.
    """

    def __init__(self, width: int, cutoff: float):
        super().__init__(width, cutoff)
        self.width = width
        self.decode = mlp(width, width, 3 * width)

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        decoded: Tensor = self.decode(features.scalars)
        return super().forward(features, graph) + decoded.unflatten(1, (3, self.width))


BOND_VECTORS = EdgeFormula(
    lambda sender, receiver, filters, direction, length: [sender[0] * filters[0] * u for u in direction],
    outputs=(3,),
    filters=1,
    senders=(1,),
)


def _fixed(backbone: Backbone, values: Mapping[str, float]) -> Backbone:
    """A copy of the backbone to which these inputs are constants."""
    fixed = copy.deepcopy(backbone)
    for module in fixed.modules():
        if isinstance(module, NodeInputs):
            module.fix(values)
    others: Any = tuple(name for name in getattr(backbone, "inputs", ()) if name not in values)
    fixed.inputs = others
    return fixed


def of_level(head: Any, name: str) -> Any:
    """What a head is at one level of theory, where it has several; else itself."""
    return head.at(name) if isinstance(head, LevelHead) else head


def _invariant(x: Tensor) -> Tensor:
    """Scalars as they are, norms of all else: (n_atoms, width)."""
    if x.dim() == 2:
        return x
    return x.squeeze(1) if x.shape[1] == 1 else torch.sqrt(x.square().sum(dim=1) + SMOOTH)


@contextlib.contextmanager
def _watched(backbone: Backbone | None) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers of a backbone give while it is called."""
    seen: dict[str, list[Tensor]] = {}
    handles: list[Any] = []
    if backbone is None:
        yield seen
        return

    def watch(name: str, module: nn.Module) -> None:
        def keep(module: nn.Module, arguments: Any, result: Any) -> None:
            given = result if isinstance(result, tuple) else (result,)
            seen[name] = [x for x in given if isinstance(x, Tensor) and x.dim() in (2, 3)]

        handles.append(module.register_forward_hook(keep))

    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and (backbone.atom_blocks is None or name in backbone.atom_blocks):
            for k, block in enumerate(child):
                watch(f"{name} {k}", block)
        elif name == "node_inputs":
            watch("element", child)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def differentiable(graph: AtomGraph, kinds: Collection[type]) -> tuple[AtomGraph, dict[type, Tensor]]:
    """The same graph as a function of its positions and of a symmetric strain (zero) of positions and cell."""
    positions = graph.positions.detach().requires_grad_()
    if Strain not in kinds:
        return graph._replace(positions=positions), {Gradient: positions}
    strain = graph.cell.new_zeros(graph.n_systems, 3, 3).requires_grad_()
    stretch = (strain + strain.mT) / 2
    moved = positions + (positions.unsqueeze(1) @ stretch.index_select(0, graph.system_idx)).squeeze(1)
    cell = graph.cell + graph.cell @ stretch
    return graph._replace(positions=moved, cell=cell), {Gradient: positions, Strain: strain}


def per_volume(gradient: Tensor, cell: Tensor) -> Tensor:
    volume = torch.linalg.det(cell.detach()).abs()
    periodic = volume > 0
    stress = gradient / torch.where(periodic, volume, 1.0).view(-1, 1, 1)
    return torch.where(periodic.view(-1, 1, 1), stress, torch.nan)


def _rebuilt_output(spec: Mapping[str, Any]) -> Output:
    derivatives: dict[str, type[Gradient] | type[Strain]] = {"Gradient": Gradient, "Strain": Strain}
    if spec["class"] in derivatives:
        return derivatives[spec["class"]](**spec["arguments"])
    head: Head = rebuilt(spec, Head)
    return head


def subclasses(base: type) -> list[type]:
    """All classes below one of which there can be objects, the outer before the inner."""
    direct: list[type] = base.__subclasses__()
    found = [cls for child in direct for cls in (child, *subclasses(child))]
    return [cls for cls in found if not inspect.isabstract(cls)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
