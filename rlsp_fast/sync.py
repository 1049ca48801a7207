"""The trained weights into the rollout engine, and the proof that they arrived."""

import logging
import re
from collections.abc import Iterator, Sequence

import torch
from rlsp_kernels import linear_logprob_entropy
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from rlsp_fast import dist
from rlsp_fast.memory import Colocated
from rlsp_fast.model import Policy
from rlsp_fast.packing import pack
from rlsp_fast.types import Rollout

log = logging.getLogger(__name__)

CHECK_EVERY = 10
"""Pushes between two checks of every tensor; a push in between checks one in CHECK_EVERY of them, others each time."""

_LAYER = re.compile(r"^(.*\.layers\.\d+)\.")


class StaleWeightsError(RuntimeError):
    """The engine samples from other weights than the trainer holds."""


# --- gathering --------------------------------------------------------------------------------


def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor in dtype on the policy's device) of every weight, one decoder layer gathered at a time.

    Tied names are all yielded: an engine that keeps its own lm_head would otherwise go on with the old one. Every rank must
    consume the iterator to its end. Each tensor is its own storage, never a reused buffer.

    Cost: one all-gather a layer, of the shards in dtype; that of the next layer runs while this one is consumed. Held besides
    the shards: two layers in dtype, this rank's share of one, and one tensor. On one rank: one tensor.
    """
    policy.reshard()  # after a forward without backward the root's parameters are still gathered, in compute dtype
    waiting = [_Gather(bucket, dtype) for bucket in _buckets(policy)]
    for i, gather in enumerate(waiting):
        if i == 0:
            gather.start()
        if i + 1 < len(waiting):
            waiting[i + 1].start()
        yield from gather.finish()
        waiting[i] = None


def _buckets(policy: Policy) -> list[list[tuple[str, Tensor]]]:
    """The weights of each decoder layer together, every other weight alone, in the state dict's order."""
    buckets: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in policy.lm.state_dict().items():
        layer = _LAYER.match(name)
        buckets.setdefault(layer[1] if layer else name, []).append((name, tensor))
    return list(buckets.values())


class _Gather:
    """The weights of one bucket: shards laid end to end, gathered by one collective, taken apart again."""

    def __init__(self, bucket: list[tuple[str, Tensor]], dtype: torch.dtype):
        self.bucket, self.dtype = bucket, dtype
        self.received: Tensor | None = None
        self.work: torch.distributed.Work | None = None

    def start(self) -> None:
        """Starts the collective; every rank must."""
        sharded = [tensor for _, tensor in self.bucket if _shard_dim(tensor) is not None]
        if not sharded:
            return
        mesh, axis = sharded[0].device_mesh, _shard_dim(sharded[0])
        self.world = mesh.size(axis)
        sizes = [_rows(tensor, self.world) * tensor.shape[1:].numel() for tensor in sharded]
        sent = torch.empty(sum(sizes), dtype=self.dtype, device=sharded[0].device)
        for tensor, place in zip(sharded, sent.split(sizes), strict=True):
            local = tensor.to_local().detach().flatten()
            place[: len(local)] = local  # shards of the last ranks have fewer rows: what is sent beyond them is never read
        self.received = sent.new_empty(self.world * len(sent))
        self.work = dist.all_gather_flat(self.received, sent, mesh.get_group(axis))  # keeps `sent`

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """Waits for the collective and yields the bucket's weights."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            by_rank = self.received.view(self.world, -1)
        at = 0
        for name, tensor in self.bucket:
            if _shard_dim(tensor) is None:
                whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
                changes = whole.is_floating_point() and whole.dtype != self.dtype
                yield name, whole.to(self.dtype) if changes else whole.clone()
                continue
            size = _rows(tensor, self.world) * tensor.shape[1:].numel()
            whole = by_rank[:, at : at + size].reshape(-1, *tensor.shape[1:])[: tensor.shape[0]]
            at += size
            yield name, whole
            del whole
        self.received = None


def _shard_dim(tensor: Tensor) -> int | None:
    """The mesh axis that a floating-point DTensor is spread over by rows, if it is."""
    if not isinstance(tensor, DTensor) or not tensor.is_floating_point():
        return None
    axes = [axis for axis, placement in enumerate(tensor.placements) if placement == Shard(0)]
    return axes[0] if len(axes) == 1 and tensor.device_mesh.size(axes[0]) > 1 else None


def _rows(tensor: DTensor, world: int) -> int:
    """Rows of the first, largest shard."""
    return -(-tensor.shape[0] // world)


# --- pushing ----------------------------------------------------------------------------------


def push(policy: Policy, engine: Colocated, dtype: torch.dtype) -> None:
    """The engine wakes with the policy's weights, and shows that it holds them.

    Raises:
        StaleWeightsError: when a tensor that the engine holds is not the one pushed.
    """
    sums: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in full_weights(policy, dtype):
            sums[name], sizes[name] = bit_sum(tensor), tensor.numel()
            yield name, tensor

    engine.receive(watched)
    _check(engine, sums, sizes)
    engine.pushes += 1


@torch.no_grad()
def _check(engine: Colocated, pushed: dict[str, Tensor], sizes: dict[str, int]) -> None:
    """Compares the bits' sums of what was pushed with what is held: all of it every CHECK_EVERY pushes, else a share.

    Cost: reads what it checks once; one wait for the device, one reduction among the ranks of an engine, one among all.
    """
    turn = engine.pushes % CHECK_EVERY
    names, sums, num_held, num_pushed, unknown = [], [], [], [], []
    for i, (name, tensor, parts) in enumerate(engine.engine.held()):
        if tensor.numel() == 0 or not all(part in pushed for part in parts):
            unknown.append(name)
        elif not turn or i % CHECK_EVERY == turn:
            names.append(name)
            sums.append(torch.stack([sum(pushed[part] for part in parts), bit_sum(tensor)]))
            num_held.append(tensor.numel())
            num_pushed.append(sum(sizes[part] for part in parts))
    expected, found = torch.stack(sums, 1).cpu() if sums else torch.zeros(2, 0, dtype=torch.int64)
    cut = [i for i, name in enumerate(names) if num_held[i] < num_pushed[i]]  # this rank holds a share of them
    repeated = []
    if cut:
        found[cut], total = engine.engine.sum_over_shares(torch.stack([found[cut], torch.tensor(num_held)[cut]]))
        for i, size in zip(cut, total.tolist(), strict=True):
            padded = "embed" in names[i] or "lm_head" in names[i]  # with rows of zeros, which add nothing
            if size != num_pushed[i] and not padded:  # some of it stands on several ranks: key and value heads
                repeated.append(i)
    unknown += [names[i] for i in repeated]
    wrong = [i for i in (expected != found).nonzero().flatten().tolist() if i not in repeated]
    num_checked = len(names) - len(repeated)
    if engine.pushes == 0:
        blind = f", not {len(unknown)} that it keeps in another form, such as {unknown[0]}" if unknown else ""
        log.info("every push is checked against the tensors that the engine holds: %d of them%s", num_checked, blind)
    if dist.max_over_ranks([len(wrong)])[0]:
        which = ", ".join(names[i] for i in wrong[:4]) or "those of another rank"
        raise StaleWeightsError(
            f"push {engine.pushes + 1}: the engine does not hold the weights just pushed; of {num_checked} tensors checked "
            f"{len(wrong)} differ: {which}. Nothing was sampled from them: restart from the last checkpoint, and report the "
            f"versions that `rlsp doctor` prints"
        )


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits read as integers, 0-d i64: exact, and the same however a tensor is cut into parts."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(bits).sum(dtype=torch.int64)


# --- the gate ---------------------------------------------------------------------------------


@torch.no_grad()
def probability_difference(
    policy: Policy, rollouts: Sequence[Rollout], temperature: float, max_tokens: int, device: torch.device
) -> tuple[float, float]:
    """(mean, largest) |probability in the engine - in the trainer| of sampled tokens, over all ranks.

    Args:
        rollouts: this rank's, at least one; the first that fit into max_tokens positions are compared.
    Cost: one forward.
    """
    chosen: list[Rollout] = []
    room = max_tokens
    for rollout in rollouts:
        room -= len(rollout.problem.prompt_ids) + len(rollout.response_ids)
        if room < 0 and chosen:
            break
        chosen.append(rollout)
    batch = pack([(r.problem.prompt_ids, r.response_ids) for r in chosen]).to(device)

    def logprob(hidden_TD: Tensor, weight_VD: Tensor, **head: object) -> tuple[Tensor, Tensor]:
        return linear_logprob_entropy(
            hidden_TD,
            weight_VD,
            batch.token_T,
            temperature=temperature,
            need_entropy=False,
            rows_N=batch.rows_N,
            **head,
        )

    ours_T, _ = policy(batch, logprob)
    policy.reshard()
    theirs = torch.tensor([p for r in chosen for p in r.rollout_logprob], dtype=torch.float64)
    diff = (ours_T[batch.rows_N].double().cpu().exp() - theirs.exp()).abs()
    total, count = dist.sum_over_ranks([diff.sum().item(), len(diff)])
    return total / count, dist.max_over_ranks([diff.max().item()])[0]


def verify(mean_diff: float, max_diff: float, limit: float, where: str) -> None:
    """Stops the run when rollouts did not come from the weights just trained.

    Raises:
        StaleWeightsError: when mean |probability in the engine - probability in the trainer| passes limit.
    """
    if not mean_diff <= limit:  # NaN fails too
        raise StaleWeightsError(
            f"{where}: the engine's token probabilities differ from the trainer's by {mean_diff:.4f} in the mean and "
            f"{max_diff:.4f} at most; rollout.max_probs_diff allows {limit:g}. The engine does not hold the trained weights, "
            f"or computes them differently (compare model.dtype; float32 settles rounding)"
        )
