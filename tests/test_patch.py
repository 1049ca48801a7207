"""The kernels under other trainers' names: nothing by halves, everything taken back, the numbers the same.

The mechanism is tested on a package written for it. The trainers' own functions are compared where the trainer is importable:
TRL comes with the extra [test], verl and OpenRLHF are skipped with the reason where they are not.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rlsp_kernels import patch
from rlsp_kernels.patch import swap, without_logits
from rlsp_kernels.patch.swap import Swap
from tiny import VOCAB, save_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

B, L, D, V = 3, 7, 16, 53
ROUNDING = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 6e-2}}

# --- the mechanism ------------------------------------------------------------------------------

TOY = {
    "__init__.py": "",
    "maths.py": """
def double(x):
    return 2 * x

def half(x):
    return x / 2

TABLE = {"double": double, "half": half}

class Model:
    def forward(self, x):
        return double(x) + 1
""",
    "user.py": "from toy_trainer.maths import double as twice\n",
    "later.py": "from toy_trainer.maths import double\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An installed package, version 1.0, whose module user has imported a function by name; later is not imported yet."""
    (tmp_path / "toy_trainer").mkdir()
    for name, text in TOY.items():
        (tmp_path / "toy_trainer" / name).write_text(text)
    (tmp_path / "toy_trainer-1.0.dist-info").mkdir()
    (tmp_path / "toy_trainer-1.0.dist-info" / "METADATA").write_text("Name: toy_trainer\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    maths, user = (importlib.import_module(f"toy_trainer.{name}") for name in ("maths", "user"))
    yield SimpleNamespace(maths=maths, user=user)
    if "toy_trainer" in swap._applied:
        swap.revert("toy_trainer")
    for name in [name for name in sys.modules if name.startswith("toy_trainer")]:
        del sys.modules[name]


def tripled(original):
    return lambda x: 3 * x


DOUBLE = Swap("toy_trainer.maths", "double", ("x",), tripled, registries=("TABLE",))
FORWARD = Swap("toy_trainer.maths", "Model.forward", ("self", "x"), lambda original: lambda self, x: -original(self, x))


def apply_toy(*swaps, tested=("1.0",), any_version=False):
    return swap.apply("toy_trainer", tested, any_version, lambda version: swaps)


def test_every_name_of_a_function_is_replaced_and_named(toy):
    model = toy.maths.Model()
    done = apply_toy(DOUBLE, FORWARD)
    assert (toy.maths.double(2), toy.user.twice(2), toy.maths.TABLE["double"](2)) == (6, 6, 6)
    assert model.forward(2) == -7, "an instance that was there before"
    assert (done.package, done.version) == ("toy_trainer", "1.0")
    assert set(done.replaced[0].places) == {
        "toy_trainer.maths.double", "toy_trainer.maths.TABLE['double']", "toy_trainer.user.twice",
    }  # fmt: skip
    assert "toy_trainer 1.0: 2 functions" in str(done)


def test_a_later_import_gets_the_replacement_and_revert_reaches_it(toy):
    original = toy.maths.double
    apply_toy(DOUBLE)
    later = importlib.import_module("toy_trainer.later")
    assert later.double(2) == 6
    swap.revert("toy_trainer")
    assert later.double is toy.maths.double is toy.user.twice is toy.maths.TABLE["double"] is original


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Swap("toy_trainer.maths", "gone", ("x",), tripled), "has no toy_trainer.maths.gone"),
        (Swap("toy_trainer.maths", "half", ("x", "y"), tripled), "takes \\('x',\\), the replacement \\('x', 'y'\\)"),
        (Swap("toy_trainer.maths", "half", ("x",), tripled, registries=("LIST",)), "has no toy_trainer.maths.LIST"),
    ],
)
def test_one_function_that_does_not_fit_leaves_all_as_they_were(toy, broken, reason):
    before = dict(vars(toy.maths)), dict(toy.maths.TABLE), toy.maths.Model.forward
    with pytest.raises(RuntimeError, match=reason):
        apply_toy(DOUBLE, FORWARD, broken)
    assert before == (dict(vars(toy.maths)), toy.maths.TABLE, toy.maths.Model.forward)
    apply_toy(DOUBLE)  # and nothing is in the way of another try


def test_an_error_half_way_through_is_undone(toy):
    class Stubborn(type):
        def __setattr__(cls, name, value):
            if name == "forward" and "lambda" in value.__qualname__:
                raise AttributeError("this class cannot be changed")
            super().__setattr__(name, value)

    toy.maths.Model = Stubborn("Model", (), {"forward": toy.maths.Model.forward})
    with pytest.raises(AttributeError, match="cannot be changed"):
        apply_toy(DOUBLE, FORWARD)
    assert toy.maths.double(2) == toy.user.twice(2) == 4


def test_an_untested_version_is_refused_unless_told_otherwise(toy):
    with pytest.raises(RuntimeError, match="toy_trainer 1.0 was not tested, 0.8, 0.9 were"):
        apply_toy(DOUBLE, tested=("0.8", "0.9"))
    assert toy.maths.double(2) == 4
    apply_toy(DOUBLE, tested=("0.8", "0.9"), any_version=True)
    assert toy.maths.double(2) == 6


def test_applying_twice_and_reverting_twice_are_refused(toy):
    apply_toy(DOUBLE)
    with pytest.raises(RuntimeError, match="patched already"):
        apply_toy(DOUBLE)
    swap.revert("toy_trainer")
    with pytest.raises(RuntimeError, match="is not patched"):
        swap.revert("toy_trainer")


def test_a_trainer_that_is_missing_is_named_with_the_version_to_install():
    with pytest.raises(ImportError, match="pip install 'no_such_trainer==2.0'"):
        swap.apply("no_such_trainer", ("1.0", "2.0"), False, lambda version: ())


# --- what the trainers' own functions give -----------------------------------------------------------


def trainer(module: str, package: str):
    """The trainer's module and our patch for it, or a skip that says why."""
    pytest.importorskip(module, exc_type=ImportError)
    ours = getattr(patch, package)
    version = importlib.metadata.version(package)
    if version not in ours.TESTED:
        pytest.skip(f"{package} {version} is installed, the patch is for {', '.join(ours.TESTED)}")
    return sys.modules[module], ours


def batch(dtype, seed=0, requires_grad=True):
    """Logits (B, L, V), and token ids (B, L), some masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, L, V, generator=generator)).to(dtype).requires_grad_(requires_grad)
    token = torch.randint(V, (B, L), generator=generator)
    mask = torch.rand(B, L, generator=generator) < 0.7
    return logits, token, mask


def with_gradient(function, *inputs):
    """Values of a function of differentiable inputs, and the gradients of a fixed weighting of them all."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = 0.0
    for i, output in enumerate(x for x in outputs if x is not None):
        generator = torch.Generator().manual_seed(i)
        total = total + (output.float() * torch.randn(output.shape, generator=generator)).sum()
    total.backward()
    return [x.detach() for x in outputs if x is not None] + [x.grad for x in inputs]


def assert_same(ours, function, *inputs):
    """A function, looked up anew at each call, gives unpatched and patched the same values, dtypes and gradients."""
    theirs = with_gradient(function, *inputs)
    with ours.patched():
        own = with_gradient(function, *inputs)
    assert_close(own, theirs, **ROUNDING[inputs[0].dtype])


@pytest.fixture
def trl():
    return trainer("trl.trainer.utils", "trl")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["whole", "sliced", "flat"])
def test_trls_functions_on_logits_give_its_numbers(trl, masked, layout):
    utils, ours = trl
    logits, token, mask = batch(torch.float32)
    cut = {"whole": lambda x: x, "sliced": lambda x: x[:, :-1], "flat": lambda x: x.flatten(0, 1)}[layout]
    token, mask = cut(token), cut(mask)
    options = {"temperature": 0.7, "row_mask": mask if masked else None}
    assert_same(ours, lambda x: utils.selective_log_softmax(cut(x), token, **options), logits)
    assert_same(ours, lambda x: utils.selective_log_softmax_and_entropy(cut(x), token, **options), logits)
    assert_same(ours, lambda x: utils.entropy_from_logits(cut(x)), logits)


def test_trls_entropy_without_gradient_stays_without(trl):
    utils, ours = trl
    logits, token, _ = batch(torch.float32)
    with ours.patched():
        logprob, entropy = utils.selective_log_softmax_and_entropy(logits, token, entropy_requires_grad=False)
    assert logprob.requires_grad and not entropy.requires_grad


def test_several_tokens_a_row_and_half_precision_on_a_cpu_are_left_to_trl(trl):
    utils, ours = trl
    logits, token, _ = batch(torch.float32)
    several = torch.randint(V, (B, L, 4))
    half = logits.bfloat16()  # TRL rounds each step there
    scores = lambda: (  # noqa: E731
        utils.selective_log_softmax(logits, several), utils.selective_log_softmax(half, token),
        *utils.selective_log_softmax_and_entropy(half, token), utils.entropy_from_logits(half),
    )  # fmt: skip
    theirs = scores()
    with ours.patched():
        own = scores()
    assert all(torch.equal(x, y) for x, y in zip(own, theirs, strict=True))


@pytest.fixture
def fused_head(trl):
    """trl, where it has a fused head: from 1.15 on."""
    pytest.importorskip("trl.kernels.chunked_logprob")
    return trl


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "is_top1")])
@pytest.mark.parametrize(("bias", "softcap", "logit_scale"), [(False, None, 1.0), (True, 5.0, 0.5)])
def test_trls_fused_head_gives_its_numbers(fused_head, outputs, bias, softcap, logit_scale):
    utils, ours = fused_head
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias_V = (torch.randn(shape, generator=generator) for shape in ((B * L, D), (V, D), (V,)))
    token = torch.randint(V, (B * L,), generator=generator)

    def scores(hidden, weight, bias_V=None):
        arguments = (hidden, weight, bias_V, token, 0.7, 32, softcap, logit_scale, outputs)
        logprob, entropy, *_ = utils._ChunkedLogProbFunction.apply(*arguments)
        return logprob, entropy

    assert_same(ours, scores, hidden, weight, *([bias_V] if bias else []))


def test_under_autocast_the_gradient_of_a_float32_head_is_not_rounded(fused_head):
    utils, ours = fused_head
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((B * L, D), (V, D)))
    token = torch.randint(V, (B * L,), generator=generator)

    def scores(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            arguments = (hidden, weight, None, token, 1.0, 32, None, 1.0, ("log_probs", "entropy"))
            return utils._ChunkedLogProbFunction.apply(*arguments)[:2]

    theirs = with_gradient(scores, hidden, weight)
    with ours.patched():
        own = with_gradient(scores, hidden, weight)
    assert_close(own, theirs, **ROUNDING[torch.bfloat16])
    assert not torch.equal(own[-1], own[-1].bfloat16().float())


@pytest.fixture
def prompts():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"prompt": " ".join(f"w{(7 * i + j) % 50 + 3}" for j in range(4))} for i in range(16)])


def grpo_run(folder, data, loss_type="dapo", steps=20):
    """TRL's GRPO on a random two-layer model: what it logged, and the weights in the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    path = save_model(folder)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.config.vocab_size = model.lm_head.out_features
    config = GRPOConfig(
        output_dir=str(folder / "out"), max_steps=steps, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=10, num_iterations=2, temperature=0.8, beta=0.04, entropy_coef=0.01, learning_rate=1e-3,
        loss_type=loss_type, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=0,
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip

    def reward(completion_ids, **_):
        return [len(set(ids)) / 10 for ids in completion_ids]

    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(path)
    )
    trainer.train()
    logged = [
        [row[key] for key in ("loss", "entropy", "kl", "grad_norm")] for row in trainer.state.log_history if "loss" in row
    ]
    return torch.tensor(logged), torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_twenty_steps_of_trls_grpo_have_the_same_losses(trl, tmp_path, prompts, loss_type):
    _, ours = trl
    theirs, their_weights = grpo_run(tmp_path, prompts, loss_type)
    with ours.patched():
        own, own_weights = grpo_run(tmp_path, prompts, loss_type)
    assert theirs.shape == (20, 4) and theirs[:, 0].abs().max() > 1e-3, "losses of nothing would be equal"
    assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert_close(own[:, 0], theirs[:, 0], rtol=0, atol=1e-5)
    assert_close(own_weights, their_weights, rtol=0, atol=1e-4)


class RowsOfLogits(TorchDispatchMode):
    """The most rows of a vocabulary's width that any operation returned."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.most = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1 and x.shape[-1] == self.vocab:
                self.most = max(self.most, x.numel() // self.vocab)
        return results


def test_patched_grpo_never_holds_the_logits_of_a_batch(trl, tmp_path, prompts):
    _, ours = trl
    with ours.patched(), RowsOfLogits(vocab=VOCAB) as seen:
        grpo_run(tmp_path, prompts, steps=2)
    assert 8 <= seen.most <= 32, "the next token of 8 sequences, the head transposed (32 rows); the batch has 80 and more"


def tiny_lm(config_class, **more):
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(config_class(**sizes, num_key_value_heads=2, **more))


def test_models_that_do_more_to_their_logits_keep_them_and_the_reason_is_given():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, MixtralConfig, Qwen3Config

    for plain in (LlamaConfig, Qwen3Config, MixtralConfig):
        assert without_logits.why_not(tiny_lm(plain)) is None
    for scaled in (Gemma2Config, CohereConfig, GraniteConfig):
        assert "does more to the logits" in without_logits.why_not(tiny_lm(scaled))
    lm = tiny_lm(LlamaConfig)
    lm.lm_head.register_forward_hook(lambda *_: None)
    assert "has hooks" in without_logits.why_not(lm)
    lm = tiny_lm(LlamaConfig)
    lm.lm_head.forward = lm.lm_head.forward
    assert "no plain nn.Linear" in without_logits.why_not(lm)


@pytest.mark.parametrize("plain", [True, False])
def test_a_method_on_logits_gives_its_numbers_from_hidden_states_or_says_why_not(trl, plain):
    """The scoring of TRL 1.14, on a model that it may leave the logits out of and on one that it may not."""
    from transformers import Gemma2Config, LlamaConfig

    utils, ours = trl
    lm = tiny_lm(LlamaConfig) if plain else tiny_lm(Gemma2Config)
    ids, mask = torch.randint(61, (B, L)), torch.rand(B, L) < 0.7
    shapes = []

    def method(self, model, ids):
        logits = model(ids).logits[:, :-1]
        shapes.append(logits.shape[-1])
        return utils.selective_log_softmax_and_entropy(logits, ids[:, 1:], temperature=0.7, row_mask=mask[:, 1:])

    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    results = []
    for patched in (False, True):
        lm.zero_grad()
        with ours.patched() if patched else contextlib.nullcontext():
            run = without_logits.without_logits(1 << 12)(method) if patched else method
            with pytest.warns(UserWarning, match="does more") if patched and not plain else contextlib.nullcontext():
                logprob, entropy = run(trainer, lm, ids)
        (logprob.sum() + 0.3 * entropy.sum()).backward()
        results.append([logprob.detach(), entropy.detach(), *(x.grad for x in lm.parameters())])
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert shapes == [61, 32 if plain else 61] and lm(ids).logits.shape[-1] == 61


@pytest.fixture
def verl():
    return trainer("verl.trainer.ppo.core_algos", "verl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_verls_log_probabilities_are_its_own(verl, dtype, flat):
    functions, ours = importlib.import_module("verl.utils.torch_functional"), verl[1]
    logits, token, _ = batch(dtype)
    if flat:
        token = token.flatten()
    assert_same(ours, lambda x: functions.logprobs_from_logits(x.flatten(0, 1) if flat else x, token), logits)


def test_verls_logits_are_not_overwritten_where_verl_does_not(verl):
    functions, ours = importlib.import_module("verl.utils.torch_functional"), verl[1]
    logits, token, _ = batch(torch.float32)

    def both(x):
        doubled = x * 2
        entropy = functions.entropy_from_logits(doubled)  # first: its backward is the last, and needs the logits
        return functions.logprobs_from_logits(doubled, token), entropy

    assert_same(ours, both, logits)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "low_var_kl", "k3+"])
def test_verls_kl_is_its_own_far_away_too(verl, kind):
    algorithms, ours = verl
    generator = torch.Generator().manual_seed(0)
    logprob, ref = (-5 * torch.rand(B, L, generator=generator) for _ in range(2))
    ref[0] += 15  # k3 beyond verl's cap of 10
    ref[1] -= 30  # and beyond its clamp of 20
    assert_same(ours, lambda x, y: algorithms.kl_penalty(x, y, kind), logprob, ref)


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_verls_advantages_are_its_own_at_masked_positions_too(verl, keep):
    algorithms, ours = verl
    generator = torch.Generator().manual_seed(1)
    reward, value = (torch.randn(B, L, generator=generator) for _ in range(2))
    mask = (torch.rand(B, L, generator=generator) < keep).float()
    mask[0, 4:] = 0
    gae = lambda: algorithms.compute_gae_advantage_return(reward, value, mask, torch.tensor(0.98), torch.tensor(0.9))  # noqa: E731
    by_name = lambda: algorithms.get_adv_estimator_fn("gae")(reward, value, mask, 0.98, 0.9)  # noqa: E731
    theirs = gae(), by_name()
    with ours.patched():
        own = gae(), by_name()
    assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_verls_linear_cross_entropy_runs_and_is_that_of_its_logits(verl):
    """Its own kernel needs a GPU: what it means is written out here. bench/peer_suites.py runs its tests on one."""
    kernel, ours = importlib.import_module("verl.utils.kernel.linear_cross_entropy"), verl[1]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((B, L, D), (V, D)))
    token = torch.randint(V, (B, L), generator=generator)

    def plain(hidden, weight):
        log_p = (hidden.flatten(0, 1) @ weight.T / 0.7).log_softmax(-1)
        return log_p.gather(-1, token.view(-1, 1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    with ours.patched():
        own = with_gradient(lambda h, w: kernel.linear_cross_entropy(h, w, token, 0.7), hidden, weight)
    assert_close(own, with_gradient(plain, hidden, weight), rtol=1e-5, atol=1e-5)


@pytest.fixture
def openrlhf():
    return trainer("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_openrlhfs_log_probabilities_are_its_own(openrlhf, dtype, temperature):
    utils, ours = importlib.import_module("openrlhf.models.utils"), openrlhf[1]
    logits, token, _ = batch(dtype)
    assert_same(ours, lambda x: utils.log_probs_from_logits(x * 1, token, temperature), logits)


def test_openrlhfs_advantages_are_its_own(openrlhf):
    maker, ours = openrlhf
    generator = torch.Generator().manual_seed(1)
    reward, value = (torch.randn(B, L, generator=generator) for _ in range(2))
    mask = torch.rand(B, L, generator=generator) < 0.6  # with tokens masked inside a response
    for action_mask in (mask, mask.long(), None):
        gae = lambda m=action_mask: maker.RemoteExperienceMaker.get_advantages_and_returns(None, value, reward, m, 0.98, 0.9)  # noqa: E731
        theirs = gae()
        with ours.patched():
            own = gae()
        assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize(
    ("token_level", "of_batch"),
    [(True, {}), (True, {"dp_size": 2, "batch_num_tokens": 40}), (False, {}), (False, {"dp_size": 2, "global_batch_size": 6})],
)
@pytest.mark.parametrize("kind", ["ppo", "gspo", "corrected"])
def test_openrlhfs_policy_loss_is_its_own(openrlhf, dual_clip, token_level, of_batch, kind):
    loss_of, ours = importlib.import_module("openrlhf.models.loss").PolicyLoss, openrlhf[1]
    generator = torch.Generator().manual_seed(1)
    logprob, old, rollout, advantage = (torch.randn(B, L, generator=generator) for _ in range(4))
    old[0, 0] -= 40  # beyond the clamp of 20
    mask = (torch.rand(B, L, generator=generator) < 0.7).long()
    mask[1] = 0
    loss = loss_of(
        clip_eps_high=0.28, dual_clip=dual_clip, token_level_loss=token_level,
        policy_loss_type="gspo" if kind == "gspo" else "ppo", is_correction_level="token" if kind == "corrected" else "off",
    )  # fmt: skip

    def results(logprob):
        total, *metrics = loss(logprob, old, advantage, mask, rollout_log_probs=rollout, **of_batch)
        return total, *(None if x is None else x.detach() for x in metrics)

    assert_same(ours, results, logprob)


@pytest.mark.parametrize("name", ["trl", "verl", "openrlhf"])
def test_after_the_context_a_trainer_is_as_it_was_even_after_an_error(name, request):
    _, ours = request.getfixturevalue(name)
    version = importlib.metadata.version(name)
    swaps = {"trl": (version, 1 << 20), "verl": (1 << 20,), "openrlhf": (version,)}[name]
    swaps = ours._swaps(*swaps)
    before = [swap._prepare(name, "", one).original for one in swaps]
    with contextlib.suppress(KeyError), ours.patched() as done:
        assert done.version in ours.TESTED and len(done.replaced) == len(swaps)
        assert all(one.places for one in done.replaced)
        assert all(swap._find(name, "", one.home, sys.modules[one.home], one.name.split(".")) is not old
                   for one, old in zip(swaps, before, strict=True))  # fmt: skip
        raise KeyError
    assert [swap._prepare(name, "", one).original for one in swaps] == before


# --- the recipes of docs/patching.md -----------------------------------------------------------------

ROOT = Path(__file__).parent.parent
NEEDS = {"trl_grpo.py": "trl", "torchtitan_model.py": "torchtitan"}
SHOWS = {  # two ways to the same loss, or a line that only a run to the end prints
    "loop.py": r"step 29: reward 0\.[6-9]",
    "hf_trainer.py": r"Trainer (.*)\n(?s:.*)FusedTrainer \1\n",
    "compiled.py": r"(loss .*, clipped [1-9].*)\n\1",
    "trl_grpo.py": r"trl 1\.\S+: [56] functions replaced(?s:.*)train_runtime",
    "torchtitan_model.py": r"loss (\S+)\d with logits, \1",
}


def test_every_recipe_is_run_and_named_in_the_docs():
    files = {path.name for path in (ROOT / "docs" / "recipes").glob("*.py")}
    assert files == SHOWS.keys() == set(re.findall(r"recipes/(\w+\.py)", (ROOT / "docs" / "patching.md").read_text()))


@pytest.mark.parametrize("recipe", SHOWS)
def test_a_recipe_runs_and_shows_what_it_should(recipe, tmp_path):
    if recipe in NEEDS and importlib.util.find_spec(NEEDS[recipe]) is None:
        pytest.skip(f"{NEEDS[recipe]} is not installed")
    arguments = [save_model(tmp_path)] if recipe == "trl_grpo.py" else []
    paths = [str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "docs" / "recipes" / recipe, *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=env | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[recipe], done.stdout), done.stdout
