"""Packing: what a position predicts, and how sequences are spread over micro-batches and ranks."""

import random

import pytest
import torch

from rlsp_fast.packing import balance, micro_batches, pack, schedule
from rlsp_fast.types import predicted

SEEDS = range(50)


def draw(seed):
    """Lengths of a batch (equal, spread or heavy-tailed), a number of ranks and a budget that holds the longest."""
    rng = random.Random(seed)
    shape = rng.choice([lambda: 17, lambda: rng.randint(1, 100), lambda: 1 + int(rng.expovariate(1 / 20))])
    lengths = [shape() for _ in range(rng.randint(1, 60))]
    return lengths, rng.randint(1, 8), rng.randint(max(lengths), 3 * max(lengths))


# Off by one


def test_a_position_predicts_the_next_token_and_the_mask_selects_response_tokens():
    inputs, targets, mask = predicted((5, 6), (7, 8, 9))
    assert (inputs, targets, mask) == ((5, 6, 7, 8), (6, 7, 8, 9), [False, True, True, True])


@pytest.mark.parametrize("seed", range(10))
def test_the_masked_targets_are_the_response_and_each_input_precedes_its_target(seed):
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(100) for _ in range(rng.randint(1, 6)))
    response = tuple(rng.randrange(100) for _ in range(rng.randint(1, 6)))
    inputs, targets, mask = predicted(prompt, response)
    assert tuple(t for t, m in zip(targets, mask, strict=True) if m) == response
    assert inputs[0] == prompt[0] and inputs[1:] == targets[:-1]
    assert (prompt + response)[: len(inputs)] == inputs


# Packing


def test_sequences_lie_end_to_end_without_padding():
    batch = pack([((1, 2), (3,)), ((4,), (5, 6, 7)), ((8,), (9,))])
    assert batch.input_T.tolist() == [1, 2, 4, 5, 6, 8]
    assert batch.token_T.tolist() == [2, 3, 5, 6, 7, 9]
    assert batch.mask_T.tolist() == [False, True, True, True, True, True]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.lengths, batch.max_seqlen, batch.num_tokens) == ((2, 3, 1), 3, 6)


def test_a_sequence_that_predicts_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        pack([((1, 2), (3,)), ((4,), ())])


# Micro-batches


@pytest.mark.parametrize("seed", SEEDS)
def test_micro_batches_hold_every_index_once_and_stay_in_the_budget(seed):
    lengths, _, budget = draw(seed)
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= budget for group in groups)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_micro_batches_would_fit_into_one(seed):
    lengths, _, budget = draw(seed)
    totals = sorted(sum(lengths[i] for i in group) for group in micro_batches(lengths, budget))
    assert len(totals) == 1 or totals[0] + totals[1] > budget


def test_a_sequence_over_the_budget_is_refused_with_its_length_and_the_key():
    with pytest.raises(ValueError, match=r"101 tokens.*train\.max_tokens_per_micro_batch = 100"):
        micro_batches([3, 101, 5], 100)
    assert micro_batches([100], 100) == [[0]]


# Ranks


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_get_equal_counts_and_nearly_equal_tokens(seed):
    lengths, num_ranks, _ = draw(seed)
    bins = balance(lengths, num_ranks)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    counts = [len(b) for b in bins]
    assert max(counts) - min(counts) <= 1
    if min(counts):
        totals = [sum(lengths[i] for i in b) for b in bins]
        assert max(totals) - min(totals) <= max(lengths)


def test_a_batch_of_real_size_is_balanced_to_a_thousandth():
    rng = random.Random(0)
    lengths = [1 + int(rng.expovariate(1 / 800)) for _ in range(512)]
    totals = [sum(lengths[i] for i in b) for b in balance(lengths, 8)]
    assert max(totals) < 1.001 * sum(totals) / 8


@pytest.mark.parametrize("seed", SEEDS)
def test_the_schedule_uses_every_index_once_and_gives_all_ranks_as_many_micro_batches(seed):
    lengths, num_ranks, budget = draw(seed)
    ranks = schedule(lengths, num_ranks, budget)
    assert len(ranks) == num_ranks
    assert len({len(groups) for groups in ranks}) == 1
    assert sorted(i for groups in ranks for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget for groups in ranks for group in groups)


def test_a_rank_with_less_to_do_gets_empty_micro_batches():
    assert schedule([10, 10, 10], 2, 10) == [[[0], [2]], [[1], []]]


def test_the_schedule_refuses_a_sequence_over_the_budget():
    with pytest.raises(ValueError, match="101 tokens"):
        schedule([3, 101, 5], 2, 100)
