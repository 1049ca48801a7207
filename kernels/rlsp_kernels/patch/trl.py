"""TRL's log-probabilities and entropies, and with them the losses of its GRPO and other trainers, by these kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlsp_kernels.linear import linear_logprob_entropy
from rlsp_kernels.patch import swap
from rlsp_kernels.patch.rows import logprob_entropy_rows
from rlsp_kernels.patch.swap import Patch, Swap
from rlsp_kernels.patch.without_logits import current, without_logits

TESTED = ("1.14.2", "1.15.0", "1.16.0")
LOGITS_BUDGET = 256 << 20  # bytes: a tile of TRL's, 4,096 tokens by 32,768 columns in bf16


def apply(*, any_version: bool = False, logits_budget: int = LOGITS_BUDGET) -> Patch:
    """Replaces selective_log_softmax, selective_log_softmax_and_entropy, entropy_from_logits and the head of GRPO.

    TRL from 1.15 on goes from hidden states to log-probabilities in ChunkedLogProbFunction, without holding (B, L, V): that is
    replaced. Before, GRPO and RLOO hold the logits: with the patch they do not, where the model has a plain output projection
    and does nothing more to the logits; a warning says where not. Left to TRL's own code: several tokens a row, half-precision
    logits on a CPU, outputs other than log-probability and entropy, a head sharded by DeepSpeed ZeRO-3.

    Args:
        any_version: also patch a version that is not in TESTED, if its functions take the parameters known here.
        logits_budget: bytes of logits to hold at a time. More is faster: the gradient of the head is added up less often.
    Returns:
        What was replaced, in which version.
    Raises:
        ImportError, RuntimeError: see rlsp_kernels.patch.swap.apply; nothing has been changed then.
    """
    return swap.apply("trl", TESTED, any_version, lambda version: _swaps(version, logits_budget))


def revert() -> None:
    """Takes it back. Raises RuntimeError when TRL is not patched."""
    swap.revert("trl")


@contextmanager
def patched(*, any_version: bool = False, logits_budget: int = LOGITS_BUDGET) -> Iterator[Patch]:
    """apply() on entry, revert() on exit."""
    patch = apply(any_version=any_version, logits_budget=logits_budget)
    try:
        yield patch
    finally:
        revert()


def _swaps(version: str, logits_budget: int) -> Sequence[Swap]:
    utils = "trl.trainer.utils"
    with_mask = ("logits", "index", "temperature", "row_mask")
    of_both = ("logits", "index", "entropy_requires_grad", "temperature", "row_mask")
    on_logits = (
        Swap(utils, "selective_log_softmax", with_mask, _selective_log_softmax),
        Swap(utils, "selective_log_softmax_and_entropy", of_both, _selective_log_softmax_and_entropy),
        Swap(utils, "entropy_from_logits", ("logits", "chunk_size"), _entropy_from_logits),
        Swap("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy", with_mask, lambda _: _logprob_entropy),
    )
    return on_logits + (_of_logits(logits_budget) if version.startswith("1.14.") else _of_fused_head(logits_budget))


def _of_fused_head(logits_budget: int) -> tuple[Swap, ...]:
    parameters = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping")
    return (
        Swap(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction",
            (*parameters, "logit_scale", "outputs"),
            lambda original: _chunked_logprob(original, logits_budget),
            signature="ChunkedLogProbFunction.forward",
        ),
    )


def _of_logits(logits_budget: int) -> tuple[Swap, ...]:
    """The methods of TRL 1.14 that ask the model for logits."""
    parameters = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy")
    parameters += ("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask")
    parameters += ("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")
    methods = {
        "grpo_trainer": "GRPOTrainer._full_logits_logps",
        "rloo_trainer": "RLOOTrainer._get_per_token_logps_and_entropies",
    }
    build = without_logits(logits_budget)
    return tuple(Swap(f"trl.trainer.{module}", name, parameters, build) for module, name in methods.items())


def _logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The signature of TRL's own kernel, which is of float32 on any logits."""
    logprob, entropy = _scores(logits, index, temperature)
    return _masked(logprob, row_mask), _masked(entropy, row_mask)


def _selective_log_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if index.shape != logits.shape[:-1] or _rounds(logits):  # the first: several tokens a row
            return original(logits, index, temperature=temperature, row_mask=row_mask)
        return _masked(_scores(logits, index, temperature, need_entropy=False)[0], row_mask)

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if index.shape != logits.shape[:-1] or _rounds(logits):
            return original(logits, index, entropy_requires_grad, temperature=temperature, row_mask=row_mask)
        logprob, entropy = _logprob_entropy(logits, index, temperature, row_mask)
        return logprob, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _entropy_from_logits(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if _rounds(logits):
            return original(logits, chunk_size)
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return logprob_entropy_rows(logits, index)[1]

    return entropy_from_logits


def _rounds(logits: Tensor) -> bool:
    """Whether TRL computes in half precision, rounding each step: not on the devices that its kernel runs on."""
    return current.get() is None and logits.dtype.itemsize < 4 and logits.device.type not in ("cuda", "xpu")


def _scores(logits: Tensor, index: Tensor, temperature: float, need_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Of logits, or of the hidden states that stand for them."""
    head = current.get()
    if head is not None:
        return head.scores(logits, index, temperature, need_entropy)
    return logprob_entropy_rows(logits, index, temperature=temperature, need_entropy=need_entropy)


def _masked(x: Tensor, row_mask: Tensor | None) -> Tensor:
    return x if row_mask is None else x.masked_fill(row_mask == 0, 0.0)


def _chunked_logprob(original: Any, logits_budget: int) -> Any:
    class ChunkedLogProb(original):
        """TRL's ChunkedLogProbFunction, called by its apply alone."""

        @staticmethod
        def apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=None
        ):  # fmt: skip
            # Under ZeRO-3 the weight is whole only within TRL's own context, in backward too.
            if outputs is None or not {"log_probs", "entropy"}.issuperset(outputs) or hasattr(weight, "ds_id"):
                more = () if outputs is None else (outputs,)
                return original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, *more)
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            logprob, entropy = linear_logprob_entropy(
                hidden.to(dtype),
                weight,
                targets,
                bias_V=bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                need_entropy="entropy" in outputs,
                logits_dtype=dtype,
                logits_budget=logits_budget,
            )
            return logprob, entropy if "entropy" in outputs else None, None, None, None

    return ChunkedLogProb
