"""AdamW with warm-up and decay, and gradient clipping over all ranks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlsp_fast.config import OptimConfig


class Optimizer:
    """AdamW over float32 master weights with the config's schedule; one `step` clips, updates, and clears gradients."""

    def __init__(self, module: nn.Module, config: OptimConfig, lr: float, total_steps: int):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        rest = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=config.betas, fused=True)
        warmup = math.ceil(config.warmup_ratio * total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw,
            lambda step: lr_factor(step, warmup, total_steps, config.schedule, config.min_lr_ratio),
        )
        self.max_grad_norm = config.max_grad_norm

    def step(self) -> Tensor:
        """Returns the gradient norm before clipping (0-d, no host sync)."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm

    def moments(self) -> Iterator[Tensor]:
        """Adam's two averages of each parameter, from the first step on."""
        for state in self.adamw.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])

    @property
    def num_updates(self) -> int:
        """Steps taken."""
        return self.schedule.last_epoch

    def skip_to(self, num_updates: int) -> None:
        """The learning rates as after that many steps."""
        self.schedule.last_epoch = num_updates - 1
        self.schedule.step()

    @property
    def lr(self) -> float:
        return self.schedule.get_last_lr()[0]


def lr_factor(step: int, warmup: int, total: int, schedule: str, min_ratio: float) -> float:
    """Learning rate over its peak at a step counted from 0.

    >>> [round(lr_factor(s, 2, 6, "linear", 0.0), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "constant":
        return 1.0
    fall = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return min_ratio + (1.0 - min_ratio) * fall
