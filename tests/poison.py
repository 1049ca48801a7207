"""A rollout engine that models sleep on a CPU: what it gives away is poisoned, what it takes is booked against a budget.

The four verbs of rollout.Engine on a real Hugging Face model. Sleeping fills the weights with NaN; generating with poisoned
weights, without a KV cache, or with a prefix cache of old weights raises what went wrong. A `Device` has a number of bytes
that engine and trainer share, and runs out of them as a GPU would.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rlsp_fast.rollout import TransformersEngine


class Mistake(AssertionError):
    """A verb out of order."""


class OutOfMemory(RuntimeError):
    """The device cannot hold what is asked of it."""


class Device:
    """A number of bytes and who holds them."""

    def __init__(self, size: int):
        self.size, self.held, self.peak = size, {}, 0

    def take(self, who: str, size: int) -> None:
        if sum(self.held.values()) + size > self.size:
            raise OutOfMemory(
                f"out of memory: {who} wants {size} bytes, {self.size - sum(self.held.values())} are free: {self.held}"
            )
        self.held[who] = self.held.get(who, 0) + size
        self.peak = max(self.peak, sum(self.held.values()))

    def give(self, who: str) -> None:
        del self.held[who]


class PoisonEngine(TransformersEngine):
    """See the module. `verbs` has the order in which it was used."""

    name = "poison"

    def __init__(self, *args: object, room: Device, kv_bytes: int, level: int = 2):
        super().__init__(*args)
        self.room, self.kv_bytes, self.level = room, kv_bytes, level
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        self.weights_awake = self.kv_awake = True
        self.prefix_is_stale = False
        self.verbs: list[str] = []
        room.take("engine weights", self.weight_bytes)
        room.take("engine KV cache", kv_bytes)

    def generate_until(self, *args: object, **options: object) -> tuple[dict, dict]:
        self.verbs.append("generate")
        if not self.weights_awake:
            raise Mistake("generate before the weights are awake")
        if not self.kv_awake:
            raise Mistake("generate before the KV cache is awake")
        if any(p.isnan().any() for p in self.model.parameters()):
            raise Mistake("generate with weights that sleep discarded")
        if self.prefix_is_stale:
            raise Mistake("generate with a prefix cache of the weights before")
        return super().generate_until(*args, **options)

    @torch.no_grad()
    def sleep(self) -> None:
        self.verbs.append("sleep")
        if not (self.weights_awake and self.kv_awake):
            raise Mistake("sleep while asleep")
        self.weights_awake = self.kv_awake = False
        if self.level == 2:
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)
        self.room.give("engine weights")
        self.room.give("engine KV cache")

    def wake(self, *tags: str) -> None:
        self.verbs += [f"wake {tag}" for tag in tags]
        if "weights" in tags:
            if self.weights_awake:
                raise Mistake("weights woken twice")
            self.room.take("engine weights", self.weight_bytes)
            self.weights_awake = True
        if "kv_cache" in tags:
            if self.kv_awake:
                raise Mistake("KV cache woken twice")
            self.room.take("engine KV cache", self.kv_bytes)
            self.kv_awake = True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.verbs.append("load_weights")
        if not self.weights_awake:
            raise Mistake("load_weights before the weights are awake")

        def booked() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                self.room.take("push", 2 * self.weight_bytes // 3)  # two layers of the three that the test model is worth
                yield name, tensor
                self.room.give("push")

        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in booked():
                own[name].copy_(tensor)
        self.prefix_is_stale = True

    def reset_prefix_cache(self) -> None:
        self.verbs.append("reset_prefix_cache")
        self.prefix_is_stale = False
