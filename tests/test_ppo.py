"""rlsp_fast.ppo against hand-computed cases and against an independent plain PPO (plain_ppo.py) on a tiny model.

Before losses are compared, policy and critic are moved away from where the rollouts were annotated, so that every clip
is at work. The plain side computes in float64.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import plain_ppo
import pytest
import tiny
import torch
from rlsp_kernels import packed_gae
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlsp_fast import dist, model
from rlsp_fast.log import Timer
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.ppo import PPO, MicroBatch, Sample

SMALL = {"max_tokens_per_micro_batch": 24}  # the longest sequence has 23 positions: many micro-batches


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of the policy (also the critic's backbone) and of a reference that differs from it."""
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_model(folder, "llama", seed=0), tiny.save_model(folder, "llama", seed=1)


def make_ppo(paths, device, config) -> PPO:
    mesh = dist.mesh(device)
    policy = model.build(Policy, config.model, paths[0], device, mesh)
    ref = model.build(Policy, config.model, paths[1], device, mesh, trained=False)
    critic = critic_optimizer = None
    if config.algorithm.advantage == "gae":
        critic = model.build(Critic, config.model, paths[0], device, mesh)
        weight, bias = value_head()
        with torch.no_grad():
            critic.value_head.weight.to_local().copy_(weight)
            critic.value_head.bias.to_local().copy_(bias)
        critic_optimizer = Optimizer(critic, config.optim, config.optim.critic_lr, 10)
    actor_optimizer = Optimizer(policy, config.optim, config.optim.actor_lr, 10)
    return PPO(config, policy, actor_optimizer, critic, critic_optimizer, ref, device)


def value_head():
    """A critic that has learned something: its weights (the built one starts at 0)."""
    generator = torch.Generator().manual_seed(5)
    return 0.1 * torch.randn(1, 32, generator=generator, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def by_sample(micros: list[MicroBatch], samples: list[Sample], name: str) -> list[list[float]]:
    """A per-token tensor of the micro-batches as one list per sample, response tokens only."""
    rows = {}
    for m in micros:
        sizes = list(m.batch.lengths)
        for reward, x, mask in zip(m.reward_S, getattr(m, name).split(sizes), m.batch.mask_T.split(sizes), strict=True):
            rows[reward.item()] = x[mask].tolist()
    return [rows[torch.tensor(s.reward).item()] for s in samples]


def assert_rows_close(ours: list[list[float]], expected: list[list[float]], atol: float = 1e-5) -> None:
    assert [len(row) for row in ours] == [len(row) for row in expected]
    for row, truth in zip(ours, expected, strict=True):
        assert row == pytest.approx(truth, abs=atol, rel=1e-5)


def assert_gradients_close(ours: dict, expected: dict, rtol: float = 2e-5) -> None:
    """Per parameter, the norm of the difference against the norm; tiny gradients against the largest."""
    assert ours.keys() == expected.keys()
    largest = max(grad.norm() for grad in expected.values())
    for name, truth in expected.items():
        error = (ours[name] - truth).norm()
        assert error <= rtol * truth.norm() + 1e-6 * largest, f"{name}: {error:.2e} of {truth.norm():.2e}"


# --- the plain side -------------------------------------------------------------------------------


@dataclass
class Plain:
    """Plain PPO's view of the same samples."""

    policy: torch.nn.Module
    backbone: torch.nn.Module
    weight: torch.Tensor
    bias: torch.Tensor
    episodes: list[plain_ppo.Episode]
    logprobs: list[list[float]]
    refs: list[list[float]]
    values: list[list[float]]

    @property
    def groups(self):
        return [e.group for e in self.episodes]

    def rewards(self, kl_coef, kind="k1"):
        rows = zip(self.episodes, self.logprobs, self.refs, strict=True)
        return [plain_ppo.token_rewards(e, p, q, kl_coef, kind) for e, p, q in rows]


def plain_side(paths, samples, temperature=0.8) -> Plain:
    policy, ref, backbone = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        for path in (paths[0], paths[1], paths[0])
    )
    weight, bias = (torch.nn.Parameter(x) for x in value_head())
    episodes = [
        plain_ppo.Episode(list(s.prompt_ids), list(s.response_ids), s.reward, s.group, list(s.rollout_logprob)) for s in samples
    ]
    with torch.no_grad():
        logprobs = [p.tolist() for p, _ in plain_ppo.policy_outputs(policy, episodes, temperature)]
        refs = [p.tolist() for p, _ in plain_ppo.policy_outputs(ref, episodes, temperature)]
        values = [v.tolist() for v in plain_ppo.critic_outputs(backbone.model, weight, bias, episodes)]
    return Plain(policy, backbone.model, weight, bias, episodes, logprobs, refs, values)


# --- annotate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    return tiny.samples(4, n=3)


@pytest.fixture(scope="module")
def plain(paths, samples):
    return plain_side(paths, samples)


def annotated(paths, device, samples, **algorithm):
    config = tiny.recipe(paths[0], algorithm=algorithm, rollout={"n": 3}, train=SMALL)
    ppo = make_ppo(paths, device, config)
    mini_batches = ppo.pack(samples)
    metrics = ppo.annotate(mini_batches, Timer())
    return ppo, [m for mini_batch in mini_batches for m in mini_batch], metrics


def test_logprobs_and_values_are_the_plain_ones(paths, device, samples, plain):
    _, micros, _ = annotated(paths, device, samples)
    assert len(micros) > 3
    assert_rows_close(by_sample(micros, samples, "old_logprob_T"), plain.logprobs)
    assert_rows_close(by_sample(micros, samples, "ref_logprob_T"), plain.refs)
    assert_rows_close(by_sample(micros, samples, "value_T"), plain.values)
    assert_rows_close(by_sample(micros, samples, "rollout_logprob_T"), [list(s.rollout_logprob) for s in samples])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_token_rewards_are_the_kl_penalty_and_the_score_at_the_end(paths, device, samples, plain, kind):
    _, micros, _ = annotated(paths, device, samples, kl_coef=0.3, kl_kind=kind)
    assert_rows_close(by_sample(micros, samples, "token_reward_T"), plain.rewards(0.3, kind))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.95, 0.0)])
def test_advantages_and_returns_are_those_of_plain_gae(paths, device, samples, plain, gamma, lam):
    pairs = [plain_ppo.gae(r, v, gamma, lam) for r, v in zip(plain.rewards(0.1), plain.values, strict=True)]
    advantages, returns = [a for a, _ in pairs], [r for _, r in pairs]
    options = {"gamma": gamma, "lam": lam, "kl_coef": 0.1}
    _, micros, _ = annotated(paths, device, samples, whiten=False, **options)
    assert_rows_close(by_sample(micros, samples, "advantage_T"), advantages)
    assert_rows_close(by_sample(micros, samples, "return_T"), returns)
    _, micros, metrics = annotated(paths, device, samples, whiten=True, **options)
    assert_rows_close(by_sample(micros, samples, "advantage_T"), plain_ppo.whiten(advantages))
    assert_rows_close(by_sample(micros, samples, "return_T"), returns)  # the critic's targets are not whitened
    assert metrics["critic/advantages/mean"] == pytest.approx(0, abs=1e-6)


def test_gae_of_three_tokens_by_hand(device):
    # rewards 0, 0, 4; values 1, 2, 3; gamma 0.5, lambda 0.5
    # deltas: 0 + 1 - 1 = 0; 0 + 1.5 - 2 = -0.5; 4 - 3 = 1. A3 = 1, A2 = -0.5 + 0.25 = -0.25, A1 = 0 - 0.0625
    out = packed_gae(
        torch.tensor([9.0, 1.0, 2.0, 3.0, 7.0]),  # a prompt position before, another sequence after
        torch.tensor([0, 4, 5], dtype=torch.int32),
        torch.tensor([False, True, True, True, True]),
        gamma=0.5,
        lam=0.5,
        terminal_reward_S=torch.tensor([4.0, 1.0]),
    )
    assert out.reward_T.tolist() == [0, 0, 0, 4, 1]
    assert out.advantage_T.tolist() == [0, -0.0625, -0.25, 1, -6]
    assert out.return_T.tolist() == [0, 0.9375, 1.75, 4, 1]


def test_gae_by_hand_reaches_the_micro_batches(paths, device):
    """The critic starts at 0: with gamma 1 and lambda 0.5 a response of three tokens earns R/4, R/2, R."""
    config = tiny.recipe(paths[0], algorithm={"lam": 0.5, "kl_coef": 0.0, "whiten": False})
    ppo = make_ppo(paths, device, config)
    ppo.ref = None
    ppo.critic = model.build(Critic, config.model, paths[0], device, dist.mesh(device))
    sample = Sample(group=0, prompt_ids=(3, 4), response_ids=(5, 6, 7), rollout_logprob=(-1.0,) * 3, reward=2.0)
    mini_batches = ppo.pack([sample])
    ppo.annotate(mini_batches, Timer())
    assert mini_batches[0][0].advantage_T.tolist() == [0, 0.5, 1, 2]
    assert mini_batches[0][0].return_T.tolist() == [0, 0.5, 1, 2]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_group_advantages_are_the_plain_ones_on_every_token(paths, device, samples, plain, estimator):
    scores = [sum(row) for row in plain.rewards(0.1)]
    expected = getattr(plain_ppo, estimator)(scores, plain.groups)
    _, micros, _ = annotated(paths, device, samples, advantage=estimator, kl_coef=0.1)
    ours = by_sample(micros, samples, "advantage_T")
    assert_rows_close(ours, [[a] * len(s.response_ids) for a, s in zip(expected, samples, strict=True)], atol=1e-4)
    assert all((m.advantage_T[~m.batch.mask_T] == 0).all() for m in micros)


def test_a_group_of_equal_rewards_has_no_grpo_advantage(paths, device):
    drawn = tiny.samples(2, n=3)
    equal = [
        Sample(
            group=s.group,
            prompt_ids=s.prompt_ids,
            response_ids=s.response_ids,
            rollout_logprob=s.rollout_logprob,
            reward=0.3,
        )
        for s in drawn
    ]
    _, micros, _ = annotated(paths, device, equal, advantage="grpo", kl_coef=0.0)
    assert max(m.advantage_T.abs().max().item() for m in micros) < 1e-6


def test_reinforce_plus_plus_whitens_the_rewards_to_go(paths, device, samples, plain):
    to_go = [plain_ppo.rewards_to_go(row, 0.9) for row in plain.rewards(0.1)]
    options = {"advantage": "reinforce_plus_plus", "gamma": 0.9, "kl_coef": 0.1}
    _, micros, _ = annotated(paths, device, samples, **options)
    assert_rows_close(by_sample(micros, samples, "advantage_T"), plain_ppo.whiten(to_go))
    _, micros, _ = annotated(paths, device, samples, whiten=False, **options)
    assert_rows_close(by_sample(micros, samples, "advantage_T"), to_go)


def test_the_metrics_of_annotate_say_what_they_say(paths, device, samples, plain):
    _, _, metrics = annotated(paths, device, samples, kl_coef=0.1)
    pairs = list(zip(plain.rewards(0.1), plain.values, strict=True))
    returns = torch.tensor([x for r, v in pairs for x in plain_ppo.gae(r, v, 1.0, 0.95)[1]])
    values = torch.tensor([x for row in plain.values for x in row])
    old = torch.tensor([x for row in plain.logprobs for x in row])
    ref = torch.tensor([x for row in plain.refs for x in row])
    rollout = torch.tensor([x for s in samples for x in s.rollout_logprob])
    diff = (old.exp() - rollout.exp()).abs()
    expected = {
        "training/rollout_probs_diff_mean": diff.mean(),
        "training/rollout_probs_diff_max": diff.max(),
        "training/mismatch_kl": ((old - rollout).exp() - 1 - (old - rollout)).mean(),
        "critic/returns/mean": returns.mean(),
        "critic/values/mean": values.mean(),
        "critic/vf_explained_var": 1 - (returns - values).var() / returns.var(),
        "actor/ref_kl": (old - ref).mean(),
    }
    for name, truth in expected.items():
        assert metrics[name] == pytest.approx(truth.item(), abs=2e-5, rel=2e-5), name


# --- losses and gradients -----------------------------------------------------------------------------

MOVED = {"seed": 11, "scale": 0.012}  # how far policy and critic are moved after annotate
OPTIONS = {
    "clips": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.25},
    "dual clip": {"dual_clip": 1.2},
    "importance sampling": {"tis_cap": 1.5},
    "kl k1 in the loss": {"kl_loss_coef": 0.2, "kl_loss_kind": "k1"},
    "kl k2 in the loss": {"kl_loss_coef": 0.2, "kl_loss_kind": "k2"},
    "kl k3 in the loss": {"kl_loss_coef": 0.2},
    "entropy bonus": {"entropy_coef": 0.1},
    "everything": {"dual_clip": 1.3, "tis_cap": 2.0, "kl_loss_coef": 0.1, "entropy_coef": 0.05},
}


def plain_policy_loss(plain, samples, advantages, algorithm, max_length=12):
    """Loss, its policy-gradient term alone, and how many tokens fell into each case of the clip. Runs backward."""
    a = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "dual_clip": None, "tis_cap": None, "kl_loss_coef": 0.0}
    a |= {"kl_loss_kind": "k3", "entropy_coef": 0.0, "loss_aggregation": "token_mean"} | algorithm
    rows, pg_rows, cases = [], [], Counter()
    for i, (logprobs, entropies) in enumerate(plain_ppo.policy_outputs(plain.policy, plain.episodes, 0.8)):
        row, pg_row = [], []
        for t, (logprob, entropy) in enumerate(zip(logprobs, entropies, strict=True)):
            old, ref = plain.logprobs[i][t], plain.refs[i][t]
            ratio = (logprob - old).exp()
            pg, case = plain_ppo.policy_term(ratio, advantages[i][t], a["clip_ratio_low"], a["clip_ratio_high"], a["dual_clip"])
            if a["tis_cap"] is not None:
                pg = pg * min(float(torch.tensor(old - samples[i].rollout_logprob[t]).exp()), a["tis_cap"])
            r = ref - logprob
            divergence = {"k1": -r, "k2": r * r / 2, "k3": r.exp() - 1 - r}[a["kl_loss_kind"]]
            row.append(samples[i].weight * (pg + a["kl_loss_coef"] * divergence - a["entropy_coef"] * entropy))
            pg_row.append(samples[i].weight * pg)
            cases[case] += 1
        rows.append(row)
        pg_rows.append(pg_row)
    loss = plain_ppo.aggregate(rows, a["loss_aggregation"], max_length)
    loss.backward()
    pg = plain_ppo.aggregate(pg_rows, a["loss_aggregation"], max_length)
    return loss.item(), pg.item(), cases


def actor_gradients(ppo, micros):
    """What update would hand to the optimizer, and the merged metrics."""
    stats = None
    for m in micros:
        part = ppo._actor_backward(m)
        stats = part if stats is None else stats.merge(part)
    return stats, {name.removeprefix("lm."): grad for name, grad in tiny.gradients(ppo.policy).items()}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_policy_loss_and_gradients_are_the_plain_ones(paths, device, samples, options, aggregation):
    algorithm = options | {"loss_aggregation": aggregation, "kl_coef": 0.1}
    ppo, micros, _ = annotated(paths, device, samples, **algorithm)
    advantages = by_sample(micros, samples, "advantage_T")
    plain = plain_side(paths, samples)
    tiny.jitter(ppo.policy.lm, **MOVED)
    tiny.jitter(plain.policy, **MOVED)
    stats, ours = actor_gradients(ppo, micros)
    _, pg_loss, cases = plain_policy_loss(plain, samples, advantages, algorithm)
    assert_gradients_close(ours, tiny.gradients(plain.policy))
    assert stats.pg_loss.item() == pytest.approx(pg_loss, abs=1e-5)
    assert (stats.clip_low, stats.clip_high, stats.dual_clip) == (cases["low"], cases["high"], cases["dual"])
    assert cases["low"] and cases["high"] and cases["plain"], "the case is too tame to show anything"
    assert cases["dual"] or "dual_clip" not in options
    assert stats.num_tokens == sum(cases.values())


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_policy_gradients_without_a_critic_are_the_plain_ones(paths, device, samples, estimator):
    ppo, micros, _ = annotated(paths, device, samples, advantage=estimator, kl_coef=0.1)
    assert ppo.critic is None
    plain = plain_side(paths, samples)
    rewards = plain.rewards(0.1)
    if estimator == "reinforce_plus_plus":
        advantages = plain_ppo.whiten([plain_ppo.rewards_to_go(row, 1.0) for row in rewards])
    else:
        of_response = getattr(plain_ppo, estimator)([sum(row) for row in rewards], plain.groups)
        advantages = [[a] * len(row) for a, row in zip(of_response, rewards, strict=True)]
    tiny.jitter(ppo.policy.lm, **MOVED)
    tiny.jitter(plain.policy, **MOVED)
    _, ours = actor_gradients(ppo, micros)
    plain_policy_loss(plain, samples, advantages, {})
    assert_gradients_close(ours, tiny.gradients(plain.policy), rtol=5e-5)


@pytest.mark.parametrize(
    "aggregation, of_policy",
    [
        ("token_mean", [1 / 8, 1 / 8, 1 / 32, 1 / 32]),
        ("sequence_mean", [1 / 4, 1 / 12, 1 / 32, 1 / 32]),
        ("dr_grpo", [1 / 48, 1 / 48, 1 / 192, 1 / 192]),  # a limit of 12 tokens
    ],
)
def test_the_weights_of_a_down_weighted_problem_by_hand(paths, device, aggregation, of_policy):
    """Two problems of two responses, 1 and 3 tokens, 2 and 2. The second problem weighs 1/4; denominators count it in full."""
    config = tiny.recipe(paths[0], algorithm={"loss_aggregation": aggregation}, rollout={"n": 2})
    samples = [
        Sample(
            group=group,
            prompt_ids=(3, 4),
            response_ids=(5, 6, 7)[:length],
            rollout_logprob=(-1.0,) * length,
            reward=float(i),
            weight=weight,
        )
        for i, (group, length, weight) in enumerate([(0, 1, 1.0), (0, 3, 1.0), (1, 2, 0.25), (1, 2, 0.25)])
    ]
    (micros,) = make_ppo(paths, device, config).pack(samples)
    lengths = [len(s.response_ids) for s in samples]
    assert_rows_close(by_sample(micros, samples, "weight_T"), [[w] * n for w, n in zip(of_policy, lengths, strict=True)])
    of_critic = [1 / 8, 1 / 8, 1 / 32, 1 / 32]  # the mean over tokens, always
    assert_rows_close(by_sample(micros, samples, "critic_weight_T"), [[w] * n for w, n in zip(of_critic, lengths, strict=True)])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_policy_loss_and_gradients_of_down_weighted_problems_are_the_plain_ones(paths, device, samples, aggregation):
    weighted = [replace(s, weight=0.25 if s.group % 2 else 1.0) for s in samples]
    algorithm = OPTIONS["everything"] | {"loss_aggregation": aggregation, "kl_coef": 0.1}
    ppo, micros, _ = annotated(paths, device, weighted, **algorithm)
    plain = plain_side(paths, weighted)
    tiny.jitter(ppo.policy.lm, **MOVED)
    tiny.jitter(plain.policy, **MOVED)
    stats, ours = actor_gradients(ppo, micros)
    _, pg_loss, cases = plain_policy_loss(plain, weighted, by_sample(micros, weighted, "advantage_T"), algorithm)
    assert_gradients_close(ours, tiny.gradients(plain.policy))
    assert stats.pg_loss.item() == pytest.approx(pg_loss, abs=1e-5) and stats.num_tokens == sum(cases.values())


def critic_gradients(ppo, micros):
    loss, num_clipped, num_tokens = torch.stack([ppo._critic_backward(m) for m in micros]).sum(0).tolist()
    return (loss, num_clipped, num_tokens), tiny.gradients(ppo.critic)


@pytest.mark.parametrize("clip, weight", [(0.02, 1.0), (0.2, 1.0), (0.02, 0.25)])
def test_value_loss_and_gradients_are_the_plain_ones(paths, device, samples, clip, weight):
    samples = [replace(s, weight=weight if s.group % 2 else 1.0) for s in samples]
    ppo, micros, _ = annotated(paths, device, samples, value_clip=clip, kl_coef=0.1)
    plain = plain_side(paths, samples)
    pairs = zip(plain.rewards(0.1), plain.values, strict=True)
    returns = [plain_ppo.gae(r, v, 1.0, 0.95)[1] for r, v in pairs]
    tiny.jitter(ppo.critic.lm.model, **MOVED)
    tiny.jitter(plain.backbone, **MOVED)
    rows, clipped = [], 0
    for i, values in enumerate(plain_ppo.critic_outputs(plain.backbone, plain.weight, plain.bias, plain.episodes)):
        terms = [plain_ppo.value_term(v, plain.values[i][t], returns[i][t], clip) for t, v in enumerate(values)]
        rows.append([samples[i].weight * term for term, _ in terms])
        clipped += sum(is_clipped for _, is_clipped in terms)
    expected_loss = plain_ppo.aggregate(rows, "token_mean", 12)
    expected_loss.backward()
    expected = {f"lm.model.{name}": grad for name, grad in tiny.gradients(plain.backbone).items()}
    expected |= {"value_head.weight": plain.weight.grad, "value_head.bias": plain.bias.grad[None]}
    (loss, num_clipped, num_tokens), ours = critic_gradients(ppo, micros)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    assert (num_clipped, num_tokens) == (clipped, sum(len(row) for row in rows))
    assert 0 < clipped < num_tokens
    assert_gradients_close(ours, expected)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_the_size_of_micro_batches_changes_nothing(paths, device, samples, aggregation):
    results = []
    for budget in (24, 60, 4096):
        config = tiny.recipe(
            paths[0],
            algorithm={"loss_aggregation": aggregation, "tis_cap": 2.0, "kl_loss_coef": 0.1, "entropy_coef": 0.01},
            rollout={"n": 3},
            train={"max_tokens_per_micro_batch": budget},
        )
        ppo = make_ppo(paths, device, config)
        (micros,) = ppo.pack(samples)
        metrics = ppo.annotate([micros], Timer())
        tiny.jitter(ppo.policy.lm, **MOVED)
        tiny.jitter(ppo.critic.lm.model, **MOVED)
        stats, actor = actor_gradients(ppo, micros)
        critic_stats, critic = critic_gradients(ppo, micros)
        results.append((len(micros), metrics, stats, actor, critic_stats, critic))
    whole = results[-1]
    assert [r[0] for r in results[1:]] == [pytest.approx(3, abs=1), 1] and results[0][0] > 5
    for _, metrics, stats, actor, critic_stats, critic in results[:-1]:
        assert metrics == pytest.approx(whole[1], rel=1e-5, abs=1e-6)
        assert [x.item() for x in stats] == pytest.approx([x.item() for x in whole[2]], rel=1e-5, abs=1e-5)
        assert critic_stats == pytest.approx(whole[4], rel=1e-5)
        assert_gradients_close(actor, whole[3], rtol=1e-5)
        assert_gradients_close(critic, whole[5], rtol=1e-5)


# --- update -------------------------------------------------------------------------------------------


def test_a_whole_update_follows_the_plain_one(paths, device, samples):
    """Two mini-batches, two epochs: clipped gradients, AdamW and its schedule, all metrics."""
    algorithm = {"kl_coef": 0.1, "value_clip": 0.02}
    config = tiny.recipe(
        paths[0],
        algorithm=algorithm,
        rollout={"n": 3},
        train=SMALL | {"batch_size": 4, "mini_batch_size": 2, "epochs": 2},
        optim={"max_grad_norm": 0.5, "actor_lr": 2e-3, "critic_lr": 4e-3, "weight_decay": 0.1},
    )
    ppo = make_ppo(paths, device, config)
    mini_batches = ppo.pack(samples)
    ppo.annotate(mini_batches, Timer())
    advantages = by_sample([m for part in mini_batches for m in part], samples, "advantage_T")
    metrics = ppo.update(mini_batches, Timer(), train_actor=True)

    plain = plain_side(paths, samples)
    returns = [plain_ppo.gae(r, v, 1.0, 0.95)[1] for r, v in zip(plain.rewards(0.1), plain.values, strict=True)]
    schedule = {"total": 10, "decay": 0.1, "max_norm": 0.5}
    start = {name: p.detach().clone() for name, p in plain.policy.named_parameters()}
    actor = plain_ppo.AdamW(plain.policy.parameters(), 2e-3, **schedule)
    critic = plain_ppo.AdamW([*plain.backbone.parameters(), plain.weight, plain.bias], 4e-3, **schedule)
    pg_losses, vf_losses, cases, value_clips = [], [], Counter(), 0
    for part in [slice(0, 6), slice(6, 12)] * 2:
        now = Plain(plain.policy, plain.backbone, plain.weight, plain.bias, plain.episodes[part],
                    plain.logprobs[part], plain.refs[part], plain.values[part])  # fmt: skip
        rows = []
        for i, values in enumerate(plain_ppo.critic_outputs(now.backbone, now.weight, now.bias, now.episodes)):
            terms = [plain_ppo.value_term(v, now.values[i][t], returns[part][i][t], 0.02) for t, v in enumerate(values)]
            rows.append([term for term, _ in terms])
            value_clips += sum(is_clipped for _, is_clipped in terms)
        vf_loss = plain_ppo.aggregate(rows, "token_mean", 12)
        vf_loss.backward()
        vf_losses.append(vf_loss.item())
        critic.step()
        loss, _, found = plain_policy_loss(now, samples[part], advantages[part], {})
        pg_losses.append(loss)
        cases += found
        actor.step()
    n = sum(cases.values())
    assert metrics["actor/pg_loss"] == pytest.approx(sum(pg_losses) / 4, abs=1e-5)
    assert metrics["critic/vf_loss"] == pytest.approx(sum(vf_losses) / 4, rel=1e-4)
    assert metrics["actor/grad_norm"] == pytest.approx(sum(actor.norms) / 4, rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(sum(critic.norms) / 4, rel=1e-4)
    assert metrics["actor/pg_clipfrac"] == pytest.approx((cases["low"] + cases["high"]) / n, abs=1e-9)
    assert metrics["critic/vf_clipfrac"] == pytest.approx(value_clips / n, abs=1e-9)
    assert cases["low"] + cases["high"] > 0 and max(actor.norms) > 0.5 and max(critic.norms) > 0.5
    expected = dict(plain.policy.named_parameters())
    for name, parameter in ppo.policy.lm.named_parameters():
        moved = expected[name].detach() - start[name]
        error = parameter.full_tensor().detach() - expected[name].detach()
        # Adam divides by the gradient's size: where that is rounding alone, signs differ. 1 % of the norm allows it.
        assert error.norm() <= 0.01 * moved.norm(), name


class Full:
    """Layers of a model that run out of memory as a GPU would: on more positions than there is room for."""

    def __init__(self, module, room, when):
        self.room, self.failures = room, 0
        first, last = module.lm.base_model.layers[0], module.lm.base_model.layers[-1]
        if when == "forward":
            last.register_forward_pre_hook(lambda _, args: self.check(args[0]))
        else:  # the gradients of the last layer and of the head are there by then
            first.register_full_backward_hook(lambda _, gradients, outputs: self.check(outputs[0]))

    def check(self, hidden):
        if hidden.shape[-2] > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_micro_batch_that_runs_out_of_memory_is_repeated_in_halves_with_the_same_result(paths, device, when, caplog):
    config = tiny.recipe(paths[0], rollout={"n": 2}, train={"batch_size": 6, "mini_batch_size": 3, "epochs": 2})
    results = []
    for room in (4096, 45):
        ppo = make_ppo(paths, device, config)
        mini_batches = ppo.pack(tiny.samples(6, n=2))
        ppo.annotate(mini_batches, Timer())
        full = [Full(module, room, when) for module in (ppo.critic, ppo.policy)]
        metrics = ppo.update(mini_batches, Timer(), train_actor=True)
        ppo.policy.reshard(), ppo.critic.reshard()
        weights = torch.cat([p.to_local().flatten() for module in (ppo.policy, ppo.critic) for p in module.parameters()])
        results.append((metrics, weights.clone()))
    (metrics, weights), (halved, halved_weights) = results
    assert full[0].failures >= 1 and ppo.token_budget <= 45
    assert all(m.batch.num_tokens <= 45 for part in mini_batches for m in part)
    assert halved == pytest.approx(metrics, rel=1e-4, abs=2e-6)
    off = (halved_weights - weights).abs()  # Adam divides by a gradient's own size: of one near 0 it makes roundings large
    assert off.max() < 1e-4 and (off > 2e-6).float().mean() < 1e-3
    said = [r.message for r in caplog.records if "out of memory in a micro-batch" in r.message]
    assert len(said) == full[0].failures and f"set train.max_tokens_per_micro_batch={ppo.token_budget}" in said[-1]
    assert len(ppo.pack(tiny.samples(6, n=2))[0]) > 1  # the next step begins with the smaller budget


def test_a_sequence_that_does_not_fit_by_itself_ends_the_update(paths, device):
    ppo = make_ppo(paths, device, tiny.recipe(paths[0]))
    mini_batches = ppo.pack(tiny.samples(4))
    ppo.annotate(mini_batches, Timer())
    Full(ppo.critic, 5, "forward")
    with pytest.raises(torch.OutOfMemoryError):
        ppo.update(mini_batches, Timer(), train_actor=True)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: a number read, or a size that depends on numbers."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::repeat_interleave")

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.name().split(".")[0] in self.READS and kwargs.get("output_size") is None:
            raise AssertionError(f"{function.name()} waits for the device")
        return function(*args, **kwargs)


@contextmanager
def waiting_is_an_error():
    """As torch finds out on a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(ppo, samples, refusing):
    """What the host does between two mini-batches, while `refusing` looks."""
    (micros,) = ppo.pack(samples)
    ppo.annotate([micros], Timer())
    assert len(micros) > 1
    with refusing:
        for m in micros:
            with torch.no_grad():
                ppo.policy(m.batch, ppo._logprob(m))
            ppo._critic_backward(m)
            ppo._actor_backward(m)
        ppo.critic_optimizer.step()
        ppo.actor_optimizer.step()


WAITING = {"tis_cap": 2.0, "kl_loss_coef": 0.1, "entropy_coef": 0.01}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_no_micro_batch_waits_for_the_device(tmp_path, device, samples, kind):
    path = tiny.save_model(tmp_path, kind)
    config = tiny.recipe(path, algorithm=WAITING, rollout={"n": 3}, train=SMALL)
    forward_and_backward(make_ppo((path, path), device, config), samples, NoWaiting())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_micro_batch_waits_for_the_gpu(paths, device, samples, dtype):
    config = tiny.recipe(paths[0], model={"dtype": dtype}, algorithm=WAITING, rollout={"n": 3}, train=SMALL)
    ppo = make_ppo(paths, device, config)
    forward_and_backward(ppo, samples, nullcontext())  # compiles, and makes Adam's moments
    forward_and_backward(ppo, samples, waiting_is_an_error())


def test_during_critic_warmup_only_the_critic_learns(paths, device, samples):
    ppo, micros, _ = annotated(paths, device, samples)
    policy = {name: p.full_tensor().clone() for name, p in ppo.policy.named_parameters()}
    critic = {name: p.full_tensor().clone() for name, p in ppo.critic.named_parameters()}
    metrics = ppo.update([micros], Timer(), train_actor=False)
    assert all(torch.equal(p.full_tensor(), policy[name]) for name, p in ppo.policy.named_parameters())
    assert not torch.equal(ppo.critic.value_head.weight.full_tensor(), critic["value_head.weight"])
    assert not any(name.startswith("actor/") for name in metrics)


def test_the_reference_never_moves(paths, device, samples):
    ppo, micros, _ = annotated(paths, device, samples, kl_loss_coef=0.1)
    before = {name: p.full_tensor().clone() for name, p in ppo.ref.named_parameters()}
    ppo.update([micros], Timer(), train_actor=True)
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in ppo.ref.named_parameters())
    assert all(p.grad is None for p in ppo.ref.parameters())


def test_an_update_of_an_unmoved_policy_has_ratio_one(paths, device, samples):
    ppo, micros, _ = annotated(paths, device, samples)
    metrics = ppo.update([micros], Timer(), train_actor=True)
    assert (metrics["actor/ratio_min"], metrics["actor/ratio_max"]) == pytest.approx((1, 1), abs=1e-5)
    assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] == 0


def test_a_positive_advantage_makes_its_response_likelier(paths, device):
    good, bad = tiny.samples(1, n=2)
    good, bad = (
        Sample(
            group=0,
            prompt_ids=s.prompt_ids,
            response_ids=s.response_ids,
            rollout_logprob=s.rollout_logprob,
            reward=reward,
        )
        for s, reward in ((good, 1.0), (bad, 0.0))
    )
    config = tiny.recipe(paths[0], algorithm={"advantage": "grpo", "kl_coef": 0.0}, rollout={"n": 2})
    ppo = make_ppo(paths, device, config)
    before = ppo.pack([good, bad])
    ppo.annotate(before, Timer())
    ppo.update(before, Timer(), train_actor=True)
    after = ppo.pack([good, bad])
    ppo.annotate(after, Timer())
    old, new = (by_sample(x[0], [good, bad], "old_logprob_T") for x in (before, after))
    assert sum(new[0]) > sum(old[0]) and sum(new[1]) < sum(old[1])
