"""Policy and critic: a Hugging Face decoder over packed sequences, sharded with FSDP2.

Axes: T packed positions, S sequences, D hidden size, V vocabulary, N heads, H head size; where sdpa pads, L places a sequence
and P in all.
The decoder runs once over all T positions as a batch of one; only attention knows where sequences begin and end.
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlsp_fast.config import ModelConfig
from rlsp_fast.packing import PackedBatch

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message names the path and the fix."""


# --- attention over packed sequences ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """What attention needs to know about a packed batch, computed once and shared by all layers."""

    backend: str
    cu_seqlens: Tensor
    max_seqlen: int
    grids: tuple[tuple[int, int], ...] = ()
    """sdpa only: (S, L) of grids of S sequences of about one length, each padded to L places."""
    slot_T: Tensor | None = None
    """sdpa only: position t's place in the grids, which lie end to end."""


ALIKE = 0.8
"""A sequence shares a grid with one up to 1 / ALIKE times as long: padding costs at most 1.6 times its attention."""


def _layout(batch: PackedBatch, backend: str) -> _Layout:
    if backend != "sdpa":
        return _Layout(backend, batch.cu_seqlens, batch.max_seqlen)
    alike: list[list[int]] = []
    for i in sorted(range(len(batch.lengths)), key=lambda i: -batch.lengths[i]):
        if not alike or batch.lengths[i] < ALIKE * batch.lengths[alike[-1][0]]:
            alike.append([])
        alike[-1].append(i)
    grids = tuple((len(sequences), batch.lengths[sequences[0]]) for sequences in alike)
    begins, end = [0] * len(batch.lengths), 0
    for sequences, (_, L) in zip(alike, grids, strict=True):
        for i in sequences:
            begins[i], end = end, end + L
    begin_S = torch.tensor(begins, pin_memory=batch.input_T.is_cuda).to(batch.input_T.device, non_blocking=True)
    begin_T = begin_S.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.num_tokens)
    return _Layout(backend, batch.cu_seqlens, batch.max_seqlen, grids, begin_T + batch.position_ids)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed: _Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed batch; no position sees another sequence.

    Args:
        query: (1, N, T, H); key, value: (1, N_kv, T, H).
        packed: the batch's layout.
    Returns:
        (1, T, N, H), None: what a Hugging Face attention interface returns.
    Cost: flash_attn and varlen do no padded work. sdpa pads queries, keys and values (nothing else) to the longest
        of the sequences that are about as long.
    """
    q_TNH, k_TNH, v_TNH = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    window = (sliding_window - 1, 0) if sliding_window and sliding_window < packed.max_seqlen else (-1, 0)
    cu, longest = packed.cu_seqlens, packed.max_seqlen
    assert not softcap or packed.backend == "flash_attn", "build refuses this"
    if packed.backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        out_TNH = flash_attn_varlen_func(
            q_TNH, k_TNH, v_TNH, cu, cu, longest, longest, dropout, scaling, causal=True,
            window_size=window if window[0] >= 0 else (-1, -1), softcap=softcap or 0.0,
        )  # fmt: skip
    elif packed.backend == "varlen":
        out_TNH = _varlen(q_TNH, k_TNH, v_TNH, cu, longest, scaling, window)
    else:
        out_TNH = _sdpa(q_TNH, k_TNH, v_TNH, packed, scaling, window)
    return out_TNH.unsqueeze(0), None


def _varlen(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, cu: Tensor, longest: int, scaling: float | None,
    window: tuple[int, int],
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # torch 2.11 to 2.14 differ in what they take
    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    if "enable_gqa" in known:
        options["enable_gqa"] = q_TNH.shape[1] != k_TNH.shape[1]
    else:
        k_TNH, v_TNH = (x.repeat_interleave(q_TNH.shape[1] // x.shape[1], 1) for x in (k_TNH, v_TNH))
    if "window_size" not in known:
        if window != (-1, 0):
            raise ModelError("this torch's varlen_attn has no sliding window; set model.attention=sdpa")
        options = {name: value for name, value in options.items() if name in known} | {"is_causal": True}
    return varlen_attn(q_TNH, k_TNH, v_TNH, cu, cu, longest, longest, **options)


@torch.compiler.disable  # the grids are other ones in every batch
def _sdpa(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, packed: _Layout, scaling: float | None,
    window: tuple[int, int],
) -> Tensor:  # fmt: skip
    out = _of_grids(q_TNH, k_TNH, v_TNH, packed, scaling, window)
    out_PNH = out[0] if len(out) == 1 else torch.cat(out)
    return out_PNH.index_select(0, packed.slot_T)


def _of_grids(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, packed: _Layout, scaling: float | None,
    window: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """(S * L, N, H) of every grid."""
    gqa = q_TNH.shape[1] != k_TNH.shape[1]
    out = []
    for (_, L), *qkv_SNLH in zip(packed.grids, *(_padded(x, packed) for x in (q_TNH, k_TNH, v_TNH)), strict=True):
        mask = None
        if 0 <= window[0] < L - 1:
            place = torch.arange(L, device=q_TNH.device)
            distance = place[:, None] - place
            mask = (distance >= 0) & (distance <= window[0])
        # Padding follows its sequence, so causal attention alone keeps every real position from seeing it.
        out_SNLH = F.scaled_dot_product_attention(*qkv_SNLH, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa)
        out.append(out_SNLH.transpose(1, 2).flatten(0, 1))
    return out


def _padded(x_TNH: Tensor, packed: _Layout) -> list[Tensor]:
    """(S, N, L, H) of every grid."""
    N, H = x_TNH.shape[1:]
    sizes = [S * L for S, L in packed.grids]
    x_PNH = x_TNH.new_zeros(sum(sizes), N, H).index_copy_(0, packed.slot_T, x_TNH)
    parts = x_PNH.split(sizes)  # one gradient for all, where slices would have one each
    return [part.view(S, L, N, H).transpose(1, 2) for part, (S, L) in zip(parts, packed.grids, strict=True)]


# No mask function of that name is registered: Hugging Face then makes no mask, and does not ask the device, at every forward,
# whether it holds one sequence or several.
AttentionInterface.register("rlsp_packed", packed_attention)


def attention_backend(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why). A backend asked for by name that cannot run here raises; auto takes the first that can."""
    half = dtype in (torch.bfloat16, torch.float16)
    missing = {
        "flash_attn": None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed",
        "varlen": None if importlib.util.find_spec("torch.nn.attention.varlen") else "this torch has no varlen_attn",
        "sdpa": None,
    }
    for name in ("flash_attn", "varlen"):
        if device.type != "cuda":
            missing[name] = f"{name} needs a CUDA GPU"
        elif not half:
            missing[name] = f"{name} needs model.dtype = bfloat16"
    if choice != "auto":
        if missing[choice]:
            raise ModelError(f"model.attention = {choice}: {missing[choice]}; use sdpa or auto")
        return choice, "asked for"
    name = next(name for name, why in missing.items() if why is None)
    return name, "; ".join(why for why in missing.values() if why) or "fastest installed"


# --- the rest of a layer ----------------------------------------------------------------------

FUSED = ("rope", "rms_norm", "swiglu", "geglu")


def layer_kernels(choice: str, device: torch.device, model_type: str | None) -> tuple[str, str]:
    """(liger or torch, why): who computes RMSNorm, rotary positions and the gated MLP. Liger asked for by name that cannot
    raises; auto takes it where it can.

    Args:
        model_type: Hugging Face's; None: not known yet.
    """
    missing = None
    if device.type != "cuda":
        missing = "Liger's kernels need a CUDA GPU"
    elif importlib.util.find_spec("liger_kernel") is None:
        missing = "liger-kernel is not installed"
    elif model_type is not None and model_type not in _ligers():
        missing = f"liger-kernel has none for {model_type}"
    if choice == "torch":
        return choice, "asked for"
    if choice == "liger" and missing:
        raise ModelError(f"model.layer_kernels = liger: {missing}; use torch or auto")
    return ("torch", missing) if missing else ("liger", "asked for" if choice == "liger" else "fastest installed")


def fuse(lm: PreTrainedModel) -> None:
    """Liger's RMSNorm, rotary positions and gated MLP in this model. The rotary function is replaced for every model of this
    type in the process: Liger knows no other way."""
    patch = _ligers()[lm.config.model_type]
    names = inspect.signature(patch).parameters.keys() - {"model"}
    patch(model=lm, **{name: name in FUSED for name in names})  # its losses stay out: ours are fused


def _ligers() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


# --- loading ----------------------------------------------------------------------------------


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    found = _existing(path)
    try:
        return AutoTokenizer.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path = {path!r}: no tokenizer there ({_first_line(error)})") from None


def load_config(path: str) -> Any:
    found = _existing(path)
    try:
        return AutoConfig.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path = {path!r}: not a Hugging Face model folder or a hub name that can be fetched ({_first_line(error)})"
        ) from None


def _load_causal_lm(path: str) -> PreTrainedModel:
    """The model in its checkpoint's dtype, attention set to ours, dropout off."""
    config = load_config(path)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            _existing(path), config=config, attn_implementation="rlsp_packed", dtype="auto"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last two: other shapes, a cut file
        raise ModelError(f"model.path = {path!r}: cannot load the weights ({_first_line(error)})") from None
    for module in lm.modules():  # PPO compares log-probabilities of two passes: they must be the same function
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return lm


def _existing(path: str) -> str:
    looks_local = path.startswith((".", "/", "~", "outputs/")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().exists():
        raise ModelError(
            f"model.path = {path!r}: no such folder (`rlsp demo` makes the demo's, `rlsp import-gguf` a GGUF model's)"
        )
    return str(Path(path).expanduser()) if Path(path).expanduser().exists() else path


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]


# --- modules ----------------------------------------------------------------------------------


class _Packed(nn.Module):
    """A decoder over packed sequences. Everything that touches weights runs inside forward, where FSDP has gathered them."""

    def __init__(self, lm: PreTrainedModel, attention: str):
        super().__init__()
        self.lm = lm
        self.attention = attention

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(T, D): the last hidden states of a packed batch."""
        out = self.lm.base_model(
            input_ids=batch.input_T[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            packed=_layout(batch, self.attention),
        )
        return out.last_hidden_state.squeeze(0)


class Policy(_Packed):
    """A causal language model. `forward(batch, fn)` hands fn the hidden states and the output projection."""

    def __init__(self, lm: PreTrainedModel, attention: str):
        super().__init__(lm, attention)
        config = lm.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale: float = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def forward(self, batch: PackedBatch, fn: Callable[..., Any]) -> Any:
        """fn(hidden_TD, weight_VD, bias_V=..., softcap=..., logit_scale=...): one of rlsp_kernels' linear ops."""
        head = self.lm.get_output_embeddings()
        return fn(
            self.hidden(batch),
            head.weight,
            bias_V=getattr(head, "bias", None),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
        )


class Critic(_Packed):
    """The policy's architecture with one number per position instead of logits. Starts at value 0 everywhere."""

    def __init__(self, lm: PreTrainedModel, attention: str):
        super().__init__(lm, attention)
        lm.set_output_embeddings(None)  # dead weight in the optimizer otherwise; a tied one is the embedding, which stays
        self.value_head = nn.Linear(lm.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: PackedBatch) -> Tensor:
        """value_T: (T,) f32, the value before the token that position t predicts. Never scaled by temperature."""
        head = self.value_head
        return (self.hidden(batch).float() @ head.weight.float()[0]) + head.bias.float()


def build(
    kind: type[Policy] | type[Critic],
    config: ModelConfig,
    path: str,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    trained: bool = True,
) -> Any:
    """Loads a Policy or Critic and shards it: float32 master weights, compute in config.dtype, reductions in float32.

    Args:
        kind: Policy or Critic.
        path: Hugging Face folder or hub name (config.path, or an SFT checkpoint).
        mesh: dist.mesh(...).
        trained: False for a frozen reference: no gradients, and its weights are held in config.dtype.
    Raises:
        ModelError: naming the path and what is wrong with it.
    """
    dtype = DTYPES[config.dtype]
    backend, why = attention_backend(config.attention, device, dtype)
    log.info("attention over packed sequences: %s (%s)", backend, why)
    lm = _load_causal_lm(path)
    reason = _unsupported(lm, backend)
    if reason:
        raise ModelError(f"model.path = {path!r}: {reason}")
    kernels, why = layer_kernels(config.layer_kernels, device, lm.config.model_type)
    log.info("RMSNorm, rotary positions and gated MLP: %s (%s)", kernels, why)
    if kernels == "liger":
        fuse(lm)
    module = kind(lm, backend)
    if config.activation_checkpointing:
        module.lm.gradient_checkpointing_enable({"use_reentrant": False})
        module.train()  # Hugging Face layers recompute in training mode only; dropout is already off
    if not trained:
        for parameter in module.parameters():  # not module.to(dtype): rotary frequencies in bfloat16 lose the positions
            parameter.data = parameter.data.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None)
    if config.compile:  # all layers of policy, critic and reference, with and without gradients, count as one function's
        torch._dynamo.config.recompile_limit = 64
    for layer in _decoder_layers(module.lm):
        if config.compile:  # forward alone: FSDP's hooks and recomputing stay outside
            layer.forward = torch.compile(layer.forward, dynamic=True)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    module.requires_grad_(trained).to(device)
    return module.float() if trained else module  # sharded first: float32 is this rank's share alone


def begin_anew(module: Policy | Critic) -> None:
    """As after an optimizer step, when an error left FSDP in the middle of a forward or backward: no gradients anywhere."""
    module.reset_iter_state()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for sharded in (True, False):  # a gradient may wait on the gathered parameter for its reduction
                if not sharded:
                    part.unshard()
                for parameter in part.parameters():
                    parameter.grad = None
            part.reshard()


def _unsupported(lm: PreTrainedModel, backend: str) -> str | None:
    """Why packed training of this model would fail, or be wrong without a word; None when it works."""
    if any(getattr(lm.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts is not supported, only dense decoders"
    others = set(getattr(lm.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or lm._is_stateful:
        names = ", ".join(sorted(others)) or "recurrent"
        return f"its {names} layers would carry one packed sequence into the next; only attention is supported"
    if getattr(lm.config, "attn_logit_softcapping", None) and backend != "flash_attn":
        return f"an attention soft-cap needs model.attention = flash_attn, not {backend}"
    return None


def _decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(lm.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(lm).__name__} keeps its layers elsewhere than model.layers: not supported")
    return layers
