"""The shapes of a decoder from its configuration alone: every parameter's size, and what attention and MLP are made of.

Nothing is loaded: the model is built on torch's meta device, where a tensor has a shape and no memory.
Axes: D hidden size, I width of the MLP, N heads, M key-value heads, H head size, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


class ShapesError(ValueError):
    """A model whose shapes cannot be known; the message names what is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What a plan needs to know about a model."""

    name: str
    source: str
    """Where the shapes come from, in words."""
    layers: tuple[tuple[Shape, ...], ...]
    """Per decoder layer (an FSDP unit of its own), the shapes of its parameters."""
    root: tuple[Shape, ...]
    """The rest, which FSDP gathers together: embedding, last norm, output projection unless it is the embedding."""
    head: tuple[Shape, ...]
    """Those of root that only a policy has: the output projection when it is a tensor of its own."""
    hidden_size: int
    intermediate_size: int
    mlp_matrices: int
    """3 when a gate multiplies the MLP's inner activations, else 2."""
    norm_width: int
    """Elements a token that the norms between a layer's matrices normalise: D for each norm."""
    qk_norm_width: int
    """The same for norms of queries and keys: (N + M) * H, or 0 without them."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    """The output projection is the embedding."""
    context: int | None
    """Longest sequence the model was made for, tokens; None when its configuration does not say."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        return count(self.root) + sum(map(count, self.layers))

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size


def count(shapes: tuple[Shape, ...], num_ranks: int = 1) -> int:
    """Elements; over more ranks those of the largest share: FSDP2 cuts the first axis into pieces of ceil(size / ranks)."""
    return sum(-(-shape[0] // num_ranks) * math.prod(shape[1:]) if shape else 1 for shape in shapes)


# What config.json says of models that are often named, so that a plan needs no download.
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_SMOL = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}


def _entry(base: dict[str, Any], D: int, I: int, layers: int, N: int, context: int, **more: Any) -> dict[str, Any]:  # noqa: E741
    sizes = {"hidden_size": D, "intermediate_size": I, "num_hidden_layers": layers, "num_attention_heads": N}
    return base | sizes | {"max_position_embeddings": context} | more


NAMED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _entry(_LLAMA, 2048, 8192, 16, 32, 131072, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _entry(_LLAMA, 3072, 8192, 28, 24, 131072, tie_word_embeddings=True),
    "Llama-3.1-8B": _entry(_LLAMA, 4096, 14336, 32, 32, 131072),
    "Llama-3.1-70B": _entry(_LLAMA, 8192, 28672, 80, 64, 131072),
    "Qwen2.5-0.5B": _entry(
        _QWEN2, 896, 4864, 24, 14, 32768, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen2.5-1.5B": _entry(
        _QWEN2, 1536, 8960, 28, 12, 32768, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen2.5-3B": _entry(
        _QWEN2, 2048, 11008, 36, 16, 32768, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen2.5-7B": _entry(_QWEN2, 3584, 18944, 28, 28, 32768, num_key_value_heads=4),
    "Qwen2.5-14B": _entry(_QWEN2, 5120, 13824, 48, 40, 32768, num_key_value_heads=8),
    "Qwen2.5-32B": _entry(_QWEN2, 5120, 27648, 64, 40, 32768, num_key_value_heads=8),
    "Qwen2.5-72B": _entry(_QWEN2, 8192, 29568, 80, 64, 32768, num_key_value_heads=8),
    "Qwen3-0.6B": _entry(_QWEN3, 1024, 3072, 28, 16, 40960, tie_word_embeddings=True),
    "Qwen3-1.7B": _entry(_QWEN3, 2048, 6144, 28, 16, 40960, tie_word_embeddings=True),
    "Qwen3-4B": _entry(_QWEN3, 2560, 9728, 36, 32, 40960, tie_word_embeddings=True),
    "Qwen3-8B": _entry(_QWEN3, 4096, 12288, 36, 32, 40960),
    "Qwen3-14B": _entry(_QWEN3, 5120, 17408, 40, 40, 40960),
    "Qwen3-32B": _entry(_QWEN3, 5120, 25600, 64, 64, 40960),
    "SmolLM2-135M": _entry(_SMOL, 576, 1536, 30, 9, 8192, num_key_value_heads=3),
    "SmolLM2-360M": _entry(_SMOL, 960, 2560, 32, 15, 8192, num_key_value_heads=5),
    "SmolLM2-1.7B": _entry(_SMOL, 2048, 8192, 24, 32, 8192, num_key_value_heads=32),
}
_SUFFIXES = ("-instruct", "-base", "-chat", "-it", "-hf")


def named(path: str) -> str | None:
    """The row of NAMED that a hub name or a folder's name means: `meta-llama/Llama-3.1-8B-Instruct` is Llama-3.1-8B."""
    word = Path(path).name.lower().removeprefix("meta-")
    for suffix in _SUFFIXES:
        word = word.removesuffix(suffix)
    return next((name for name in NAMED if name.lower() == word), None)


@cache
def read(path: str) -> Shapes:
    """The shapes of model.path: from its folder's config.json, the table NAMED, or what the hub's cache or the hub says.

    Raises:
        ShapesError: when none of them knows.
    """
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return of(AutoConfig.from_pretrained(folder), path, f"{folder}/config.json")
    name = named(path)
    if name is not None:
        keys = dict(NAMED[name])
        config = AutoConfig.for_model(keys.pop("model_type"), **keys)
        return of(config, path, f"the built-in table, {name}")
    known = f"shapes known by name: {', '.join(NAMED)}"
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ShapesError(f"model.path = {path!r}: no config.json there, and the name is not in the built-in table; {known}")
    try:
        return of(AutoConfig.from_pretrained(path), path, f"config.json of {path} on the hub")
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0][:160]
        raise ShapesError(
            f"model.path = {path!r}: its config.json cannot be fetched ({why}), and the name is not in the built-in table: "
            f"name a folder with a config.json; {known}"
        ) from None


def of(config: Any, name: str, source: str) -> Shapes:
    """The shapes of a Hugging Face configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    layers = getattr(lm.base_model, "layers", None)
    if layers is None:
        raise ShapesError(f"{name}: {type(lm).__name__} keeps its layers elsewhere than model.layers: not supported")
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ShapesError(f"{name}: a mixture of experts is not supported, only dense decoders")
    inner = {id(p) for layer in layers for p in layer.parameters()}
    head = lm.get_output_embeddings()
    tied = head.weight is lm.get_input_embeddings().weight
    own_head = () if tied else tuple(tuple(p.shape) for p in head.parameters())
    D, N = config.hidden_size, config.num_attention_heads
    M = getattr(config, "num_key_value_heads", None) or N
    H = getattr(config, "head_dim", None) or D // N
    first = dict(layers[0].named_parameters())
    norms = {key: p for key, p in first.items() if "norm" in key and "bias" not in key}
    mlp = sum(p.numel() for key, p in first.items() if "mlp" in key and p.ndim == 2)
    return Shapes(
        name=name,
        source=source,
        layers=tuple(tuple(tuple(p.shape) for p in layer.parameters()) for layer in layers),
        root=tuple(tuple(p.shape) for p in lm.parameters() if id(p) not in inner),
        head=own_head,
        hidden_size=D,
        intermediate_size=config.intermediate_size,
        mlp_matrices=round(mlp / (D * config.intermediate_size)),
        norm_width=sum(p.numel() for key, p in norms.items() if not _of_heads(key)),
        qk_norm_width=sum(N * H if "q_norm" in key else M * H for key in norms if _of_heads(key)),
        num_heads=N,
        num_kv_heads=M,
        head_size=H,
        vocab_size=config.vocab_size,
        tied=tied,
        context=getattr(config, "max_position_embeddings", None),
    )


def _of_heads(key: str) -> bool:
    return "q_norm" in key or "k_norm" in key
