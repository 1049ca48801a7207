"""What a run writes and shows: metrics.jsonl, TensorBoard, W&B, rollouts, a line per step. Rank 0 only."""

import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import datasets
import nvtx
import torch
import transformers
from rich.console import Console

from rlsp_fast import dist
from rlsp_fast.types import Rollout, Score

console = Console(highlight=False, soft_wrap=True)


def setup() -> None:
    """Messages of rlsp_fast to the terminal, from rank 0; warnings from every rank. Libraries' progress bars off."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logger = logging.getLogger("rlsp_fast")
    if not logger.handlers:
        logger.addHandler(_Terminal())
    logger.propagate = False
    logger.setLevel(logging.INFO if dist.rank() == 0 else logging.WARNING)


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class Timer:
    """Seconds per phase. `with timer("gen"):` is also an NVTX range and a torch.profiler range of the same name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        dist.enter(phase)
        with nvtx.annotate(phase, domain="rlsp_fast"), torch.profiler.record_function(phase):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a phase ends when the device has done its work, not when it was asked to
        dist.enter(f"what follows {phase}")
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{phase}": seconds for phase, seconds in self.seconds.items()}


class RunLog:
    """Everything a run appends to. Each line is flushed as it is written, so that a killed run loses none."""

    def __init__(self, folder: Path, loggers: Sequence[str] | None, run_config: Mapping[str, Any], first_step: int):
        self.folder = folder
        self.main = dist.rank() == 0
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= first_step]  # the steps after its checkpoint are redone
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = path.open("a")
        if loggers is None:
            loggers = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
        if "tensorboard" in loggers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if "wandb" in loggers:
            import wandb

            self._wandb = wandb.init(project="rlsp_fast", name=folder.name, dir=str(folder), config=dict(run_config))

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Appends one row; `stage` is sft or rl. TensorBoard gets sft's metrics under `sft/`."""
        if not self.main:
            return
        values = dict(metrics)
        self._metrics.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"sft/{name}" if stage == "sft" else name, value, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}_step": step, **values})

    def line(self, text: str) -> None:
        if self.main:
            console.print(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.main:
            return
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def write_rollouts(folder: Path, name: str, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
    """Writes the responses of all ranks to rollouts/<name>.jsonl, one a line. Every rank calls it."""
    records = [
        {
            **s.extra,
            "source": r.problem.source,
            "index": r.problem.index,
            "sample": r.sample,
            "input": r.problem.messages[-1]["content"],
            "output": r.text,
            "gts": r.problem.answer,
            "reward": s.reward,
            "outcome": s.outcome,
            "exploration": s.exploration,
            "correct": s.correct,
            "verdict": s.verdict,
            "num_tokens": len(r.response_ids),
            "carried": r.num_carried,
            "finish": r.finish,
        }
        for r, s in zip(rollouts, scores, strict=True)
    ]
    parts = dist.gather_objects(records)
    if dist.rank() != 0:
        return
    path = folder / "rollouts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for part in parts for record in part))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that a run appends to; a last line cut short by a kill is left out. No file: no rows."""
    if not path.exists():
        return []
    *whole, rest = path.read_text().split("\n")  # what follows the last line break was never finished
    return [json.loads(line) for line in whole if line.strip()]


def clock(seconds: float) -> str:
    """>>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
