"""The field's own tests, run against our ops: a second judge that we did not write.

    python bench/peer_suites.py liger --path DIR
    python bench/peer_suites.py trl   --path DIR
    python bench/peer_suites.py verl  --path DIR

DIR is a checkout or an unpacked source distribution of the peer; nothing of it is kept here. The names that its tests import
are replaced by adapters onto rlsp_kernels, then its tests run as they are. What must be there, beside torch and pytest:

  liger  test/chunked_loss/test_grpo_loss.py, src/liger_kernel (its source distribution has both); transformers.
         Pure torch, so a CPU runs all of it; a GPU runs it on Triton.
  trl    tests/test_kernels.py of September 2026 or later (a checkout: the distributions leave the tests out); transformers.
         trl itself is not imported. Its own kernels need an accelerator and so its tests ask for one; ours run on a CPU too.
  verl   tests/utils/test_linear_cross_entropy.py, verl/ (a checkout); transformers and tensordict, not Ray. Needs a GPU.

Prints what passed, what the suite skips by itself, what was left out because we do not implement it, by reason, and what
failed. Exits with 1 if anything failed. It lies beside the benches and not in tests/, because a test that needs a stranger's
checkout would be one that `make test` never runs.
"""

import argparse
import importlib
import importlib.util
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import bare
from rlsp_kernels import linear_logprob_entropy, linear_ppo_loss, logprob_entropy, ppo_loss
from torch import Tensor

# --- Liger -------------------------------------------------------------------------------------


def aggregation_weight(
    mask_BL: Tensor, loss_type: str, max_completion_length: int | None, num_items_in_batch: float | None = None
) -> Tensor:
    """weight_T of Liger's loss types as (B, L): each aggregation is a weight per token."""
    mask_BL = mask_BL.float()
    B, L = mask_BL.shape
    if loss_type == "grpo":
        return mask_BL / mask_BL.sum(1, keepdim=True).clamp(min=1) / B
    if loss_type == "bnpo":
        return mask_BL / mask_BL.sum().clamp(min=1)
    if loss_type == "dapo":
        return mask_BL / (mask_BL.sum() if num_items_in_batch is None else torch.tensor(num_items_in_batch)).clamp(min=1)
    if loss_type == "dr_grpo":
        return mask_BL / (B * (max_completion_length or L))
    if loss_type == "luspo":
        return mask_BL.sum(1, keepdim=True).expand(B, L) / (B * L)
    raise NotImplementedError(loss_type)


def liger_reduce(per_token_loss, completion_mask, loss_type, max_completion_length, num_items_in_batch=None):
    """Liger's _reduce_grpo_loss as a weighted sum."""
    return (per_token_loss * aggregation_weight(completion_mask, loss_type, max_completion_length, num_items_in_batch)).sum()


def liger_chunk_forward(input_chunk, weight, selected_token_ids, bias=None, temperature=1.0):
    """LigerFusedLinearPPOBase.chunk_forward: log-probabilities (B, L) from hidden states (B, L, D)."""
    hidden, token = input_chunk.flatten(0, 1), selected_token_ids.flatten()
    logprob, _ = linear_logprob_entropy(hidden, weight, token, bias_V=bias, temperature=temperature, need_entropy=False)
    return logprob.view_as(selected_token_ids)


class LigerLoss(torch.nn.Module):
    """LigerFusedLinearGRPOLoss by linear_ppo_loss. What it does not take, the tests that need it are left out for."""

    def __init__(
        self,
        beta=0.04,
        compiled=True,
        use_ref_model=True,
        chunk_size=1,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
        max_completion_length=None,
        importance_sampling_level="token",
        temperature=1.0,
        delta=None,
        use_bias_correction_kl=False,
        **of_other_losses,
    ):
        super().__init__()
        assert importance_sampling_level == "token" and not use_bias_correction_kl, "to be left out"
        self.beta, self.use_ref_model, self.temperature, self.delta = beta, use_ref_model, temperature, delta
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.loss_type, self.max_completion_length = loss_type, max_completion_length

    def forward(
        self,
        _input,
        weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        shape = selected_token_ids.shape
        with torch.no_grad():
            own = None  # the log-probabilities of this policy, where Liger detaches them
            if old_per_token_logps is None or (self.beta and ref_per_token_logps is None and not self.use_ref_model):
                own = liger_chunk_forward(_input, weight, selected_token_ids, bias, self.temperature)
            old = own if old_per_token_logps is None else old_per_token_logps
            ref = ref_per_token_logps
            if self.beta and ref is None:
                arguments = (ref_input, ref_weight, selected_token_ids, ref_bias, self.temperature)
                ref = liger_chunk_forward(*arguments) if self.use_ref_model else own
        if vllm_is_ratio is not None:
            vllm_is_ratio = vllm_is_ratio.reshape(shape[0], -1).expand(shape).flatten().float()
        loss, metrics = linear_ppo_loss(
            _input.flatten(0, 1),
            weight,
            selected_token_ids.flatten(),
            old.flatten().float(),
            advantages.float()[:, None].expand(shape).flatten(),
            aggregation_weight(attention_mask, self.loss_type, self.max_completion_length, num_items_in_batch).flatten(),
            bias_V=bias,
            temperature=self.temperature,
            clip_ratio_low=self.epsilon_low,
            clip_ratio_high=self.epsilon_high,
            dual_clip=self.delta,
            importance_weight_T=vllm_is_ratio,
            ref_logprob_T=ref.flatten().float() if self.beta else None,
            kl_coef=self.beta,
            kl_kind="k3",
            need_entropy=False,
        )
        return loss, liger_metrics(metrics, self.beta)


def liger_metrics(metrics, beta):
    """Liger's list: the mean KL where there is a reference, the share of clipped tokens."""
    num_tokens = metrics.num_tokens.clamp(min=1)
    clipped = (metrics.clip_low + metrics.clip_high) / num_tokens
    return [metrics.ref_kl / num_tokens, clipped] if beta else [clipped]


def liger_functional(*arguments):
    """liger_fused_linear_grpo, whose arguments are those of LigerFusedLinearGRPOFunction.apply, in its order."""
    inputs, settings = arguments[:11], arguments[11:]
    names = ("beta", "epsilon_low", "epsilon_high", "loss_type", "max_completion_length", "importance_sampling_level")
    names += ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "compiled", "use_ref_model", "chunk_size")
    return LigerLoss(**dict(zip(names, settings, strict=False)))(*inputs)


def liger_on_logits(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    reduce=False,
    delta=None,
    **of_other_losses,
):
    """triton_grpo_loss by ppo_loss. Losses per token are taken with a weight that is 1 on one token, a call each."""
    shape = completion_ids.shape

    def loss_of(weight):
        return ppo_loss(
            logits[:, :-1].flatten(0, 1),
            completion_ids.flatten(),
            old_logp.flatten(),
            advantages[:, None].expand(shape).flatten(),
            weight.flatten(),
            temperature=temperature,
            clip_ratio_low=eps_low,
            clip_ratio_high=eps_high,
            dual_clip=delta,
            ref_logprob_T=ref_logp.flatten() if beta else None,
            kl_coef=beta,
            kl_kind="k3",
            need_entropy=False,
            inplace=False,
        )

    if reduce:
        loss, metrics = loss_of(aggregation_weight(completion_mask, loss_type, max_completion_length))
        return loss, liger_metrics(metrics, beta)
    one_hot = torch.eye(completion_ids.numel(), device=logits.device) * completion_mask.flatten()[:, None]
    losses, metrics = zip(*(loss_of(weight) for weight in one_hot), strict=True)
    clipped = torch.stack([m.clip_low + m.clip_high for m in metrics]).view(shape)
    return torch.stack(losses).view(shape), torch.stack([m.ref_kl for m in metrics]).view(shape) if beta else None, clipped


def find_liger(path: Path) -> Path:
    """Makes Liger importable and returns its test file."""
    sys.path[:0] = [str(path), str(path / "src")]
    return path / "test/chunked_loss/test_grpo_loss.py"


def adapt_liger(suite: types.ModuleType) -> None:
    """Puts ours under the names that the test file imported. Liger's own modules stay: some tests compare with them."""

    class OurBase(suite.LigerFusedLinearPPOBase):
        chunk_forward = staticmethod(liger_chunk_forward)

    suite.LigerFusedLinearPPOBase = OurBase
    suite.LigerFusedLinearGRPOLoss, suite.liger_fused_linear_grpo = LigerLoss, liger_functional
    suite.triton_grpo_loss, suite._reduce_grpo_loss = liger_on_logits, liger_reduce


def left_out_of_liger(item: pytest.Item) -> str | None:
    """Why a test of Liger's is not for us."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.originalname in (
        "test_sequence_level_rejects_unsupported_loss_types",
        "test_ref_per_token_logps_preferred_over_ref_input",
    ):
        return "an error or a warning of Liger's own module"
    if item.originalname == "test_selective_logprob_backward_skips_frozen_params":
        return "looks into Liger's own backward"
    if item.originalname == "test_functional_correctness":
        return "unrelated policies: k3 overflows in Liger (some cases expect inf), ours clamps log-ratios at 20"
    if parameters.get("importance_sampling_level") == "sequence":
        return "not implemented: sequence-level importance sampling"
    if parameters.get("loss_type") in ("cispo", "sapo", "vespo"):
        return f"not implemented: {parameters['loss_type'].upper()}"
    if "bias_correction_kl" in item.name:
        return "not implemented: KL multiplied by the ratio"
    return None


# --- TRL ---------------------------------------------------------------------------------------


def trl_on_logits(logits, index, temperature=1.0, row_mask=None):
    """trl's selective_log_softmax_and_entropy, on (..., V)."""
    logprob, entropy = logprob_entropy(logits.reshape(-1, logits.shape[-1]), index.reshape(-1), temperature=temperature)
    logprob, entropy = logprob.view(index.shape), entropy.view(index.shape)
    if row_mask is None:
        return logprob, entropy
    return logprob.masked_fill(~row_mask, 0.0), entropy.masked_fill(~row_mask, 0.0)


class TrlChunked:
    """trl's ChunkedLogProbFunction: log-probability and entropy, None for the outputs that we have not.

    There were 5 outputs while the chunk size was an argument, and are 4 since.
    """

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, *others):
        num_outputs = 4
        if others and isinstance(others[0], int):
            num_outputs, others = 5, others[1:]
        softcap, logit_scale = (*others, *(None, 1.0)[len(others) :])[:2]
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        results = linear_logprob_entropy(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias_V=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        return (*results, *[None] * (num_outputs - 2))


def find_trl(path: Path) -> Path:
    """Puts ours under the names of trl's modules, trl itself staying out of it, and returns its test file."""
    for name in ("trl", "trl.kernels", "trl.kernels.chunked_logprob", "tests.testing_utils"):
        sys.modules[name] = types.ModuleType(name)
    bare("tests", path / "tests")
    trl, of_logits, of_hidden, testing = (
        sys.modules[name] for name in ("trl", "trl.kernels", "trl.kernels.chunked_logprob", "tests.testing_utils")
    )
    trl.kernels, of_logits.chunked_logprob, of_hidden.torch = of_logits, of_hidden, torch
    of_hidden.TOKEN_CHUNK_SIZE = of_hidden.VOCAB_CHUNK_SIZE = 1  # the tests patch them; nothing here reads them
    of_hidden.ChunkedLogProbFunction = of_logits.ChunkedLogProbFunction = TrlChunked
    of_logits.selective_log_softmax_and_entropy = trl_on_logits
    testing.require_torch_accelerator = testing.require_kernels_trust_remote_code = lambda test: test
    return path / "tests/test_kernels.py"


def adapt_trl(suite: types.ModuleType) -> None:
    """Its newest tests fetch trl's kernel from the Hub; they get ours."""
    ours = types.SimpleNamespace(selective_log_softmax_and_entropy=trl_on_logits)
    suite.kernels = types.SimpleNamespace(get_kernel=lambda *_, **__: ours)


def left_out_of_trl(item: pytest.Item) -> str | None:
    """Why a test of trl's is not for us."""
    for name in ("log_sum_sq_probs", "mean_logits", "is_top1"):
        if name in item.name:
            return f"not implemented: the output {name}"
    if item.originalname == "test_forward" and "Chunked" in item.nodeid:
        return "counts the rows of trl's own matrix products"
    if item.originalname == "test_bias" and item.callspec.params["dtype"] == torch.bfloat16:
        # largest error of logprob and entropy against float64 over 20 seeds: reference 0.21, ours 0.12, tolerance 0.05
        return "its reference rounds to bf16 before the bias and again after, ours once: it would judge the reference"
    return None


# --- verl --------------------------------------------------------------------------------------


def verl_linear(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """verl's linear_cross_entropy. float32 logits: its kernel never rounds them, and its tolerances ask for that."""
    hidden, token = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return linear_logprob_entropy(hidden, weight, token, temperature=temperature, logits_dtype=torch.float32)


def run_verl(path: Path) -> int:
    """Runs verl's cases, which are methods of a class and no pytest tests. Returns the number that failed."""
    cases = 5
    if not torch.cuda.is_available():
        print(f"verl: {cases} cases need a GPU")
        return 0
    bare("verl.utils", bare("verl", path / "verl") / "utils")
    importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy = verl_linear
    spec = importlib.util.spec_from_file_location("verl_suite", path / "tests/utils/test_linear_cross_entropy.py")
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    of_logits = suite.logprobs_from_logits  # without flash-attn it does not take the (1, T) labels that the test gives it
    suite.logprobs_from_logits = lambda logits, labels, **options: of_logits(logits, labels.flatten(), **options)
    failed = 0
    for case in range(cases):
        try:
            suite.TestLinearCrossEntropy(case).verify_correctness(iterations=2)
        except (AssertionError, torch.OutOfMemoryError):
            traceback.print_exc()
            failed += 1
    print(f"verl: {cases - failed} passed, {failed} failed")
    return failed


# --- running -----------------------------------------------------------------------------------


class Judge:
    """Adapts each test file, deselects tests by reason and counts outcomes."""

    def __init__(self, adapt: Callable[[types.ModuleType], None], reason_of: Callable[[pytest.Item], str | None]) -> None:
        self.adapt = adapt
        self.reason_of = reason_of
        self.reasons: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for suite in {item.module for item in items}:
            self.adapt(suite)
        reasons = {item: self.reason_of(item) for item in items}
        self.reasons.update(reason for reason in reasons.values() if reason)
        items[:] = [item for item in items if not reasons[item]]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skips[str(report.longrepr[2]).removeprefix("Skipped: ")[:100]] += 1
        elif report.when == "call" or report.failed:
            self.outcomes[report.outcome] += 1


def run_pytest(name: str, file: Path, judge: Judge, more: list[str]) -> int:
    """Runs a test file under its own conftest but nobody's configuration. Returns how many failed."""
    if not file.exists():
        raise SystemExit(f"{name}: {file} is not there; --path wants a checkout")
    options = ["-q", "--no-header", "--tb=short", "--show-capture=no", "-c", "/dev/null", "-p", "no:cacheprovider"]
    code = pytest.main([str(file), "--rootdir", str(file.parent), *options, *more], plugins=[judge])
    print(f"\n{name}: {judge.outcomes['passed']} passed, {judge.outcomes['failed']} failed")
    for what, counts in (("left out", judge.reasons), ("skipped by the suite itself", judge.skips)):
        for reason, count in counts.most_common():
            print(f"  {count:5d} {what}: {reason}")
    return judge.outcomes["failed"] or int(code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("verl", "liger", "trl"))
    parser.add_argument("--path", type=Path, required=True, help="checkout or unpacked source distribution of the peer")
    args, more = parser.parse_known_args()  # the rest goes to pytest: -k, -x, ...
    path = args.path.resolve()
    print(f"{args.suite} at {path}, on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}")
    if args.suite == "verl":
        failed = run_verl(path)
    elif args.suite == "liger":
        failed = run_pytest("liger", find_liger(path), Judge(adapt_liger, left_out_of_liger), more)
    else:
        failed = run_pytest("trl", find_trl(path), Judge(adapt_trl, left_out_of_trl), ["--noconftest", *more])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
