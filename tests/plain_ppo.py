"""PPO as the papers write it: padded batches, one loop after another, float64. Shares no code with rlsp_fast.

Numbers of one response are a list with one entry per response token.
Sources: GAE arXiv:1506.02438; PPO arXiv:1707.06347; dual clip arXiv:1912.09729; GRPO arXiv:2402.03300; RLOO
arXiv:2402.14740; Dr.GRPO arXiv:2503.20783; REINFORCE++ arXiv:2501.03262; AdamW arXiv:1711.05101.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor, nn


@dataclass
class Episode:
    """One response to a prompt."""

    prompt: list[int]
    response: list[int]
    reward: float
    group: int
    sampled_logprob: list[float]


# What the networks say: prompts and responses padded on the right to one length


def padded(episodes: list[Episode]) -> tuple[Tensor, Tensor]:
    rows = [e.prompt + e.response for e in episodes]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attend = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, attend


def policy_outputs(model: nn.Module, episodes: list[Episode], temperature: float) -> list[tuple[Tensor, Tensor]]:
    """(log-probability, entropy) of every response token."""
    ids, attend = padded(episodes)
    logits = model(input_ids=ids, attention_mask=attend).logits / temperature
    outputs = []
    for b, e in enumerate(episodes):
        logprobs, entropies = [], []
        for i, token in enumerate(e.response):
            log_p = torch.log_softmax(logits[b, len(e.prompt) + i - 1], -1)  # the position before the token
            logprobs.append(log_p[token])
            entropies.append(-(log_p.exp() * log_p).sum())
        outputs.append((torch.stack(logprobs), torch.stack(entropies)))
    return outputs


def critic_outputs(backbone: nn.Module, weight: Tensor, bias: Tensor, episodes: list[Episode]) -> list[Tensor]:
    """The value of the state before every response token."""
    ids, attend = padded(episodes)
    hidden = backbone(input_ids=ids, attention_mask=attend).last_hidden_state
    values = []
    for b, e in enumerate(episodes):
        states = [len(e.prompt) + i - 1 for i in range(len(e.response))]
        values.append(torch.stack([hidden[b, t] @ weight[0] + bias for t in states]))
    return values


# Rewards and advantages


def kl(logprob: float, ref_logprob: float, kind: str) -> float:
    r = ref_logprob - logprob
    return {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[kind]


def token_rewards(e: Episode, logprobs: list[float], refs: list[float], kl_coef: float, kind: str) -> list[float]:
    rewards = [-kl_coef * kl(p, q, kind) for p, q in zip(logprobs, refs, strict=True)]
    rewards[-1] += e.reward
    return rewards


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and returns."""
    advantages = [0.0] * len(rewards)
    running = 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        delta = rewards[t] + gamma * next_value - values[t]
        running = delta + gamma * lam * running
        advantages[t] = running
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(rows: list[list[float]]) -> list[list[float]]:
    """To mean 0 and (sample) variance 1 over all tokens."""
    flat = [x for row in rows for x in row]
    m, s = mean(flat), stdev(flat)
    return [[(x - m) / s for x in row] for row in rows]


def rewards_to_go(rewards: list[float], gamma: float) -> list[float]:
    out, running = [], 0.0
    for r in reversed(rewards):
        running = r + gamma * running
        out.insert(0, running)
    return out


def grpo(scores: list[float], groups: list[int]) -> list[float]:
    out = []
    for score, group in zip(scores, groups, strict=True):
        peers = [s for s, g in zip(scores, groups, strict=True) if g == group]
        out.append((score - mean(peers)) / (stdev(peers) + 1e-6))
    return out


def rloo(scores: list[float], groups: list[int]) -> list[float]:
    out = []
    for i, (score, group) in enumerate(zip(scores, groups, strict=True)):
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        out.append(score - mean(others))
    return out


# Losses


def aggregate(rows: list[list[Tensor]], how: str, max_length: int) -> Tensor:
    """One number from the loss of every token."""
    if how == "token_mean":
        flat = [x for row in rows for x in row]
        return sum(flat) / len(flat)
    if how == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) / max_length for row in rows) / len(rows)


def policy_term(ratio: Tensor, advantage: float, low: float, high: float, dual: float | None) -> tuple[Tensor, str]:
    """The clipped loss of one token, and which case it is."""
    bounded = min(max(ratio.item(), 1 - low), 1 + high)
    plain, clipped = ratio * advantage, bounded * advantage
    if plain.item() <= clipped:
        objective, case = plain, "plain"
    else:
        objective, case = torch.tensor(clipped), "high" if advantage > 0 else "low"
    if dual is not None and advantage < 0 and objective.item() < dual * advantage:
        objective, case = torch.tensor(dual * advantage), "dual"
    return -objective, case


def value_term(value: Tensor, old_value: float, target: float, clip: float) -> tuple[Tensor, bool]:
    """The clipped loss of one token, and whether the clip decided it."""
    plain = (value - target) ** 2
    near = old_value + torch.clamp(value - old_value, -clip, clip)
    clipped = (near - target) ** 2
    return 0.5 * torch.maximum(plain, clipped), bool(clipped > plain)


class AdamW:
    """AdamW with betas (0.9, 0.95): gradients scaled to a norm, a cosine from lr to lr / 10, decay on matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, total: int, decay: float, max_norm: float):
        self.parameters = list(parameters)
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.total, self.decay, self.max_norm = lr, total, decay, max_norm
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self) -> None:
        done = len(self.norms)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters))
        self.norms.append(norm)
        lr = self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / self.total)))
        for i, p in enumerate(self.parameters):
            grad = p.grad * min(1.0, self.max_norm / norm)
            self.m[i] = 0.9 * self.m[i] + 0.1 * grad
            self.v[i] = 0.95 * self.v[i] + 0.05 * grad**2
            m, v = self.m[i] / (1 - 0.9 ** (done + 1)), self.v[i] / (1 - 0.95 ** (done + 1))
            p -= lr * (m / (v.sqrt() + 1e-8) + (self.decay * p if p.ndim == 2 else 0.0))
            p.grad = None
