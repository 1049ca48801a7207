"""Sequences of different lengths laid end to end, in micro-batches under a token budget, balanced over ranks.

Axes: T packed positions, N of them predict response tokens, S sequences. No padding: T is the sum of the lengths. What a
position predicts: types.predicted.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsp_fast.types import predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """S sequences as one row of T positions; position t predicts token_T[t]."""

    input_T: Tensor
    """(T,) i64 input tokens."""
    token_T: Tensor
    """(T,) i64 target tokens: the next token of the same sequence."""
    mask_T: Tensor
    """(T,) bool, True where the target is a response token."""
    rows_N: Tensor
    """(N,) i64, where mask_T is True. Made on the host, where its length is known without waiting for the device."""
    position_ids: Tensor
    """(T,) i64, from 0 in each sequence."""
    cu_seqlens: Tensor
    """(S + 1,) i32 borders: sequence s is positions cu_seqlens[s] to cu_seqlens[s + 1]."""
    max_seqlen: int
    """Longest sequence, positions."""
    lengths: tuple[int, ...]
    """cu_seqlens' differences on the host, so that nothing waits for the device."""

    def to(self, device: torch.device) -> "PackedBatch":
        names = ("input_T", "token_T", "mask_T", "rows_N", "position_ids", "cu_seqlens")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})

    def idle(self) -> "PackedBatch":
        """The same positions with nothing to learn from."""
        return replace(self, mask_T=torch.zeros_like(self.mask_T), rows_N=self.rows_N[:0])

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def part(self, first: int, last: int) -> "PackedBatch":
        """Sequences first to last - 1 alone, on the same device. Waits for the device."""
        start, end = (sum(self.lengths[:i]) for i in (first, last))
        lengths = self.lengths[first:last]
        mask_T = self.mask_T[start:end]
        return PackedBatch(
            input_T=self.input_T[start:end],
            token_T=self.token_T[start:end],
            mask_T=mask_T,
            rows_N=mask_T.nonzero().squeeze(-1),
            position_ids=self.position_ids[start:end],
            cu_seqlens=self.cu_seqlens[first : last + 1] - start,
            max_seqlen=max(lengths),
            lengths=lengths,
        )


def pack(sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> PackedBatch:
    """Packs (prompt ids, response ids) pairs in the order given.

    Raises:
        ValueError: on a sequence with fewer than two tokens, since it predicts nothing.
    """
    inputs, last, mask, lengths = [], [], [], []
    for prompt_ids, response_ids in sequences:
        if len(prompt_ids) + len(response_ids) < 2:
            raise ValueError("want at least 2 tokens in a sequence: one to read and one to predict")
        x, y, m = predicted(tuple(prompt_ids), tuple(response_ids))
        inputs += x
        last.append(y[-1])
        mask += m
        lengths.append(len(x))
    input_T, mask_T = flat(inputs, torch.int64), flat(mask, torch.bool)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    starts_T = borders[:-1].repeat_interleave(borders.diff())
    token_T = input_T.roll(-1)  # targets are inputs one position on, but for each sequence's last: half of them need no list
    token_T[borders[1:] - 1] = flat(last, torch.int64)
    return PackedBatch(
        input_T=input_T,
        token_T=token_T,
        mask_T=mask_T,
        rows_N=mask_T.nonzero().squeeze(-1),
        position_ids=torch.arange(len(starts_T)) - starts_T,
        cu_seqlens=borders.to(torch.int32),
        max_seqlen=max(lengths, default=0),
        lengths=tuple(lengths),
    )


def flat(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """torch.tensor(numbers, dtype=dtype), a fifth to a tenth of its time: packing would otherwise wait for it.

    Args:
        numbers: ints for bool and int64, floats for float32.
    """
    if not numbers:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(bytearray(numbers), dtype=dtype)
    code, held = {torch.int64: ("q", torch.int64), torch.float32: ("d", torch.float64)}[dtype]
    return torch.frombuffer(array(code, numbers), dtype=held).to(dtype)


def balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices in num_bins bins of near-equal total length: longest first, each into the emptiest bin.

    Bins hold equal counts (they differ by one at most), so that every rank has work; ties go to the lower bin, so that
    every rank computes the same answer.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    room = [len(lengths) // num_bins + (b < len(lengths) % num_bins) for b in range(num_bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        b = min((b for b in range(num_bins) if len(bins[b]) < room[b]), key=lambda b: (totals[b], b))
        bins[b].append(i)
        totals[b] += lengths[i]
    return [sorted(b) for b in bins]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that no group passes max_tokens: first-fit decreasing, within 22 % of the fewest groups.

    Raises:
        ValueError: when one sequence alone passes max_tokens.
    """
    groups: list[list[int]] = []
    totals: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > max_tokens:
            raise ValueError(
                f"a sequence of {lengths[i]} tokens is longer than train.max_tokens_per_micro_batch = {max_tokens}"
            )
        g = next((g for g, total in enumerate(totals) if total + lengths[i] <= max_tokens), len(groups))
        if g == len(groups):
            groups.append([])
            totals.append(0)
        groups[g].append(i)
        totals[g] += lengths[i]
    return groups


def schedule(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Per rank, its micro-batches as lists of indices: near-equal tokens and exactly equal counts on every rank.

    FSDP's collectives need every rank in every forward, so a rank with fewer micro-batches gets empty ones: it runs any
    sequence with weight 0.
    """
    split = [
        [[share[i] for i in group] for group in micro_batches([lengths[i] for i in share], max_tokens)]
        for share in balance(lengths, num_ranks)
    ]
    count = max(len(groups) for groups in split)
    return [groups + [[]] * (count - len(groups)) for groups in split]
