"""Log-probability, entropy and PPO loss straight from hidden states and the output projection, never holding (T, V).

Axes: T packed tokens, N of them computed, C of those at a time, D hidden size, V vocabulary (with vocab_group this rank's
share of it). Log-probabilities are in nats. Matrix products are the vendor's; what stands between them is the row kernels of
logprob_entropy and ppo_loss.
Order of this file: chunks, ops, public functions.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from rlsp_kernels.backend import Backend, check_device, runs_triton, scaled
from rlsp_kernels.kl import KLKind
from rlsp_kernels.logprob_entropy import (
    LN2,
    check_scaling,
    logprob_entropy_blocks,
    logprob_entropy_grad,
    logprob_entropy_launch,
    merge_ranks,
    row_numbers,
)
from rlsp_kernels.ppo_loss import (
    Clip,
    PerToken,
    PPOMetrics,
    check_clip,
    check_loss,
    empty_columns,
    policy_terms_torch,
    ppo_rows,
    reduce,
)

LOGITS_BUDGET = 1 << 30  # bytes: 4,096 tokens of a 128,256 vocabulary in bf16. Half of it doubles the traffic of d_weight

# --- chunks -----------------------------------------------------------------------------------


class _Head:
    """The output projection of one call: logits of a chunk of rows, and the gradients that their gradient gives."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows_N: Tensor | None,
        logits_dtype: torch.dtype | None,
        logits_budget: int,
        share: int,
        need_grad: bool = True,
    ):
        self.num_tokens, self.rows_N = len(hidden_TD), rows_N
        self.hidden_ND = hidden_TD if rows_N is None else hidden_TD.index_select(0, rows_N)
        self.weight_VD, self.bias_V = weight_VD, bias_V
        self.dtype = logits_dtype or hidden_TD.dtype
        widens = self.dtype.itemsize > hidden_TD.dtype.itemsize
        # Half-precision operands with float32 logits: a GPU's matrix product writes them as they are added up.
        self.out_dtype = self.dtype if widens and hidden_TD.is_cuda and self.dtype == torch.float32 else None
        operand = hidden_TD.dtype if self.out_dtype else self.dtype
        self.hidden_ND, self.weight_VD = self.hidden_ND.to(operand), self.weight_VD.to(operand)
        V = len(weight_VD)
        # The gradient of float32 logits goes to a buffer of its own in the operands' dtype: matrix products want it there.
        apart = need_grad and self.out_dtype is not None
        # By the largest share of the vocabulary, not one's own: every rank must take the same chunks.
        size = max(V, share) * (self.dtype.itemsize + (hidden_TD.dtype.itemsize if apart else 0))
        most = max(1, logits_budget // size)
        self.chunk = most if most < 128 else most // 128 * 128
        rows = min(self.chunk, len(self.hidden_ND))
        self.logits_CV = torch.empty(rows, V, dtype=self.dtype, device=hidden_TD.device)
        self.dlogits_CV = torch.empty(rows, V, dtype=hidden_TD.dtype, device=hidden_TD.device) if apart else None

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows start:stop of N and their logits, in a buffer that the next chunk overwrites."""
        for start in range(0, len(self.hidden_ND), self.chunk):
            part = slice(start, min(start + self.chunk, len(self.hidden_ND)))
            hidden_CD, logits_CV = self.hidden_ND[part], self.logits_CV[: part.stop - part.start]
            if self.out_dtype is not None:
                torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=self.out_dtype, out=logits_CV)
                if self.bias_V is not None:
                    logits_CV += self.bias_V
            elif self.bias_V is not None:
                torch.addmm(self.bias_V.to(self.dtype), hidden_CD, self.weight_VD.t(), out=logits_CV)
            else:
                torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
            yield part, logits_CV

    def dlogits(self, logits_CV: Tensor) -> Tensor:
        """Where the gradient of a chunk goes: over its logits, unless they are wider than a matrix product wants."""
        return logits_CV if self.dlogits_CV is None else self.dlogits_CV[: len(logits_CV)]

    def over_tokens(self, x_N: Tensor) -> Tensor:
        """(N, ...) spread over (T, ...), 0 where nothing was computed."""
        if self.rows_N is None:
            return x_N
        return x_N.new_zeros(self.num_tokens, *x_N.shape[1:]).index_copy_(0, self.rows_N, x_N)


class _Gradients:
    """d_hidden, and d_weight and d_bias added up over chunks in float32 (float64 for float64)."""

    def __init__(
        self,
        head: _Head,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ):
        self.head, self.dtype = head, hidden_TD.dtype
        wide = torch.float64 if torch.float64 in (head.dtype, hidden_TD.dtype) else torch.float32
        self.hidden_ND = torch.empty_like(head.hidden_ND) if need_hidden else None
        self.weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device) if need_weight else None
        self.weight_dtype = weight_VD.dtype
        self.bias_V = torch.zeros(bias_V.shape, dtype=wide, device=bias_V.device) if need_bias else None
        self.bias_dtype = bias_V.dtype if need_bias else torch.float32

    def add(self, part: slice, dlogits_CV: Tensor) -> None:
        """Those of one chunk."""
        head = self.head
        if self.hidden_ND is not None:
            torch.mm(dlogits_CV, head.weight_VD, out=self.hidden_ND[part])
        if self.weight_VD is not None:
            hidden_CD = head.hidden_ND[part]
            if dlogits_CV.is_cuda and dlogits_CV.dtype != self.weight_VD.dtype:
                torch.addmm(self.weight_VD, dlogits_CV.t(), hidden_CD, out_dtype=self.weight_VD.dtype, out=self.weight_VD)
            else:
                self.weight_VD.addmm_(dlogits_CV.t().to(self.weight_VD.dtype), hidden_CD.to(self.weight_VD.dtype))
        if self.bias_V is not None:
            self.bias_V += dlogits_CV.sum(0, dtype=self.bias_V.dtype)

    def finish(self, group: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden (T, D), d_weight (V, D), d_bias (V,), in the dtypes of what they belong to; empty where not wanted."""
        head = self.head
        head.logits_CV = head.dlogits_CV = None  # before d_weight is rounded; the caller holds no view of them either
        if self.hidden_ND is not None and group is not None:
            dist.all_reduce(self.hidden_ND, group=_resolve_process_group(group))  # each rank knows its share of V
        device = head.hidden_ND.device
        if self.hidden_ND is None:
            d_hidden_TD = torch.empty(0, dtype=self.dtype, device=device)
        else:
            d_hidden_TD = head.over_tokens(self.hidden_ND.to(self.dtype))
        nothing = torch.empty(0, dtype=self.weight_dtype, device=device)
        d_weight_VD = nothing if self.weight_VD is None else self.weight_VD.to(self.weight_dtype)
        nothing = torch.empty(0, dtype=self.bias_dtype, device=device)
        return d_hidden_TD, d_weight_VD, nothing if self.bias_V is None else self.bias_V.to(self.bias_dtype)


def _auto_rows(rows_N: Tensor | None, idle_T: Tensor) -> Tensor | None:
    """rows_N as given. Without it, on a CPU, those that are not idle; on a GPU looking would wait for the device: None."""
    if rows_N is not None or idle_T.device.type != "cpu" or not idle_T.any():
        return rows_N
    return (~idle_T).nonzero().squeeze(-1)


def _row_stats(
    logits_CV: Tensor,
    token_C: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    need_entropy: bool,
    triton_: bool,
    first_token: int,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and (2, C) stats of whole rows, whose logits may be spread over a group of ranks."""
    if triton_:
        parts = logprob_entropy_launch(logits_CV, token_C, temperature, softcap, scale, need_entropy, first_token)
    else:
        parts = logprob_entropy_blocks(
            logits_CV, token_C, temperature, softcap=softcap, logit_scale=scale, need_entropy=need_entropy,
            first_token=None if group is None else first_token,
        )  # fmt: skip
    if group is None:
        return parts
    logprob_C, entropy_C, stats_2C = merge_ranks(*parts, LN2.value if triton_ else 1.0, _resolve_process_group(group))
    return logprob_C, entropy_C if need_entropy else torch.zeros_like(entropy_C), stats_2C


# --- ops --------------------------------------------------------------------------------------


@torch.library.custom_op("rlsp_kernels::linear_logprob_entropy", mutates_args=())
def _linear_logprob_entropy_op(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_T: Tensor,
    temperature_T: Tensor | None,
    rows_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    need_entropy: bool,
    logits_dtype: torch.dtype | None,
    logits_budget: int,
    first_token: int,
    share: int,
    group: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_T, entropy_T, and (2, T) stats that backward needs."""
    triton_ = runs_triton(backend, hidden_TD) and logits_dtype != torch.float64
    head = _Head(hidden_TD, weight_VD, bias_V, rows_N, logits_dtype, logits_budget, share, need_grad=False)
    token_N = token_T if rows_N is None else token_T[rows_N]
    temperature_N = temperature_T if temperature_T is None or rows_N is None else temperature_T[rows_N]
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    out_4N = torch.empty(4, len(head.hidden_ND), dtype=dtype, device=hidden_TD.device)
    for part, logits_CV in head.chunks():
        scale = temperature if temperature_N is None else temperature_N[part]
        logprob_C, entropy_C, stats_2C = _row_stats(
            logits_CV, token_N[part], scale, softcap, logit_scale, need_entropy, triton_, first_token, group
        )
        out_4N[0, part], out_4N[1, part], out_4N[2:, part] = logprob_C, entropy_C, stats_2C
    logprob_T, entropy_T, max_T, d_T = (head.over_tokens(x_N).clone() for x_N in out_4N)
    return logprob_T, entropy_T, torch.stack([max_T, d_T])


@_linear_logprob_entropy_op.register_fake
def _(hidden_TD, weight_VD, bias_V, token_T, temperature_T, rows_N, temperature, softcap, scale, need, logits_dtype, *_):
    dtype = _sum_dtype(hidden_TD, logits_dtype)
    T = hidden_TD.shape[0]
    return *(hidden_TD.new_empty(T, dtype=dtype) for _ in range(2)), hidden_TD.new_empty(2, T, dtype=dtype)


@torch.library.custom_op("rlsp_kernels::linear_logprob_entropy_grad", mutates_args=())
def _linear_logprob_entropy_grad_op(
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    entropy_T: Tensor,
    stats_2T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_T: Tensor,
    temperature_T: Tensor | None,
    rows_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    logits_budget: int,
    first_token: int,
    share: int,
    group: str | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias; empty where not needed."""
    triton_ = runs_triton(backend, hidden_TD) and logits_dtype != torch.float64
    idle_T = dlogprob_T == 0 if dentropy_T is None else (dlogprob_T == 0) & (dentropy_T == 0)
    rows_N = _auto_rows(rows_N, idle_T)
    head = _Head(hidden_TD, weight_VD, bias_V, rows_N, logits_dtype, logits_budget, share)
    gradients = _Gradients(head, hidden_TD, weight_VD, bias_V, need_hidden, need_weight, need_bias)
    columns = (dlogprob_T, dentropy_T, token_T, entropy_T, temperature_T)
    if rows_N is not None:
        columns = tuple(None if x is None else x[rows_N] for x in columns)
        stats_2T = stats_2T[:, rows_N]
    for part, logits_CV in head.chunks():
        dlogprob_C, dentropy_C, token_C, entropy_C, temperature_C = (None if x is None else x[part] for x in columns)
        dlogits_CV = head.dlogits(logits_CV)
        logprob_entropy_grad(
            dlogits_CV, dlogprob_C, dentropy_C, logits_CV, token_C, entropy_C, stats_2T[:, part],
            temperature if temperature_C is None else temperature_C, softcap, logit_scale, triton_, first_token,
        )  # fmt: skip
        gradients.add(part, dlogits_CV)
        del logits_CV, dlogits_CV
    return gradients.finish(group)


@_linear_logprob_entropy_grad_op.register_fake
def _(dlogprob_T, dentropy_T, entropy_T, stats_2T, hidden_TD, weight_VD, bias_V, *args):
    return _fake_gradients(hidden_TD, weight_VD, bias_V, *args[-3:])


def _sum_dtype(hidden_TD: Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    """What log-probabilities and losses come in."""
    return torch.float64 if (logits_dtype or hidden_TD.dtype) == torch.float64 else torch.float32


def _fake_gradients(hidden_TD, weight_VD, bias_V, need_hidden, need_weight, need_bias):
    return (
        torch.empty_like(hidden_TD, memory_format=torch.contiguous_format) if need_hidden else hidden_TD.new_empty(0),
        torch.empty_like(weight_VD, memory_format=torch.contiguous_format) if need_weight else weight_VD.new_empty(0),
        torch.empty_like(bias_V) if need_bias else hidden_TD.new_empty(0, dtype=torch.float32),
    )


def _setup_logprob(ctx, inputs, output):
    hidden_TD, weight_VD, bias_V, token_T, temperature_T, rows_N, *numbers = inputs
    ctx.numbers = numbers
    _, entropy_T, stats_2T = output
    ctx.save_for_backward(entropy_T, stats_2T, hidden_TD, weight_VD, bias_V, token_T, temperature_T, rows_N)
    ctx.mark_non_differentiable(stats_2T)
    ctx.set_materialize_grads(False)


def _backward_logprob(ctx, dlogprob_T, dentropy_T, _):
    entropy_T = ctx.saved_tensors[0]
    temperature, softcap, logit_scale, need_entropy, *rest = ctx.numbers
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    d_hidden_TD, d_weight_VD, d_bias_V = _linear_logprob_entropy_grad_op(
        torch.zeros_like(entropy_T) if dlogprob_T is None else dlogprob_T.contiguous(),
        dentropy_T.contiguous() if dentropy_T is not None and need_entropy else None,
        *ctx.saved_tensors, temperature, softcap, logit_scale, *rest, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return (
        d_hidden_TD if need_hidden else None,
        d_weight_VD if need_weight else None,
        d_bias_V if need_bias else None,
        *[None] * 13,
    )


_linear_logprob_entropy_op.register_autograd(_backward_logprob, setup_context=_setup_logprob)


@torch.library.custom_op("rlsp_kernels::linear_ppo_loss", mutates_args=())
def _linear_ppo_loss_op(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    temperature_T: Tensor | None,
    rows_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    need_entropy: bool,
    logits_dtype: torch.dtype | None,
    logits_budget: int,
    first_token: int,
    share: int,
    group: str | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, d_hidden, d_weight, d_bias; the gradients are empty where not needed."""
    triton_ = runs_triton(backend, hidden_TD) and logits_dtype != torch.float64
    clip = Clip(clip_low, clip_high, dual_clip, kl_coef, kl_kind, entropy_coef)
    tokens = PerToken(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, temperature_T)
    idle_T = weight_T == 0
    if not entropy_coef and (ref_logprob_T is None or not kl_coef):
        idle_T = idle_T | (advantage_T == 0)
    rows_N = _auto_rows(rows_N, idle_T)
    needs = (need_hidden, need_weight, need_bias)
    head = _Head(hidden_TD, weight_VD, bias_V, rows_N, logits_dtype, logits_budget, share, need_grad=any(needs))
    gradients = _Gradients(head, hidden_TD, weight_VD, bias_V, *needs) if any(needs) else None
    if rows_N is not None:
        tokens = tokens.rows(rows_N)
    columns_CN = empty_columns(len(head.hidden_ND), head.logits_CV)
    for part, logits_CV in head.chunks():
        chunk = tokens.rows(part)
        dlogits_CV = None if gradients is None else head.dlogits(logits_CV)
        if group is None:
            ppo_rows(
                logits_CV, dlogits_CV, columns_CN[:, part], chunk, clip, temperature, softcap, logit_scale, need_entropy,
                triton_,
            )  # fmt: skip
        else:
            scale = temperature if chunk.temperature_T is None else chunk.temperature_T
            logprob_C, entropy_C, stats_2C = _row_stats(
                logits_CV, chunk.token_T, scale, softcap, logit_scale, need_entropy or entropy_coef != 0, triton_,
                first_token, group,
            )  # fmt: skip
            columns_CN[:, part], g_C, g_entropy_C = policy_terms_torch(logprob_C, entropy_C, *chunk[1:6], clip)
            if dlogits_CV is not None:
                logprob_entropy_grad(
                    dlogits_CV, g_C, g_entropy_C if entropy_coef else None, logits_CV, chunk.token_T, entropy_C, stats_2C,
                    scale, softcap, logit_scale, triton_, first_token,
                )  # fmt: skip
        if gradients is not None:
            gradients.add(part, dlogits_CV)
        del logits_CV, dlogits_CV
    loss, metrics = reduce(columns_CN, triton_)
    if gradients is None:
        return loss, metrics, hidden_TD.new_empty(0), weight_VD.new_empty(0), hidden_TD.new_empty(0, dtype=torch.float32)
    return loss, metrics, *gradients.finish(group)


@_linear_ppo_loss_op.register_fake
def _(hidden_TD, weight_VD, bias_V, *args):
    logits_dtype, needs = args[-9], args[-3:]
    loss = hidden_TD.new_empty((), dtype=_sum_dtype(hidden_TD, logits_dtype))
    metrics = hidden_TD.new_empty(len(PPOMetrics._fields), dtype=torch.float64)
    return loss, metrics, *_fake_gradients(hidden_TD, weight_VD, bias_V, *needs)


def _setup_ppo(ctx, inputs, output):
    ctx.backend = inputs[-4]
    _, metrics, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(metrics, *gradients)
    ctx.set_materialize_grads(False)  # of zeros, (V, D) among them, for outputs that have no gradient


def _backward_ppo(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 30
    gradients = []
    for wanted, gradient in zip(ctx.needs_input_grad[:3], ctx.saved_tensors, strict=True):
        if wanted and gradient.ndim == 1:
            gradient = scaled(gradient[None], dloss, ctx.backend)[0]
        elif wanted:
            gradient = scaled(gradient, dloss, ctx.backend)
        gradients.append(gradient if wanted else None)
    return *gradients, *[None] * 27


_linear_ppo_loss_op.register_autograd(_backward_ppo, setup_context=_setup_ppo)

# --- public -----------------------------------------------------------------------------------


def linear_logprob_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    need_entropy: bool = True,
    logits_dtype: torch.dtype | None = None,
    rows_N: Tensor | None = None,
    logits_budget: int = LOGITS_BUDGET,
    vocab_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """logprob_entropy(logit_scale * (hidden @ weight.T + bias), token) over chunks of tokens.

    Args:
        hidden_TD: (T, D) f32, f16 or bf16; differentiable.
        weight_VD: (V, D), the output projection, in the dtype of hidden_TD; differentiable; may be tied. A DTensor (FSDP2) is
            gathered, and its gradient averaged over the ranks, as FSDP2 does.
        token_T: (T,) i64, each in [0, V).
        bias_V: (V,) or None; differentiable.
        temperature, softcap, need_entropy: as in logprob_entropy.
        logit_scale: multiplies the logits before softcap and temperature.
        logits_dtype: dtype of the logits. float32 with bf16 operands keeps the products as they were added up.
        rows_N: (N,) i64, distinct: the rows to compute; the others leave before the matrix product and get 0.
        logits_budget: bytes of logits to hold at a time.
        vocab_group: ranks over which the vocabulary is spread: weight_VD and bias_V are this rank's rows, of equal number on
            every rank or a DTensor in Shard(0); hidden_TD and all else are the same on every rank.
        backend: "auto" is Triton on a GPU and plain torch on a CPU.
    Returns:
        logprob_T, entropy_T: (T,) f32, differentiable.
    Raises:
        ValueError: on wrong shapes, dtypes, devices or temperature.
        RuntimeError: when the backend asked for cannot run.
    Cost: one matrix product forward; one more to recompute in backward, and one for each of d_hidden and d_weight. Memory:
        logits_budget or (after it) d_weight in its own dtype, besides d_weight in float32 and d_hidden. No host sync. On a CPU
        backward leaves out rows without a gradient.
    Accuracy: that of the matrix product's dtype; d_weight is added up in float32 over chunks.
    """
    weight_VD, bias_V, first_token, share, group = _share(weight_VD, bias_V, vocab_group)
    _check_linear(hidden_TD, weight_VD, bias_V, token_T, temperature, softcap, logit_scale, logits_dtype, rows_N, logits_budget)
    per_token = isinstance(temperature, Tensor)
    logprob_T, entropy_T, _ = _linear_logprob_entropy_op(
        hidden_TD.contiguous(),
        weight_VD,
        bias_V,
        token_T.contiguous(),
        row_numbers(temperature) if per_token else None,
        rows_N,
        1.0 if per_token else float(temperature),
        softcap,
        float(logit_scale),
        need_entropy,
        logits_dtype,
        logits_budget,
        first_token,
        share,
        group,
        backend,
    )
    return logprob_T, entropy_T


def linear_ppo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
    importance_weight_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    entropy_coef: float = 0.0,
    need_entropy: bool = True,
    logits_dtype: torch.dtype | None = None,
    rows_N: Tensor | None = None,
    logits_budget: int = LOGITS_BUDGET,
    vocab_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, PPOMetrics]:
    """ppo_loss(logit_scale * (hidden @ weight.T + bias), ...), never holding (T, V), its gradients made on the way.

    dL/dlogprob of a token is known as soon as its row's sum is, so the gradient of a chunk's logits replaces them and is
    multiplied out at once: three matrix products, where one that returns differentiable log-probabilities needs four.

    Args:
        hidden_TD, weight_VD, bias_V, logit_scale, logits_dtype, logits_budget, vocab_group, backend: as in
            linear_logprob_entropy; the rest as in ppo_loss.
        rows_N: (N,) i64, distinct: the rows to compute. The others leave before the first matrix product, as if of weight 0:
            they are in no metric either. None: on a CPU rows of weight 0 leave, and where nothing but the advantage has a
            gradient those of advantage 0; on a GPU, where looking would wait for the device, none do: use active_rows.
    Returns:
        loss, metrics as ppo_loss; differentiable in hidden_TD, weight_VD and bias_V.
    Raises:
        ValueError: on wrong shapes, dtypes, devices or coefficients.
        RuntimeError: when the backend asked for cannot run.
    Cost: three matrix products of N rows (one without gradient), and the logits written, read, written and read twice
        between them. Memory: logits_budget or (after it) d_weight in its own dtype, besides d_weight in float32 and d_hidden;
        in backward the two gradients once more. With logits_dtype and weights in another dtype a copy of them. No host sync.
    Accuracy: as linear_logprob_entropy; the same bits every run.
    """
    weight_VD, bias_V, first_token, share, group = _share(weight_VD, bias_V, vocab_group)
    _check_linear(hidden_TD, weight_VD, bias_V, token_T, temperature, softcap, logit_scale, logits_dtype, rows_N, logits_budget)
    check_loss(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T)
    check_clip(clip_ratio_low, clip_ratio_high, dual_clip, kl_coef, kl_kind, ref_logprob_T)
    per_token = isinstance(temperature, Tensor)
    columns = (old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, temperature if per_token else None)
    dtype = _sum_dtype(hidden_TD, logits_dtype)
    grads = torch.is_grad_enabled()
    loss, metrics, *_ = _linear_ppo_loss_op(
        hidden_TD.contiguous(),
        weight_VD,
        bias_V,
        token_T.contiguous(),
        *(None if x is None else x.detach().to(dtype).contiguous() for x in columns),
        rows_N,
        1.0 if per_token else float(temperature),
        softcap,
        float(logit_scale),
        float(clip_ratio_low),
        float(clip_ratio_high),
        dual_clip,
        float(kl_coef),
        kl_kind,
        float(entropy_coef),
        need_entropy,
        logits_dtype,
        logits_budget,
        first_token,
        share,
        group,
        backend,
        grads and hidden_TD.requires_grad,
        grads and weight_VD.requires_grad,
        grads and bias_V is not None and bias_V.requires_grad,
    )
    return loss, PPOMetrics(*metrics.unbind())


def active_rows(
    weight_T: Tensor, advantage_T: Tensor | None = None, *, kl_coef: float = 0.0, entropy_coef: float = 0.0
) -> Tensor:
    """rows_N of the tokens that can have a gradient: weight not 0 and, without KL or entropy term, advantage not 0.

    Args:
        weight_T, advantage_T: (T,), on the CPU for a batch laid out there; advantage_T None looks at the weight alone.
        kl_coef, entropy_coef: those of linear_ppo_loss.
    Returns:
        (N,) i64 on the device of weight_T.
    Cost: waits for the device when weight_T is on a GPU: its result's length is only known there.
    """
    active_T = weight_T != 0
    if advantage_T is not None and kl_coef == 0 and entropy_coef == 0:
        active_T = active_T & (advantage_T != 0)
    return active_T.nonzero().squeeze(-1)


def _share(
    weight_VD: Tensor, bias_V: Tensor | None, vocab_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, int, int, str | None]:
    """Weight and bias as plain tensors, this rank's first token of the vocabulary, the largest share, the group's name."""
    first_token, share, name = 0, 0, None
    if vocab_group is not None:
        size, world = weight_VD.shape[0], dist.get_world_size(vocab_group)
        share = -(-size // world) if hasattr(weight_VD, "full_tensor") else size
        first_token, name = dist.get_rank(vocab_group) * share, vocab_group.group_name
    weight_VD, bias_V = (None if x is None else _plain(x, vocab_group is None) for x in (weight_VD, bias_V))
    if vocab_group is not None and len(weight_VD) == 0:
        raise ValueError(f"rank {dist.get_rank(vocab_group)} of vocab_group has no row of the vocabulary: use fewer ranks")
    return weight_VD, bias_V, first_token, share, name


def _plain(x: Tensor, gather: bool) -> Tensor:
    """A DTensor's full or local tensor; another one as it is. Gradients flow back to the DTensor."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial, Shard  # half a second, for those who use it

    if gather:
        return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)
    if x.placements != (Shard(0),):
        raise ValueError(f"with vocab_group a DTensor must be in Shard(0) over that group alone, got {x.placements}")
    return x.to_local()


def _check_linear(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_T: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    rows_N: Tensor | None,
    logits_budget: int,
) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"want hidden (T, D) and weight (V, D), got {tuple(hidden_TD.shape)}, {tuple(weight_VD.shape)}")
    if token_T.shape != hidden_TD.shape[:1] or token_T.dtype != torch.int64:
        raise ValueError(f"want token (T,) int64, got {tuple(token_T.shape)} {token_T.dtype}")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"want bias_V (V,) = {tuple(weight_VD.shape[:1])}, got {tuple(bias_V.shape)}")
    if not hidden_TD.is_floating_point() or weight_VD.shape[0] == 0:
        raise ValueError(
            f"want floating-point hidden_TD and at least one token, got {hidden_TD.dtype}, {tuple(weight_VD.shape)}"
        )
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise ValueError(f"logits_dtype must be floating point, got {logits_dtype}")
    if hidden_TD.dtype != weight_VD.dtype and logits_dtype is None:
        raise ValueError(f"hidden_TD is {hidden_TD.dtype} and weight_VD {weight_VD.dtype}: convert one to the other's")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {logit_scale}")
    if logits_budget <= 0:
        raise ValueError(f"logits_budget must be a positive number of bytes, got {logits_budget}")
    if rows_N is not None and (rows_N.ndim != 1 or rows_N.dtype != torch.int64):
        raise ValueError(f"want rows_N (N,) int64, got {tuple(rows_N.shape)} {rows_N.dtype}")
    for name, x in {"weight_VD": weight_VD, "bias_V": bias_V, "token_T": token_T, "rows_N": rows_N}.items():
        if x is not None:
            check_device(name, x, hidden_TD)
    check_scaling(token_T, temperature, softcap)
