"""Log-probabilities from hidden states, through code that asks a model for its logits and then scores them.

While such code runs, the model's output projection hands its input on, so that what the code takes for logits (B, L, V) are
hidden states (B, L, D); the functions that score logits know it and project a few rows at a time.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rlsp_kernels.linear import linear_logprob_entropy

_PLAIN = re.compile(r"self\.lm_head\(hidden_states\[[^()]*\]\)")


class Head:
    """The output projection of a model whose logits are being scored."""

    def __init__(self, linear: nn.Linear, logits_budget: int) -> None:
        self.linear, self.logits_budget = linear, logits_budget
        self.dtype: torch.dtype | None = None  # of the logits, known once the model has run

    def hand_on(self, hidden: Tensor) -> Tensor:
        """The projection's forward meanwhile."""
        device = hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return hidden

    def scores(self, hidden: Tensor, index: Tensor, temperature: float, need_entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probability of index (...) and entropy, from hidden (..., D)."""
        logprob, entropy = linear_logprob_entropy(
            hidden.reshape(-1, hidden.shape[-1]).to(self.dtype),  # what mixed precision widened on the way out goes back
            self.linear.weight,
            index.reshape(-1),
            bias_V=self.linear.bias,
            temperature=temperature,
            need_entropy=need_entropy,
            logits_dtype=self.dtype,
            logits_budget=self.logits_budget,
        )
        return logprob.view(index.shape), entropy.view(index.shape)


current: ContextVar[Head | None] = ContextVar("current", default=None)


def without_logits(logits_budget: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a method(trainer, model, ...) that runs as it is, but never holds logits where the model allows it.

    Where it does not, a warning says why, once, and the method runs on logits.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            lm = self.accelerator.unwrap_model(model)
            obstacle = why_not(lm)
            if obstacle is not None:
                _say_once(f"{type(lm).__name__}: the logits are held, since {obstacle}")
                return original(self, model, *args, **kwargs)
            with _handing_on(Head(lm.get_output_embeddings(), logits_budget)):
                return original(self, model, *args, **kwargs)

        return method

    return replacement


def why_not(lm: nn.Module) -> str | None:
    """What is in the way of leaving out the logits of a model, if anything is."""
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in vars(head):
        return "its output projection is no plain nn.Linear"
    if head._forward_hooks or head._forward_pre_hooks:
        return "its output projection has hooks"
    if hasattr(head.weight, "ds_id") or len(head.weight) != head.out_features:
        return "its output projection is sharded"
    try:
        source = inspect.getsource(type(lm).forward)
    except OSError:
        return "the source of its forward cannot be read"
    steps = re.findall(r"^\s*logits\s*[-+*/]?= ?(?!logits,)(.*)", source, re.MULTILINE)
    if len(steps) != 1 or not _PLAIN.fullmatch(steps[0]):
        return "its forward does more to the logits than self.lm_head(hidden_states[...])"
    return None


@contextmanager
def _handing_on(head: Head) -> Iterator[None]:
    token = current.set(head)
    head.linear.forward = head.hand_on
    try:
        yield
    finally:
        del head.linear.forward
        current.reset(token)


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
