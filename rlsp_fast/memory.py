"""Who holds the device when: generation and training take turns on it, in one order, timed and booked at every edge.

A step is
    generate                       the engine has weights and KV cache, the trainer its sharded states
    sleep                          the engine drops both (level 2) or keeps the weights on the host (level 1)
    fetch_states                   trainer states that were on the host come back (train.offload)
    train                          the trainer has the device
    free_cache, wait_ranks         torch's free list goes back to the driver, on every rank, before the engine asks for memory
    wake_weights, push_weights     room for the weights, then the weights just trained, while the states are copied to the host
    offload_states                 the states' memory is given up, when their copies are whole
    wake_kv_cache                  room for keys and values, when nothing of the push is left
    reset_prefix_cache             those of the old weights would be served for shared prompts
and again. Waking both at once, or before the trainer let go, is what runs out of memory; a missing push leaves old weights.
"""

import logging
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch import Tensor

from rlsp_fast import dist

log = logging.getLogger(__name__)

GROWTH_STEPS = 20
"""Steps over which the floor is watched."""


class MemoryGrowthError(RuntimeError):
    """The least memory held during a step grows from step to step; the message has the table."""


class OrderError(RuntimeError):
    """A verb of the engine out of order: a bug of ours, never to be trained over."""


class DeviceMemoryError(RuntimeError):
    """Memory ran out where nothing can be made smaller; the message has the ledger and what to change."""


def ran_out(error: BaseException) -> bool:
    """Whether an error is torch's allocator, vLLM's or the host's saying that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error)))


@dataclass(frozen=True, slots=True)
class Entry:
    """What one rank held at one edge, bytes. On a CPU `used` is the process's resident memory and the others are 0."""

    edge: str
    allocated: int
    """By torch's tensors."""
    reserved: int
    """By torch's allocator, free list and all."""
    used: int
    """Of the device, by everybody: what the driver does not call free."""


class Ledger:
    """Entries of the current step, and the floor (the least `used` after an edge) of the steps before it."""

    def __init__(self, max_growth: float | None):
        """
        Args:
            max_growth: Bytes that the floor may grow over GROWTH_STEPS steps; None: watched, never stopped for.
        """
        self.max_growth = max_growth
        self.entries: list[Entry] = []
        self.floors: list[int] = []

    def note(self, edge: str) -> Entry:
        """Books an edge that was just passed."""
        self.entries.append(measure(edge))
        return self.entries[-1]

    def close_step(self, others: Mapping[str, float] | None = None) -> dict[str, float]:
        """Metrics of the step, GiB, the largest over ranks; starts the next one.

        Args:
            others: More metrics, bytes.
        Raises:
            MemoryGrowthError: when the floor grew by more than max_growth over GROWTH_STEPS steps, with the table.
        """
        entries, self.entries = self.entries, []
        if not entries:
            return {}
        floor = min(entry.used for entry in entries)
        kinds = _KINDS if torch.cuda.is_available() else ("used",)  # not by what is 0 here: all ranks must name the same
        names = [(f"memory/{e.edge}/{kind}_gib", getattr(e, kind)) for e in entries for kind in kinds]
        names += (others or {}).items()
        most = dist.max_over_ranks([floor, *(number for _, number in names)])
        self.floors = [*self.floors, int(most[0])][-GROWTH_STEPS - 1 :]
        metrics = {name: number / 2**30 for (name, _), number in zip(names, most[1:], strict=True)}
        metrics["memory/floor_gib"] = most[0] / 2**30
        growth = self.growth()
        metrics["memory/floor_growth_gib"] = growth / 2**30
        if self.max_growth is not None and len(self.floors) > GROWTH_STEPS and growth > self.max_growth:
            floors = " ".join(f"{f / 2**30:.2f}" for f in self.floors)
            raise MemoryGrowthError(
                f"the least memory of a step grew by {growth / 2**30:.2f} GiB over {GROWTH_STEPS} steps; "
                f"train.max_memory_growth_gib allows {self.max_growth / 2**30:g}. Restart from the last checkpoint\n"
                f"{table(entries)}\nfloor of each step, GiB: {floors}"
            )
        return metrics

    def growth(self) -> int:
        """Bytes between the first and the last floors kept, medians of three each, so that one step alone is no trend."""
        if len(self.floors) < 6:
            return 0
        return sorted(self.floors[-3:])[1] - sorted(self.floors[:3])[1]


_KINDS = ("allocated", "reserved", "used")


def measure(edge: str) -> Entry:
    """What is held now. Cost on a GPU: one call to the driver."""
    if not torch.cuda.is_available():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Entry(edge, 0, 0, pages * resource.getpagesize())
    free, total = torch.cuda.mem_get_info()
    return Entry(edge, torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free)


def table(entries: Sequence[Entry]) -> str:
    """Entries as text, GiB."""
    head = f"{'after':20}{'allocated':>12}{'reserved':>12}{'used':>12}"
    rows = [f"{e.edge:20}" + "".join(f"{getattr(e, kind) / 2**30:12.2f}" for kind in _KINDS) for e in entries]
    return "\n".join([head, *rows])


class Colocated:
    """A rollout engine on the trainer's device. The engine's own verbs, in the one order that works."""

    def __init__(self, make: Callable[[], Any], max_growth_gib: float | None = None):
        """
        Args:
            make: Makes a rollout.Engine, awake, with weights. What it takes of the device is what is called the engine's.
            max_growth_gib: See Ledger.
        """
        before = measure("before the engine").used
        self.engine = make()
        self._engine_bytes = measure("with the engine").used - before
        self._freed = 0
        self.ledger = Ledger(None if max_growth_gib is None else max_growth_gib * 2**30)
        self.asleep = False
        self.pushes = 0
        self.offload: Offload | None = None
        """Trainer states that are on the host while the engine is awake. Set while it sleeps."""
        self._seconds: dict[str, float] = {}

    @property
    def name(self) -> str:
        return self.engine.name

    def generate(self, *args: Any, **options: Any) -> list:
        """The engine's, when it is awake with weights, KV cache and an empty prefix cache."""
        return self._awake(self.engine.generate, *args, **options)

    def generate_until(self, *args: Any, **options: Any) -> tuple[dict, dict]:
        """The engine's, under the same conditions."""
        return self._awake(self.engine.generate_until, *args, **options)

    def _awake(self, verb: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.asleep:
            raise OrderError("generate while the engine sleeps: push the weights first")
        with self._edge("generate"):
            return verb(*args, **options)

    def sleep(self) -> None:
        """The trainer gets the device. Twice in a row is once."""
        if not self.asleep:
            before = measure("awake").used
            with self._edge("sleep"):
                self.engine.sleep()
            self._freed = before - self.ledger.entries[-1].used
            self.asleep = True
            if self.offload is not None:
                with self._edge("fetch_states"):
                    self.offload.to_device()

    def receive(self, weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """The engine gets the device back, with new weights.

        Args:
            weights: Called once there is room: (checkpoint name, tensor) of every weight.
        """
        with self._edge("free_cache"):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        with self._edge("wait_ranks"):
            dist.meet("before the engine wakes")
        offload = self.offload if self.asleep else None
        if offload is not None:
            offload.start()
        if self.asleep:
            with self._edge("wake_weights"):
                self.engine.wake("weights")
        with self._edge("push_weights"):
            self.engine.load_weights(weights())
        if offload is not None:
            with self._edge("offload_states"):
                offload.finish()
        if self.asleep:
            with self._edge("wake_kv_cache"):
                self.engine.wake("kv_cache")
        with self._edge("reset_prefix_cache"):
            self.engine.reset_prefix_cache()
        self.asleep = False

    def close(self) -> None:
        self.engine.close()

    def metrics(self) -> dict[str, float]:
        """timing_s/swap/* and memory/* since the last call. Raises what Ledger.close_step does."""
        seconds, self._seconds = self._seconds, {}
        timings = {f"timing_s/swap/{edge}": value for edge, value in seconds.items() if edge != "generate"}
        return timings | self.ledger.close_step(
            {"memory/engine_gib": self._engine_bytes, "memory/engine_freed_gib": self._freed}
        )

    @contextmanager
    def _edge(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with nvtx.annotate(f"swap/{name}", domain="rlsp_fast"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        self.ledger.note(name)


# --- trainer states on the host ---------------------------------------------------------------


class Offload:
    """Moves tensors to pinned host memory and back, on a side stream, their storages freed in between.

    For trainer states that generation leaves no room for. The tensors stay the same objects, so that optimizers and
    modules keep pointing at them; reading one while it is away is an error of torch (a storage of 0 bytes). The host's buffers
    are made once and kept: pinning memory is slow.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        """
        Args:
            tensors: Those to move, asked for at each move (Adam's moments exist from the first step on).
        """
        self._tensors = tensors
        self._hosts: dict[int, Tensor] = {}  # by the tensor's id
        self._moving: list[tuple[Tensor, Tensor]] = []
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @torch.no_grad()
    def start(self) -> None:
        """Begins to copy to the host. The tensors may be read until `finish`, and not written."""
        assert not self._moving, "already on the host"
        seen: set[int] = set()
        with self._side_stream():
            for tensor in self._tensors():
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                storage = local.untyped_storage()
                if storage.nbytes() == 0 or storage.data_ptr() in seen:
                    continue
                seen.add(storage.data_ptr())
                # The whole storage: a shard of FSDP2 is a part of one that is padded, and the padding is gathered too.
                there = torch.empty(0, dtype=torch.uint8, device=local.device).set_(storage)
                host = self._hosts.get(id(tensor))
                if host is None or len(host) != len(there):
                    host = torch.empty(len(there), dtype=torch.uint8, pin_memory=self._stream is not None)
                    self._hosts[id(tensor)] = host
                host.copy_(there, non_blocking=True)
                self._moving.append((there, host))

    def finish(self) -> int:
        """Waits for the copies and frees the device's memory. Returns its bytes."""
        if self._stream is not None:
            self._stream.synchronize()
        for there, _ in self._moving:
            there.untyped_storage().resize_(0)
        return sum(len(host) for _, host in self._moving)

    def to_device(self) -> None:
        """Everything back where it was. What the device computes next waits for the copies, the host does not."""
        for there, host in self._moving:
            there.untyped_storage().resize_(len(host))
        with self._side_stream():
            for there, host in self._moving:
                there.copy_(host, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._moving = []

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
