"""Other people's kernels under one signature, and what trainers write by hand: shared by the benches of the Triton kernels.

Axes: T packed tokens, D hidden size, V vocabulary. On logits a peer is op(logits_TV, token_T, inplace), from hidden states
op(hidden_TD, weight_VD, token_T). It returns what `gives` says:
  both     logprob_T, entropy_T, both differentiable
  logprob  logprob_T, differentiable
  nll      the sum of -logprob, a scalar: no weight per token, so no policy gradient can be made of it

Each is imported from wherever it is installed; one that is not, or that needs another device, is named with the reason.
"""

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

import torch
from timing import wanted
from torch import Tensor

Gives = Literal["both", "logprob", "nll"]


@dataclass(frozen=True)
class Peer:
    """A way to get log-probabilities that is not ours."""

    name: str
    package: str
    """Distribution that it comes from."""
    gives: Gives
    lacks: str
    """What it does not do and ours does."""
    op: Callable[..., object]


class LeftOut(Exception):
    """Why a peer cannot run here."""


# --- what trainers write by hand ---------------------------------------------------------------


def eager_logprob_entropy(logits_TV: Tensor, token_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in float32 (float64 if given that), every step a tensor of the size of the logits."""
    x_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    log_p_TV = x_TV.log_softmax(-1)
    return log_p_TV.gather(-1, token_T[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


@dataclass(frozen=True)
class PPOSettings:
    """Of the loss that all providers compute."""

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    dual_clip: float = 3.0
    kl_coef: float = 0.01
    entropy_coef: float = 0.001

    def ours(self, entropy: bool) -> dict[str, float | bool]:
        """As our ops take them; without the entropy, neither its bonus nor its metric."""
        keys = asdict(self) | {"need_entropy": entropy}
        return keys if entropy else keys | {"entropy_coef": 0.0}


def ppo_of_logprob(
    logprob_T: Tensor,
    entropy_T: Tensor | None,
    old_logprob_T: Tensor,
    ref_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    settings: PPOSettings,
) -> Tensor:
    """The clipped loss with the k3 estimate of the KL; without an entropy, without its bonus."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    clipped_T = ratio_T.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    loss_T = torch.maximum(-advantage_T * ratio_T, -advantage_T * clipped_T)
    bound_T = torch.minimum(loss_T, -advantage_T * settings.dual_clip)
    loss_T = torch.where(advantage_T < 0, bound_T, loss_T)
    log_ref_ratio_T = ref_logprob_T - logprob_T
    loss_T = loss_T + settings.kl_coef * (log_ref_ratio_T.expm1() - log_ref_ratio_T)
    if entropy_T is not None:
        loss_T = loss_T - settings.entropy_coef * entropy_T
    return (loss_T * weight_T).sum()


class LmHead:
    """Stands for the model that made the logits: hands them out as a non-leaf and takes their gradient, copying neither.

    So an op may overwrite them, as it may inside a model, and no provider pays for an accumulation into a leaf.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.d_logits: Tensor | None = None
        self._anchor = torch.zeros((), device=logits.device, requires_grad=True)

    def forward(self) -> Tensor:
        self.d_logits = None
        return _HandOut.apply(self._anchor, self)


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, head: LmHead) -> Tensor:
        ctx.head = head
        return head.logits.detach()

    @staticmethod
    def backward(ctx, d_logits: Tensor) -> tuple[None, None]:
        ctx.head.d_logits = d_logits
        return None, None


# --- on logits ---------------------------------------------------------------------------------


def logits_peers(device: str, only: Sequence[str] | None) -> list[Peer]:
    """Every way to get log-probabilities from logits that can run here."""
    return _loaded([_torch_logits, _trl_logits, _flash_attn, _liger_logits, _quack_logits], device, only)


def _torch_logits(device: str) -> Iterator[Peer]:
    compiled = torch.compile(eager_logprob_entropy)
    yield Peer("torch eager", "torch", "both", "", lambda logits, token, inplace: eager_logprob_entropy(logits, token))
    yield Peer("torch.compile", "torch", "both", "", lambda logits, token, inplace: compiled(logits, token))


def _trl_logits(device: str) -> Iterator[Peer]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def two(logits: Tensor, token: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, token), entropy_from_logits(logits)

    yield Peer("trl, two functions", "trl", "both", "reads the logits once for each", two)
    need_gpu(device, "selective_log_softmax_and_entropy")
    from trl.kernels import selective_log_softmax_and_entropy

    lacks = "no in-place gradient, no softcap, one temperature for all tokens (a compiled-in constant)"
    yield Peer(
        "trl kernel", "trl", "both", lacks, lambda logits, token, inplace: selective_log_softmax_and_entropy(logits, token)
    )


def _flash_attn(device: str) -> Iterator[Peer]:
    bare("flash_attn")  # its __init__ loads the compiled attention, which this kernel does without
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    need_gpu(device)

    def op(logits: Tensor, token: Tensor, inplace: bool) -> Tensor:
        return -cross_entropy_loss(logits, token, inplace_backward=inplace)[0]

    yield Peer("flash-attn cross_entropy", "flash-attn", "logprob", "no entropy, no temperature per token, no softcap", op)


def _liger_logits(device: str) -> Iterator[Peer]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    need_gpu(device)
    lacks = "no entropy, no temperature; its forward writes a gradient over the logits already, its backward scales that"

    def op(logits: Tensor, token: Tensor, inplace: bool) -> Tensor:
        return -liger_cross_entropy(logits, token, reduction="none")

    yield Peer("liger cross_entropy", "liger-kernel", "logprob", lacks, op)


def _quack_logits(device: str) -> Iterator[Peer]:
    from quack.cross_entropy import cross_entropy

    need_gpu(device)

    def op(logits: Tensor, token: Tensor, inplace: bool) -> Tensor:
        return -cross_entropy(logits, token, reduction="none", inplace_backward=inplace)

    yield Peer("quack cross_entropy", "quack-kernels", "logprob", "no entropy, no temperature, no softcap, V % 8 == 0", op)


# --- from hidden states ------------------------------------------------------------------------


def linear_peers(device: str, only: Sequence[str] | None) -> list[Peer]:
    """Every way to get log-probabilities from hidden states and the output projection that can run here."""
    return _loaded([_torch_linear, _trl_linear, _verl_torch, _verl_kernel, _liger_linear, _cce, _quack_linear], device, only)


def _torch_linear(device: str) -> Iterator[Peer]:
    def eager(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return eager_logprob_entropy(hidden @ weight.T, token)

    yield Peer("torch eager", "torch", "both", "holds the logits and several float32 copies of them", eager)
    yield Peer("torch.compile", "torch", "both", "holds the logits", torch.compile(eager))


def _trl_linear(device: str) -> Iterator[Peer]:
    from trl.kernels import ChunkedLogProbFunction

    parameters = inspect.signature(ChunkedLogProbFunction.forward).parameters
    chunk = (32768,) if "chunk_size" in parameters else ()  # trl's own value; newer ones keep it to themselves
    tail = (None, 1.0, ("entropy",)) if "outputs" in parameters else (None, 1.0)

    def op(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return ChunkedLogProbFunction.apply(hidden, weight, None, token, 1.0, *chunk, *tail)[:2]

    yield Peer("trl chunked_logprob", "trl", "both", "one temperature for all tokens", op)


def _verl_torch(device: str) -> Iterator[Peer]:
    _bare_verl()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    op = FusedLinearForPPO()
    lacks = "one temperature, entropy and its gradient in the hidden dtype, bf16 accumulation of the weight's gradient"
    yield Peer("verl FusedLinearForPPO", "verl", "both", lacks, op)


def _verl_kernel(device: str) -> Iterator[Peer]:
    need_gpu(device)
    _bare_verl()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def op(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, token, 1.0, "none")

    yield Peer("verl linear_cross_entropy", "verl", "both", "one temperature, no bias, no softcap, D % 128 == 0", op)


def _liger_linear(device: str) -> Iterator[Peer]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def scaled(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, token, 1.0, -100, 1, True)
        return -nll, entropy

    lacks = "one temperature, no bias, no softcap, entropy in the hidden dtype; CuTe on sm_90, chunked torch elsewhere"
    yield Peer("liger scaled cross entropy", "liger-kernel", "both", lacks, scaled)
    need_gpu(device, "FLCE")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def flce(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(hidden, weight, token, reduction="sum", accum_dtype=torch.float32)

    yield Peer("liger FLCE", "liger-kernel", "nll", "a scalar: no weight per token, no entropy, no temperature", flce)


def _cce(device: str) -> Iterator[Peer]:
    from cut_cross_entropy import linear_cross_entropy

    need_gpu(device)

    def op(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, token, reduction="none")

    lacks = "no entropy, no temperature, sums in no fixed order, leaves out small gradients (so its time depends on the data)"
    yield Peer("cut-cross-entropy", "cut-cross-entropy", "logprob", lacks, op)


def _quack_linear(device: str) -> Iterator[Peer]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    need_gpu(device)

    def op(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, token, chunk_size=4096, reduction="sum")

    lacks = "a scalar: no weight per token, no entropy, no temperature; V % 8 == 0"
    yield Peer("quack linear_cross_entropy", "quack-kernels", "nll", lacks, op)


# --- importing ---------------------------------------------------------------------------------


def need_gpu(device: str, what: str = "it") -> None:
    """Raises LeftOut on a CPU."""
    if device != "cuda":
        raise LeftOut(f"{what} needs a GPU")


def losses(loaders: Sequence[Callable[[str], object]], device: str, only: Sequence[str] | None) -> list:
    """What each loader returns for a whole loss of a peer, named after the peer; those that cannot run here are named."""
    found = []
    for load in loaders:
        if wanted(load.__name__, only):
            try:
                found.append(load(device))
            except (ImportError, LeftOut) as error:
                print(f"{load.__name__}'s loss: left out, {error}")
    return found


def _loaded(loaders: Sequence[Callable[[str], Iterator[Peer]]], device: str, only: Sequence[str] | None) -> list[Peer]:
    peers: list[Peer] = []
    for load in loaders:
        try:
            for peer in load(device):
                if wanted(peer.name, only):
                    peers.append(peer)
        except (ImportError, LeftOut) as error:
            print(f"{load.__name__.strip('_')}: left out, {error}")
    return peers


def bare(package: str, folder: Path | None = None) -> Path:
    """Makes a package importable without running its __init__, and returns its folder."""
    if package not in sys.modules:
        if folder is None:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise ImportError(f"No module named {package!r}")
            folder = Path(next(iter(spec.submodule_search_locations)))
        module = types.ModuleType(package)
        module.__path__ = [str(folder)]
        module.__spec__ = ModuleSpec(package, None, is_package=True)  # without one, find_spec of others raises
        sys.modules[package] = module
    return Path(next(iter(sys.modules[package].__path__)))


def _bare_verl() -> None:
    """verl's __init__ imports Ray and its utils half of verl; what is used here needs tensordict and transformers only."""
    bare("verl.utils", bare("verl") / "utils")
