"""The field's own tests, run against our ops: a second judge that we did not write.

    python bench/peer_suites.py liger    --path DIR
    python bench/peer_suites.py trl      --path DIR
    python bench/peer_suites.py verl     --path DIR
    python bench/peer_suites.py openrlhf --path DIR

DIR is a checkout or an unpacked distribution of the peer with its tests; nothing of it is kept here. The tests of trl, verl and
OpenRLHF run as they are on the installed trainer, patched by rlsp_kernels.patch; in Liger's the names that its tests import are
replaced by adapters. What must be there, beside torch and pytest:

  liger     test/chunked_loss/test_grpo_loss.py, src/liger_kernel (its source distribution has both); transformers.
            Pure torch, so a CPU runs all of it; a GPU runs it on Triton.
  trl       tests/test_kernels.py, and tests/test_utils.py if there (a checkout: the distributions leave the tests out); trl.
            Its own kernels need an accelerator and so its tests ask for one; ours run on a CPU too.
  verl      tests/trainer/ppo/test_core_algos_on_cpu.py (a checkout); verl with Ray. On a GPU besides
            tests/utils/test_linear_cross_entropy.py of the checkout's own verl; transformers and tensordict, not Ray.
  openrlhf  tests/test_loss_aggregation.py (its distribution has it); openrlhf.

Prints what passed, what the suite skips by itself, what was left out because we do not implement it, by reason, and what
failed. Exits with 1 if anything failed. It lies beside the benches and not in tests/, because a test that needs a stranger's
checkout would be one that `make test` never runs.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import bare
from rlsp_kernels import linear_logprob_entropy, linear_ppo_loss, patch, ppo_loss
from rlsp_kernels.patch import verl as verl_patch
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


class _Testing(types.ModuleType):
    """trl's tests.testing_utils: nothing is required here, neither an accelerator nor the Hub."""

    TrlTestCase = object

    def __getattr__(self, name: str) -> Callable[[object], object]:
        if not name.startswith("require_"):
            raise AttributeError(name)
        return lambda test: test


def find_trl(path: Path) -> list[Path]:
    """Stands in for what its tests share, and returns its test files."""
    bare("tests", path / "tests")
    sys.modules["tests.testing_utils"] = _Testing("tests.testing_utils")
    utils = importlib.import_module("trl.trainer.utils")
    files = [path / "tests/test_kernels.py"]
    if (others := path / "tests/test_utils.py").exists():
        files.append(others)
        for node in ast.walk(ast.parse(others.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "trl.trainer.utils":
                for alias in node.names:  # of another version's, for tests that are left out
                    vars(utils).setdefault(alias.name, None)
    return files


def adapt_trl(suite: types.ModuleType) -> None:
    """Its tests ask for all outputs, which goes to trl's own code: ask for those that are replaced."""
    if not hasattr(suite, "ChunkedLogProbFunction"):
        return
    patched = suite.ChunkedLogProbFunction

    class TwoOutputs:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0):
            wanted = ("log_probs", "entropy")
            return patched.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, wanted)

    suite.ChunkedLogProbFunction = TwoOutputs


def left_out_of_trl(item: pytest.Item) -> str | None:
    """Why a test of trl's is not for us."""
    if item.path.name == "test_utils.py" and item.cls.__name__ not in ("TestSelectiveLogSoftmax", "TestEntropyFromLogits"):
        return "of functions that are not replaced"
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


def run_verl_linear(path: Path) -> int:
    """Runs verl's cases, which are methods of a class and no pytest tests. Returns the number that failed."""
    cases = 5
    bare("verl.utils", bare("verl", path / "verl") / "utils")
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    kernel.linear_cross_entropy = verl_patch.linear_cross_entropy_by_ours(kernel.linear_cross_entropy, verl_patch.LOGITS_BUDGET)
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


def left_out_of_verl(item: pytest.Item) -> str | None:
    """Why a test of verl's is not for us."""
    return None if "gae" in item.name or "AdvEst" in item.nodeid else "of functions that are not replaced"


# --- OpenRLHF ----------------------------------------------------------------------------------


def adapt_openrlhf(suite: types.ModuleType) -> None:
    """Its tests load the loss from its file, apart from the package: they get the class of the package, which is patched."""
    suite.PolicyLoss = importlib.import_module("openrlhf.models.loss").PolicyLoss


def left_out_of_openrlhf(item: pytest.Item) -> str | None:
    """Why a test of OpenRLHF's is not for us."""
    return (
        None
        if "PolicyLoss" in inspect.getsource(item.function) or "loss_fn" in inspect.getsource(item.function)
        else ("of functions that are not replaced")
    )


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


def run_pytest(name: str, files: list[Path], judge: Judge, more: list[str]) -> int:
    """Runs test files under their own conftest but nobody's configuration. Returns how many failed."""
    for file in files:
        if not file.exists():
            raise SystemExit(f"{name}: {file} is not there; --path wants a checkout")
    options = ["-q", "--no-header", "--tb=short", "--show-capture=no", "-c", "/dev/null", "-p", "no:cacheprovider"]
    code = pytest.main([*map(str, files), "--rootdir", str(files[0].parent), *options, *more], plugins=[judge])
    print(f"\n{name}: {judge.outcomes['passed']} passed, {judge.outcomes['failed']} failed")
    for what, counts in (("left out", judge.reasons), ("skipped by the suite itself", judge.skips)):
        for reason, count in counts.most_common():
            print(f"  {count:5d} {what}: {reason}")
    return judge.outcomes["failed"] or int(code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("liger", "trl", "verl", "openrlhf"))
    parser.add_argument(
        "--path", type=Path, required=True, help="checkout or unpacked distribution of the peer, with its tests"
    )
    args, more = parser.parse_known_args()  # the rest goes to pytest: -k, -x, ...
    path = args.path.resolve()
    print(f"{args.suite} at {path}, on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}")
    if args.suite == "liger":
        failed = run_pytest("liger", [find_liger(path)], Judge(adapt_liger, left_out_of_liger), more)
    elif args.suite == "verl" and torch.cuda.is_available():
        failed = run_verl_linear(path)
    else:
        failed = run_patched(args.suite, path, more)
    sys.exit(1 if failed else 0)


def run_patched(name: str, path: Path, more: list[str]) -> int:
    """Patches the installed trainer and runs its tests of what is replaced."""
    with getattr(patch, name).patched() as done:
        print(done)
        if name == "trl":
            return run_pytest(name, find_trl(path), Judge(adapt_trl, left_out_of_trl), ["--noconftest", *more])
        apart = ["--noconftest", "--import-mode=importlib", *more]  # DIR does not come ahead of what is installed
        if name == "verl":
            file = path / "tests/trainer/ppo/test_core_algos_on_cpu.py"
            return run_pytest(name, [file], Judge(lambda suite: None, left_out_of_verl), apart)
        return run_pytest(name, [path / "tests/test_loss_aggregation.py"], Judge(adapt_openrlhf, left_out_of_openrlhf), apart)


if __name__ == "__main__":
    main()
