"""The learning-rate schedule by hand, AdamW's groups, and gradient clipping."""

import math

import pytest
import torch
from torch import nn

from rlsp_fast.config import OptimConfig
from rlsp_fast.optim import Optimizer, lr_factor


def factors(total, **options):
    args = {"warmup": 0, "schedule": "cosine", "min_ratio": 0.1} | options
    return [lr_factor(s, args["warmup"], total, args["schedule"], args["min_ratio"]) for s in range(total + 1)]


def test_a_cosine_falls_from_the_peak_to_the_least_share():
    half = 0.1 + 0.9 * 0.5
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert factors(4) == pytest.approx([1.0, quarter, half, 1.1 - quarter, 0.1])


def test_a_line_falls_from_the_peak_to_the_least_share():
    assert factors(4, schedule="linear", min_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_constant_stays_at_the_peak():
    assert factors(4, schedule="constant") == [1.0] * 5


def test_warmup_rises_from_above_zero_to_the_peak_and_the_fall_takes_the_rest():
    assert factors(6, warmup=2, schedule="linear", min_ratio=0.0) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])


def test_past_the_last_step_the_rate_stays_at_its_least():
    for schedule in ("cosine", "linear"):
        assert lr_factor(100, 2, 6, schedule, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup, total", [(0, 1), (1, 1), (0, 0), (6, 6)])
def test_the_shortest_runs_have_a_rate(warmup, total):
    for schedule in ("cosine", "linear", "constant"):
        assert all(0 < lr_factor(s, warmup, total, schedule, 0.1) <= 1 for s in range(total + 1))


def make(total_steps=10, **keys):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    config = OptimConfig(**({"warmup_ratio": 0.0, "schedule": "linear", "min_lr_ratio": 0.0} | keys))
    return module, Optimizer(module, config, 0.01, total_steps)


def set_gradients(module, value):
    for p in module.parameters():
        p.grad = torch.full_like(p, value)


def test_each_step_moves_by_its_own_rate():
    """With constant gradients and no decay, Adam's step is the learning rate itself."""
    module, optimizer = make(total_steps=4, max_grad_norm=1e9)
    moved = []
    for _ in range(4):
        before = module[0].weight.detach().clone()
        set_gradients(module, 2.0)
        optimizer.step()
        moved.append((before - module[0].weight.detach()).mean().item())
    assert moved == pytest.approx([0.01, 0.0075, 0.005, 0.0025], rel=1e-4)


def test_decay_is_on_matrices_alone():
    module, optimizer = make(weight_decay=0.5)
    before = [p.detach().clone() for p in module.parameters()]
    set_gradients(module, 0.0)
    optimizer.step()
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.01 * 0.5) if p.ndim == 2 else old)


def test_gradients_are_scaled_to_the_norm_and_the_norm_before_is_returned():
    module, optimizer = make(max_grad_norm=0.5)
    seen = {}
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.update({p: p.grad.clone() for p in module.parameters()}))
    set_gradients(module, 3.0)
    norm = optimizer.step()
    count = sum(p.numel() for p in module.parameters())
    assert norm.item() == pytest.approx(3.0 * math.sqrt(count))
    assert math.sqrt(sum(g.square().sum().item() for g in seen.values())) == pytest.approx(0.5, rel=1e-4)


def test_gradients_below_the_norm_are_left_alone():
    module, optimizer = make(max_grad_norm=1e3)
    seen = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(module[0].weight.grad.clone()))
    set_gradients(module, 3.0)
    optimizer.step()
    assert (seen[0] == 3.0).all()


def test_a_step_clears_the_gradients():
    module, optimizer = make()
    set_gradients(module, 1.0)
    optimizer.step()
    assert all(p.grad is None for p in module.parameters())


def test_warmup_takes_its_share_of_all_steps():
    _, optimizer = make(total_steps=100, warmup_ratio=0.03)  # three steps
    rates = []
    optimizer.adamw.register_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[0]["lr"]))
    for _ in range(5):
        optimizer.step()
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01 * 96 / 97])


def test_parameters_without_gradients_are_not_optimised():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = Optimizer(module, OptimConfig(), 0.01, 10)
    assert len(optimizer.parameters) == 1 and optimizer.parameters[0] is module.weight
