"""Advantages and returns of packed sequences: everything between the critic's values and the PPO losses, in one op.

Axes: T packed tokens, S sequences, N tokens whose mask is True. `cu_seqlens` (S + 1,) holds where each starts, then T.
Position t predicts token t + 1: value_T[t] is the value before that token, reward_T[t] what that token earned.
Order of this file: definition, compiled libraries, op, public functions.
"""

import functools
import json
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlsp_kernels.kl import KLKind, kl_penalty_torch

Backend = Literal["auto", "torch", "cpp", "cuda"]

_KL_KINDS: tuple[KLKind, ...] = ("k1", "k2", "k3")  # csrc/packed_gae.h numbers them in this order, from 1


class PackedGAE(NamedTuple):
    """What packed_gae returns, constants to autograd. Per-token tensors are float32, and 0 where the mask is False."""

    reward_T: Tensor
    """Shaped token rewards: those given, minus kl_coef * KL, plus the terminal reward at the last True position."""
    advantage_T: Tensor
    """Generalised advantage estimates, not whitened."""
    return_T: Tensor
    """Regression targets of the critic: value + advantage (with critic_lam where that is given)."""
    moments: Tensor
    """(3,) f64: count, sum and sum of squares of advantage_T over the mask. Those of batches and ranks add up."""
    num_nonfinite: Tensor
    """() i64: True positions where value, shaped reward or (at the last one) bootstrap value is NaN or infinite."""


# --- definition -------------------------------------------------------------------------------


def packed_gae_torch(
    value_T: Tensor,
    cu_seqlens: Tensor,
    mask_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    critic_lam: float | None = None,
    terminal_reward_S: Tensor | None = None,
    reward_T: Tensor | None = None,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k1",
    bootstrap_S: Tensor | None = None,
) -> PackedGAE:
    """What packed_gae means, in plain torch. Computes in the dtype it is given; log2(longest sequence) passes."""
    T, lengths_S = len(value_T), cu_seqlens.diff().long()
    index_N = mask_T.nonzero().squeeze(-1)  # a masked token carries its state through unchanged: leave it out
    sequence_N = torch.repeat_interleave(lengths_S, output_size=T)[index_N]
    last_N = torch.ones_like(index_N, dtype=torch.bool)
    last_N[:-1] = sequence_N[1:] != sequence_N[:-1]

    def at_last(number_S: Tensor | None) -> Tensor:
        zero_N = value_T.new_zeros(len(index_N))
        return zero_N if number_S is None else torch.where(last_N, number_S[sequence_N], zero_N)

    def over_T(number_N: Tensor) -> Tensor:
        return torch.zeros_like(value_T).index_copy(0, index_N, number_N)

    value_N, bootstrap_N = value_T[index_N], at_last(bootstrap_S)
    reward_N = at_last(terminal_reward_S)
    if reward_T is not None:
        reward_N = reward_N + reward_T[index_N]
    if kl_coef != 0:
        reward_N = reward_N - kl_coef * kl_penalty_torch(old_logprob_T[index_N], ref_logprob_T[index_N], kl_kind)
    next_value_N = torch.where(last_N, bootstrap_N, value_N.roll(-1))

    def lambda_return(lam: float | Tensor) -> Tensor:
        # Sums returns, not one-step errors: those telescope at gamma = lam = 1, and their roundings add up.
        lam_N = (lam[sequence_N] if isinstance(lam, Tensor) else torch.full_like(value_N, lam)).masked_fill(last_N, 0)
        longest = int(lengths_S.max()) if len(lengths_S) else 0
        return _reverse_recurrence(reward_N + gamma * (1 - lam_N) * next_value_N, gamma * lam_N, longest)

    return_N = lambda_return(lam)
    advantage_N = return_N - value_N
    if critic_lam is not None:
        return_N = lambda_return(critic_lam)
    wide_N = advantage_N.double()
    moments = torch.stack((wide_N.new_tensor(len(wide_N)), wide_N.sum(), wide_N.square().sum()))
    finite_N = value_N.isfinite() & reward_N.isfinite() & bootstrap_N.isfinite()
    return PackedGAE(over_T(reward_N), over_T(advantage_N), over_T(return_N), moments, (~finite_N).sum())


def _reverse_recurrence(x_N: Tensor, decay_N: Tensor, longest: int) -> Tensor:
    """y[i] = x[i] + decay[i] * y[i + 1] by doubling: after the pass of `stride`, y[i] covers 2 * stride terms."""
    stride = 1
    while stride < longest:
        # decay 0 ends a sequence; 0 * NaN would let the next one through
        further_N = torch.where(decay_N[:-stride] != 0, decay_N[:-stride] * x_N[stride:], 0)
        x_N = torch.cat((x_N[:-stride] + further_N, x_N[-stride:]))
        decay_N = torch.cat((decay_N[:-stride] * decay_N[stride:], torch.zeros_like(decay_N[-stride:])))
        stride *= 2
    return x_N


# --- compiled libraries -----------------------------------------------------------------------


class Library(NamedTuple):
    """One compiled library, as found when this module was imported."""

    loaded: bool
    detail: str
    """Its path when loaded, else why not."""


def _load(name: str) -> Library:
    path = Path(__file__).with_name(f"librlsp_{name}.so")
    if not path.exists():
        note = path.with_name("native_build.json")  # written by setup.py
        reasons = json.loads(note.read_text()) if note.exists() else {}
        return Library(False, reasons.get(name, "never built: this source tree has not been installed"))
    if name == "cuda" and torch.version.cuda is None:
        return Library(False, f"{path} is there, but torch {torch.__version__} has no CUDA")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(False, f"{path} does not load into torch {torch.__version__}: {error}")
    return Library(True, str(path))


def backend_report() -> dict[str, Library]:
    """Which of packed_gae's compiled libraries are in use: keys "cpp" and "cuda"; `detail` says where, or why not."""
    return dict(_LIBRARIES)


# --- op ---------------------------------------------------------------------------------------

_OPS = torch.library.Library("rlsp_kernels", "FRAGMENT")
_OPS.define(
    "packed_gae(Tensor value_T, Tensor cu_seqlens, Tensor mask_T, float gamma, float lam, Tensor? lam_S, "
    "float? critic_lam, Tensor? terminal_reward_S, Tensor? reward_T, Tensor? old_logprob_T, Tensor? ref_logprob_T, "
    "float kl_coef, int kl_kind, Tensor? bootstrap_S) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The libraries only implement this schema, so it is the same on a machine that could not build them.
_LIBRARIES = {"cpp": _load("cpu"), "cuda": _load("cuda")}


@torch.library.register_fake("rlsp_kernels::packed_gae")
def _packed_gae_fake(value_T, cu_seqlens, mask_T, *_):
    shaped = [torch.empty_like(value_T) for _ in range(3)]
    return *shaped, value_T.new_empty(3, dtype=torch.float64), value_T.new_empty((), dtype=torch.int64)


def _packed_gae_without_library(
    value_T, cu_seqlens, mask_T, gamma, lam, lam_S, critic_lam, terminal_reward_S, reward_T, old_logprob_T,
    ref_logprob_T, kl_coef, kl_kind, bootstrap_S,
):  # fmt: skip
    _say_once(f"packed_gae runs in plain torch, several times slower: C++ library {_LIBRARIES['cpp'].detail}")
    _check_sequences(cu_seqlens, lam_S, len(value_T))
    result = packed_gae_torch(
        value_T, cu_seqlens, mask_T, gamma=gamma, lam=lam if lam_S is None else lam_S, critic_lam=critic_lam,
        terminal_reward_S=terminal_reward_S, reward_T=reward_T, old_logprob_T=old_logprob_T,
        ref_logprob_T=ref_logprob_T, kl_coef=kl_coef, kl_kind=_KL_KINDS[kl_kind - 1], bootstrap_S=bootstrap_S,
    )  # fmt: skip
    return tuple(result)


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


if not _LIBRARIES["cpp"].loaded:
    _OPS.impl("packed_gae", _packed_gae_without_library, "CPU")

# --- public -----------------------------------------------------------------------------------


def packed_gae(
    value_T: Tensor,
    cu_seqlens: Tensor,
    mask_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    critic_lam: float | None = None,
    terminal_reward_S: Tensor | None = None,
    reward_T: Tensor | None = None,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k1",
    bootstrap_S: Tensor | None = None,
    backend: Backend = "auto",
) -> PackedGAE:
    """A[t] = delta[t] + gamma * lam * A[t + 1], delta[t] = reward[t] + gamma * V[t + 1] - V[t], along each sequence.

    t + 1 means the next True position of the mask: a masked-out token (a tool's output, the prompt) carries the next
    value and advantage through unchanged, whatever it holds. A sequence without a True position has no effect.

    Args:
        value_T: (T,) f32, the critic's value before each predicted token.
        cu_seqlens: (S + 1,) i32, from 0 to T, never decreasing; empty sequences are allowed. What it holds, and lam where
            that is a tensor, is checked on a CPU; on a GPU a violation is a device-side assertion, since looking would
            wait for the device.
        mask_T: (T,) bool, True where the predicted token belongs to the response.
        gamma: discount, in [0, 1].
        lam: GAE's lambda in [0, 1], or (S,) f32 with one for each sequence (length-adaptive lambda).
        critic_lam: lambda of return_T alone, when it differs from that of advantage_T (VAPO uses 1).
        terminal_reward_S: (S,) f32, added at the last True position of each sequence.
        reward_T: (T,) f32, token rewards.
        old_logprob_T, ref_logprob_T: (T,) f32, nats, both or neither; used when kl_coef is not 0.
        kl_coef: reward_T -= kl_coef * kl_penalty(old_logprob_T, ref_logprob_T, kl_kind).
        kl_kind: "k1", "k2" or "k3".
        bootstrap_S: (S,) f32, value after the last token of a truncated response; 0 when absent.
        backend: "auto": the compiled library of the tensors' device, and plain torch on a CPU without one (said once).
    Returns:
        PackedGAE.
    Raises:
        ValueError: on a wrong shape, dtype, device, number, cu_seqlens or lam.
        RuntimeError: when the wanted library is not there.
    Cost: one launch, no host sync. Reads 5 bytes a token (+ 4 with reward_T, + 8 with KL), writes 12; reads again what
        a GPU cannot hold in registers (beyond about 1 M tokens).
    Accuracy: C++ carries float64 between tokens and so rounds once; CUDA and torch add float32 up as a tree. The same
        bits every run on one kind of device, for any number of CPU threads.
    Source: Schulman et al., arXiv:1506.02438; separate lambdas: VAPO, arXiv:2504.05118; affine scan: Blelloch, 1990.
    """
    T, S = value_T.numel(), cu_seqlens.numel() - 1
    if kl_coef != 0 and (old_logprob_T is None or ref_logprob_T is None):
        raise ValueError(f"kl_coef={kl_coef} needs both old_logprob_T and ref_logprob_T")
    columns = {
        "terminal_reward_S": terminal_reward_S,
        "reward_T": reward_T,
        "old_logprob_T": old_logprob_T if kl_coef != 0 else None,
        "ref_logprob_T": ref_logprob_T if kl_coef != 0 else None,
        "bootstrap_S": bootstrap_S,
    }
    _check_tensor("value_T", value_T, value_T, torch.float32, T)
    _check_tensor("cu_seqlens", cu_seqlens, value_T, torch.int32, max(S, 0) + 1)
    _check_tensor("mask_T", mask_T, value_T, torch.bool, T)
    for name, column in columns.items():
        _check_tensor(name, column, value_T, torch.float32, T if name.endswith("_T") else S)
    if isinstance(lam, Tensor):
        _check_tensor("lam", lam, value_T, torch.float32, S)
    for name, number in (("gamma", gamma), ("lam", lam), ("critic_lam", critic_lam)):
        if isinstance(number, (int, float)) and not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    if kl_kind not in _KL_KINDS:
        raise ValueError(f"kl_kind must be k1, k2 or k3, got {kl_kind!r}")
    _check_backend(backend, value_T.device.type)

    def ready(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return (tensor.detach() if tensor.requires_grad else tensor).contiguous()

    tensors = [ready(tensor) for tensor in (value_T, cu_seqlens, mask_T)]
    columns = {name: ready(column) for name, column in columns.items()}
    numbers = {"gamma": gamma, "critic_lam": critic_lam, "kl_coef": kl_coef}
    lam_S = ready(lam) if isinstance(lam, Tensor) else None
    if backend == "torch":
        if value_T.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_sequences(cu_seqlens, lam_S, T)
        return packed_gae_torch(*tensors, lam=lam if lam_S is None else lam_S, kl_kind=kl_kind, **numbers, **columns)
    numbers |= {"lam": lam if lam_S is None else 0.0, "lam_S": lam_S, "kl_kind": _KL_KINDS.index(kl_kind) + 1}
    try:
        return PackedGAE(*torch.ops.rlsp_kernels.packed_gae(*tensors, **numbers, **columns))
    except RuntimeError:  # the library looks at cu_seqlens and lam, ten times faster; looking again says what is wrong
        if value_T.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_sequences(cu_seqlens, lam_S, T)
        raise


def whiten(advantage_T: Tensor, mask_T: Tensor, moments: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(A - mean) / sqrt(variance + 1e-8) over the mask, 0 elsewhere; mean and variance over every rank of `group`.

    Args:
        advantage_T: (T,) f32.
        mask_T: (T,) bool.
        moments: (3,) f64, count, sum and sum of squares: from packed_gae, or the sum of several batches' moments.
        group: ranks to whiten over with one all-reduce of `moments`. None: `moments` are taken as they are, so several
            micro-batches add theirs up, all-reduce once, and then each whitens without another collective.
    Returns:
        (T,) f32. The variance is unbiased (divided by count - 1), as in verl; 0 when count is 0 or 1.
    Cost: one all-reduce of 24 bytes; reads 5 bytes a token, writes 4.
    Accuracy: sums in float64 lose the variance only when std < 1e-8 * mean, less than float32 advantages resolve.
    Source: masked_whiten in verl's verl/utils/torch_functional.py.
    """
    if group is not None:
        moments = moments.clone()
        dist.all_reduce(moments, group=group)
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    scale = (variance + 1e-8).rsqrt()
    return torch.where(mask_T, (advantage_T - mean.float()) * scale.float(), 0)


def _check_tensor(name: str, tensor: Tensor | None, value_T: Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
    if tensor.device != value_T.device:
        raise ValueError(f"{name} is on {tensor.device}, value_T on {value_T.device}; move them to one device")
    if tensor.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")


def _check_sequences(cu_seqlens: Tensor, lam_S: Tensor | None, T: int) -> None:
    decreases = (cu_seqlens.diff() < 0).nonzero().flatten().tolist()
    if decreases:
        i = decreases[0]
        raise ValueError(f"cu_seqlens decreases at {i + 1}: {int(cu_seqlens[i])} then {int(cu_seqlens[i + 1])}")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if (first, last) != (0, T):
        raise ValueError(f"cu_seqlens must run from 0 to T = {T}, got {first} to {last}")
    if lam_S is not None and not ((lam_S >= 0) & (lam_S <= 1)).all():
        raise ValueError(f"lam must be in [0, 1], got {lam_S.min().item()} to {lam_S.max().item()}")


def _check_backend(backend: str, device: str) -> None:
    if backend not in ("auto", "torch", "cpp", "cuda"):
        raise ValueError(f"backend must be auto, torch, cpp or cuda, got {backend!r}")
    if backend == "torch" or (backend == "auto" and device == "cpu"):
        return
    name = {"cpu": "cpp", "cuda": "cuda"}.get(device)
    if backend not in ("auto", name) or name is None:
        raise ValueError(f"backend={backend!r} has nothing for tensors on {device}; backend='torch' runs anywhere")
    library = _LIBRARIES[name]
    if not library.loaded:
        need = "a C++17 compiler and cmake" if name == "cpp" else "nvcc on the PATH and RLSP_BUILD=cuda"
        raise RuntimeError(
            f"packed_gae's library for {device} tensors is missing ({library.detail}). With {need}, reinstall by "
            "`pip install --no-build-isolation .`; or pass backend='torch'"
        )
