"""Ranks: one process each, started by torchrun or alone. The same code on gloo (CPU) and NCCL (GPU)."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlsp_fast.config import ConfigError

RANK_TIMEOUT_S = 1800.0
"""Seconds that one rank waits for another before it gives up."""

_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/cuda/")
"""Files of torch in which a rank stands that waits for others: collectives, backward's hooks, the device."""

_ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_set_alone = False
_meeting: dist.ProcessGroup | None = None
_watch: "_HangWatch | None" = None


class HungRankError(RuntimeError):
    """A rank that did not arrive where the others wait; the message names it and the phase."""


def setup(timeout_s: float = RANK_TIMEOUT_S) -> torch.device:
    """Joins the process group (a group of one without torchrun) and returns this rank's device."""
    global _set_alone, _meeting
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(zip(_ALONE, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))
        _set_alone = True
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside NCCL: metrics and weights for checkpoints are reduced on the host
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        # Later than the watch, which names who is missing: a collective that times out ends the rank that waited.
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s + 300))
    if _meeting is None and world_size() > 1:
        _meeting = dist.new_group(backend="gloo")
    return device


def cleanup() -> None:
    """Leaves the process group, and the environment as setup found it: a child process is no rank of ours."""
    global _set_alone, _meeting, _watch
    if _watch is not None:
        _watch.stop()
    _meeting = _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()
    if _set_alone:
        for name in _ALONE:
            os.environ.pop(name, None)
        _set_alone = False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mesh(device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """FSDP mesh: one axis, or (replicate, shard) when shard_size is smaller than the world (HSDP)."""
    n = world_size()
    shard_size = shard_size or n
    if n % shard_size:
        raise ConfigError(f"train.fsdp_shard_size = {shard_size} does not divide the number of ranks, {n}")
    if shard_size == n:
        return init_device_mesh(device.type, (n,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (n // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(values: Iterable[float]) -> list[float]:
    """Elementwise sum over ranks, in float64; every rank gets it."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Iterable[float]) -> list[float]:
    """Elementwise maximum over ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Iterable[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    x = torch.tensor(list(values), dtype=torch.float64)
    if world_size() > 1 and len(x):
        dist.all_reduce(x, op)
    return x.tolist()


def all_gather_flat(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts an all-gather of equal parts into one tensor. (torch 2.13 renamed it and warns of the old name.)"""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return gather(received, sent, group=group, async_op=True)


def gather_objects(value: object) -> list:
    """One object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    out: list = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def watch(limit_s: float = RANK_TIMEOUT_S, interval_s: float = 10.0) -> None:
    """From here on, a rank that the others have waited for longer than limit_s ends the run, named with its phase.

    A collective that times out says neither, and NCCL's waits on the device, where nothing can be caught. On one rank: nothing.
    """
    global _watch
    if world_size() > 1 and _watch is None:
        _watch = _HangWatch(limit_s, interval_s)


def enter(phase: str) -> None:
    """Tells the watch what this rank does now. Every rank must enter the same phases in the same order."""
    if _watch is not None:
        _watch.enter(phase)


class _HangWatch:
    """A thread that publishes this rank's phase, and compares those of all ranks when this one waits for too long."""

    def __init__(self, limit_s: float, interval_s: float):
        self.limit_s, self.interval_s = limit_s, interval_s
        self.at = (0, "start", time.monotonic())  # one tuple, replaced whole: the thread reads it at any moment
        # A connection of its own: the process group's may be taken by the collective that hangs.
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
        )
        self.main = threading.main_thread().ident
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self.thread.start()

    def enter(self, phase: str) -> None:
        self.at = (self.at[0] + 1, phase, time.monotonic())

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        beat, looks = 0, deque(maxlen=3)
        while not self.stopped.wait(self.interval_s):
            count, phase, since = self.at
            waited, beat = time.monotonic() - since, beat + 1
            frame = sys._current_frames()[self.main]
            code = frame.f_code
            mine = {"count": count, "phase": phase, "waited": waited, "beat": beat}
            mine["where"] = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            mine["waits"] = any(part in code.co_filename for part in _WAITING)
            self.store.set(f"rlsp_fast/{rank()}", json.dumps(mine))
            if waited <= self.limit_s:
                looks.clear()
                continue
            looks.append(self._look())
            if len(looks) == looks.maxlen and (message := self._verdict(count, list(looks))):
                print(f"rlsp: {message}", file=sys.stderr, flush=True)
                os._exit(3)  # nothing in this process can be waited for

    def _verdict(self, count: int, looks: list[dict[int, dict]]) -> str | None:
        """Who is behind this rank, by some looks at all; None when nobody is, or when a rank before this one will say it."""
        before, now = looks[0], looks[-1]
        silent = [r for r in now if now[r]["beat"] == before[r]["beat"] and r != rank()]
        behind = [r for r in now if now[r]["count"] < count or r in silent]
        if not behind:  # all in one phase: some stand in a collective all along, and who does not keeps them there
            standing = [r for r in now if all(look[r]["waits"] and look[r]["where"] == now[r]["where"] for look in looks)]
            behind = [r for r in now if not any(look[r]["waits"] for look in looks)] if rank() in standing else []
        if not behind or rank() != min(set(now) - set(behind)):
            return None
        who = "; ".join(
            f"rank {r} hangs in {now[r]['phase']} at {now[r]['where']}, for {now[r]['waited']:,.0f} s"
            + (", and does not even answer" if r in silent else "")
            for r in behind
        )
        return f"{who}. The others wait in {now[rank()]['phase']} at {now[rank()]['where']}; rank {rank()} gave up"

    def _look(self) -> dict[int, dict]:
        found = {}
        for r in range(world_size()):
            key = f"rlsp_fast/{r}"
            never = {"count": -1, "phase": "start", "waited": 0.0, "beat": 0, "where": "an unknown place", "waits": False}
            found[r] = json.loads(self.store.get(key)) if self.store.check([key]) else never
        return found


def meet(phase: str, timeout_s: float = RANK_TIMEOUT_S) -> None:
    """A barrier that names who is missing.

    Raises:
        HungRankError: on rank 0 after timeout_s with the ranks that did not come, on the others when rank 0 gives up.
    """
    if world_size() == 1:
        return
    try:
        dist.monitored_barrier(_meeting, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        missing = re.search(r"Ranks? ([\d, ]+) failed", str(error))
        who = f"rank {missing[1].strip()} did not arrive" if missing else "a rank did not arrive"
        raise HungRankError(f"{phase}: {who} within {timeout_s:g} s; rank {rank()} gave up") from None
