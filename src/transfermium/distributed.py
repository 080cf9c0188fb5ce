"""Several processes that train one model: which of them we are, what they add up, and how an error ends them all."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from .console import console
from .errors import InputError

T = TypeVar("T")

MINUTES = 60.0  # that a process waits for the others at most; the variable TRANSFERMIUM_TIMEOUT says otherwise
FAILED = 2  # exit status of processes that another one has ended


class Place(NamedTuple):
    """Where a process stands among those that were started together."""

    rank: int
    size: int
    local_rank: int  # on its machine
    host: str  # where the first process listens
    port: int


class Lost(InputError):
    """Another process has gone without a word."""


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun or srun says in the environment; None for a process on its own.

    A batch script of Slurm is a process on its own, whatever it asks for: only srun starts several.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "port": "MASTER_PORT"}
        defaults = {"LOCAL_RANK": "0", "MASTER_PORT": "29500"}
        host = environment.get("MASTER_ADDR", "localhost")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = {"rank": "SLURM_PROCID", "size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
        defaults = {"SLURM_LOCALID": "0"}
        host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    else:
        return None
    try:
        numbers = {name: int(environment.get(key, defaults.get(key, ""))) for name, key in names.items()}
        if "port" not in numbers:  # the same for all tasks of a step, another for other steps
            step = 31 * int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
            numbers["port"] = int(environment.get("MASTER_PORT", 20_000 + step % 10_000))
    except ValueError:
        variables = ", ".join(names.values())
        raise InputError(f"{variables} are not all numbers: start the processes with torchrun or srun") from None
    found = Place(host=host, **numbers)
    return found if found.size > 1 else None


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: "gpu[07-09,12],cpu1" is "gpu07"."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else "localhost"


def join() -> None:
    """Meet the other processes, if torchrun or srun has started several; a second call changes nothing.

    From then on an exception that nobody catches in one of them ends all.
    """
    here = place()
    if here is None or dist.is_initialized() or os.environ.get(ALONE):
        return
    os.environ |= {
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.size),
        "LOCAL_RANK": str(here.local_rank),
        "MASTER_ADDR": here.host,
        "MASTER_PORT": str(here.port),
    }
    console.quiet = here.rank > 0
    minutes = os.environ.get("TRANSFERMIUM_TIMEOUT", MINUTES)
    try:
        patience = timedelta(minutes=float(minutes))
    except ValueError:
        raise InputError(f"TRANSFERMIUM_TIMEOUT is '{minutes}', but must be a number of minutes") from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with _talking():
        dist.init_process_group(backend, timeout=patience)
        _state.start(here)
    if torch.cuda.is_available():  # or each process would hold memory on the first GPU too
        torch.cuda.set_device(own_device())


def stay_alone() -> None:
    """From now on this process, and those that it starts, meet no others."""
    os.environ[ALONE] = "1"


def rank() -> int:
    """Which process this is; 0 is the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device() -> torch.device:
    """The GPU of this process, for as many processes on a machine as it has GPUs."""
    here = place()
    return torch.device("cuda", here.local_rank % torch.cuda.device_count() if here and size() > 1 else 0)


def own(items: Sequence[T]) -> Sequence[T]:
    """The share of this process: every `size`-th item."""
    return items[rank() :: size()]


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        sum_counts({})


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives to the first process, for all of them; it is called in no other.

    An `InputError` that it raises is raised in all, so that they stay together where somebody catches it.
    """
    if size() == 1:
        return make()
    made: list[Any] = [None, None]  # what it gave, and what it raised
    if rank() == 0:
        try:
            made[0] = make()
        except Lost:
            raise
        except InputError as refused:
            made[1] = refused
    with _talking():
        dist.broadcast_object_list(made, device=torch.device("cpu"))
    found, error = made
    if error is not None:
        raise error
    return found


def gathered(mine: T) -> list[T]:
    """What each process has, in order of rank."""
    if size() == 1:
        return [mine]
    everyones: list[T | None] = [None] * size()
    with _talking():
        dist.all_gather_object(everyones, mine)
    return everyones  # type: ignore[return-value]


def sum_counts(counts: Mapping[str, float], device: torch.device | None = None) -> dict[str, float]:
    """Named numbers added up over all processes, in double precision.

    A process may lack names that others have. Names are agreed on when a new one turns up; then a call is one
    all-reduce of a few numbers.
    """
    return summing(counts, device)()


def summing(counts: Mapping[str, float], device: torch.device | None = None) -> Callable[[], dict[str, float]]:
    """Begin with `sum_counts` and go on with other work; the function returned waits for its result.

    Nothing else may be exchanged before it is called.
    """
    if size() == 1:
        return lambda: dict(counts)
    names = _state.names
    known = [name in counts for name in names]
    sums = torch.tensor(
        [float(sum(known) < len(counts)), *(counts.get(name, 0.0) for name in names), *map(float, known)],
        dtype=torch.float64,
        device=device if _state.nccl(device) else None,
    )
    with _talking():
        exchange = dist.all_reduce(sums, async_op=True)

    def finish() -> dict[str, float]:
        with _talking():
            exchange.wait()
        news, *values = sums.tolist()
        if news:
            _state.names = sorted({*names, *(name for own in gathered(list(counts)) for name in own)})
            return sum_counts(counts, device)
        present = values[len(names) :]
        return {name: value for name, value, n in zip(names, values, present, strict=False) if n}

    return finish


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients over all processes, in one flat all-reduce; what has none in any process keeps none.

    To be called after all of `backward`, which hooks would not see when derivatives are part of the loss.
    """
    if size() == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=parameters[0].dtype)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat = torch.cat([*parts, has.to(parts[0].device)])
    sums = flat if _state.nccl(flat.device) else flat.cpu()
    with _talking():
        dist.all_reduce(sums)
    *sums_of_each, present = sums.to(flat.device).split([p.numel() for p in parameters] + [len(parameters)])
    for p, total, n in zip(parameters, sums_of_each, present.tolist(), strict=True):
        p.grad = total.view_as(p) if n else None


def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    if size() == 1:
        return
    with torch.no_grad(), _talking():
        for tensor in tensors:
            values = tensor.detach().cpu().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def fail() -> bool:
    """End all other processes; True in the one that failed first and is to say why."""
    return _state.fail()


# -- how an error ends them all -------------------------------------------------------------------------------------

ALONE = "TRANSFERMIUM_ALONE"


class _State:
    """What this process knows of the others: names that are summed, and a second line on which failures are told.

    A process that waits in a collective cannot be reached there, and one that another backend waits for may wait long.
    So a thread of each looks at the common store, and ends its process when another has failed.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.store: PrefixStore | None = None
        self.hosts = False  # the store lives in this process: it has to go last
        self.ended = threading.Event()
        self.own_gpus: bool | None = None

    def start(self, here: Place) -> None:
        self.hosts = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        line = TCPStore(here.host, here.port, is_master=False, timeout=timedelta(minutes=1))
        self.store = PrefixStore(f"transfermium/{attempt}", line)
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self._leave)
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if self.fail():
                previous(kind, error, trace)

        sys.excepthook = hook

    def nccl(self, device: torch.device | None) -> bool:
        """Whether tensors on this device can be added up there: each process must have a GPU of its own."""
        if device is None or device.type != "cuda" or not dist.is_nccl_available():
            return False
        if self.own_gpus is None:
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self.own_gpus = len(set(gathered(uuid))) == size()
        return self.own_gpus

    def fail(self) -> bool:
        if self.store is None or self.ended.is_set():
            return True
        self.ended.set()
        try:
            first = self.store.compare_set("failed", "", str(rank())) == str(rank()).encode()
            self._wait_for_others()
        except RuntimeError:  # the store is gone, and with it the first process
            return True
        return first

    def _watch(self) -> None:
        with suppress(RuntimeError):
            while not self.ended.wait(0.2):
                if self.store is not None and self.store.check(["failed"]):
                    if not self.ended.is_set():
                        self._wait_for_others()
                        os._exit(FAILED)
                    return

    def _wait_for_others(self, seconds: float = 5.0) -> None:
        """Be counted as one that knows; the process with the store gives the others time to learn."""
        assert self.store is not None
        told = self.store.add("told", 1)
        deadline = time.monotonic() + seconds
        while self.hosts and told < size() and time.monotonic() < deadline:
            time.sleep(0.05)
            told = self.store.add("told", 0)

    def _leave(self) -> None:
        if dist.is_initialized() and not self.ended.is_set():
            self.ended.set()
            with suppress(RuntimeError):
                dist.destroy_process_group()


_state = _State()


@contextmanager
def _talking() -> Iterator[None]:
    """Exchange with the others; when one of them is gone, wait to be told why, or say that nobody did."""
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL and the store alike
        if _state.store is not None:
            time.sleep(2.0)  # a failure that was told ends this process meanwhile
        raise Lost(
            f"another process of this run is gone or does not answer ({str(error).splitlines()[0][:120]}): see what it "
            "or its launcher said; the same command goes on where it was last saved"
        ) from error
