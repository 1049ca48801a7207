"""What a run will take, before anything is loaded: bytes per rank and phase, seconds per phase, and what makes it fit.

Every number follows from the recipe, the model's shapes, the machine and the constants of `Assumed`; nothing is measured here.
docs/memory.md says in words what stands in memory when.
Axes: T positions of a micro-batch, D hidden size, I width of the MLP, N heads, M key-value heads, H head size, V vocabulary.
Order of this file: machine, what a rank holds, phases, budgets, seconds, changes, printing.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from rlsp_fast.config import Config, Offloaded
from rlsp_fast.shapes import Shapes, count

GIB = 2**30
OFFLOADED: tuple[Offloaded, ...] = ("adam", "critic", "reference")


class PlanError(ValueError):
    """A plan that cannot be made as asked; the message names the argument."""


# --- machine ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """A GPU by its data sheet."""

    name: str
    memory_gib: float
    tflops: float
    """bf16 matrix products, dense, 10^12 a second."""
    memory_gb_s: float
    link_gb_s: float
    """To the other GPUs of its node, one direction."""
    host_gb_s: float
    """To host memory, one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(name="A100-80", memory_gib=80, tflops=312, memory_gb_s=2039, link_gb_s=300, host_gb_s=32),
        GPU(name="H100", memory_gib=80, tflops=989, memory_gb_s=3350, link_gb_s=450, host_gb_s=64),
        GPU(name="H200", memory_gib=140, tflops=989, memory_gb_s=4800, link_gb_s=450, host_gb_s=64),
        GPU(name="B200", memory_gib=180, tflops=2250, memory_gb_s=8000, link_gb_s=900, host_gb_s=64),
    )
}


def named(device: str) -> str | None:
    """The row of GPUS that a device's own name means: "NVIDIA H100 80GB HBM3" is H100; None for a GPU without a row."""
    return next((name for name in GPUS if name.partition("-")[0] in device), None)


def _say(value: float, sentence: str) -> Any:
    return field(default=value, metadata={"sentence": sentence})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """Constants that no shape gives. Each is printed with its sentence; none was measured by this project unless it says so."""

    cuda_context_gib: float = _say(0.75, "GiB: CUDA context, loaded kernels and cuBLAS workspaces of one process")
    nccl_gib: float = _say(0.4, "GiB: NCCL's buffers, per communicator of the trainer")
    tp_nccl_gib: float = _say(1.0, "GiB: vLLM's communicator and all-reduce buffers with tensor parallelism; kept while asleep")
    cuda_graphs_gib: float = _say(1.0, "GiB: vLLM's CUDA graphs; kept while asleep; 0 with rollout.enforce_eager=true")
    vllm_residue_gib: float = _say(0.5, "GiB: what else vLLM keeps while asleep")
    vllm_batched_tokens: int = _say(16384, "tokens: vLLM's max_num_batched_tokens, for which it reserves activations")
    headroom_gib: float = _say(2.0, "GiB: kept free, since the driver shows less than the data sheet and a plan errs")
    slack: float = _say(0.05, "share of activations and buffers lost to the allocator's rounding and fragmentation")
    train_efficiency: float = _say(0.40, "of peak FLOP/s in forward and backward (recomputing counts as work)")
    prefill_efficiency: float = _say(0.50, "of peak FLOP/s in reading prompts")
    decode_efficiency: float = _say(0.60, "of peak memory bandwidth in decoding")
    decode_overhead_ms: float = _say(2.0, "ms a decoded token for scheduling and sampling")
    all_reduce_us: float = _say(20.0, "us: one all-reduce of decoding with tensor parallelism, two a layer")
    link_efficiency: float = _say(0.70, "of peak bandwidth between GPUs")
    network_gb_s: float = _say(50.0, "GB/s a GPU between nodes, one direction (400 Gb/s)")
    host_efficiency: float = _say(0.80, "of peak bandwidth to host memory")
    swap_s: float = _say(1.0, "s: vLLM falling asleep and waking, without the weights' transfer")
    overlap: float = _say(0.80, "of FSDP's communication hidden behind matrix products, as far as these last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe on a machine."""

    config: Config
    shapes: Shapes
    gpu: GPU = GPUS["H100"]
    num_gpus: int = 8
    """Over all nodes."""
    num_nodes: int = 1
    memory: int = 80 * GIB
    """Bytes of one GPU."""
    prompt_tokens: int = 256
    """Mean, for times only."""
    response_tokens: int = 1024
    """Mean, for times only."""
    assumed: Assumed = Assumed()

    @property
    def budget(self) -> int:
        """Bytes of one GPU that a phase may take."""
        return self.memory - int(self.assumed.headroom_gib * GIB)

    @property
    def shard_size(self) -> int:
        return self.config.train.fsdp_shard_size or self.num_gpus

    @property
    def tensor_parallel(self) -> int:
        return self.config.rollout.tensor_parallel_size

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def offload(self) -> tuple[Offloaded, ...]:
        """Trainer states that are in host memory during generation."""
        return () if self.config.train.offload == "auto" else self.config.train.offload

    @property
    def has_critic(self) -> bool:
        return self.config.algorithm.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        return bool(self.config.algorithm.kl_coef or self.config.algorithm.kl_loss_coef)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def num_samples(self) -> int:
        """Responses of a step, over all ranks."""
        return self.config.train.batch_size * self.config.rollout.n

    @property
    def samples_per_engine(self) -> int:
        """Begun in a step."""
        begun = math.ceil(round(self.config.rollout.oversample * self.num_samples, 6))
        return -(-begun * self.tensor_parallel // self.num_gpus)

    @property
    def micro_batch_tokens(self) -> int:
        """The most positions that one forward can hold: the budget, or all of this rank's part of a mini-batch."""
        train = self.config.train
        sequences = -(-train.mini_batch_size * self.config.rollout.n // self.num_gpus)
        return min(train.max_tokens_per_micro_batch, sequences * self.longest)


def make_job(
    config: Config,
    shapes: Shapes,
    *,
    gpu: str = "H100",
    num_gpus: int = 8,
    num_nodes: int = 1,
    memory: int | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> Job:
    """A job with the defaults that a person at the command line gets, and a number for every setting that is `auto`.

    Args:
        num_gpus: of each node.
        memory: bytes of a GPU; None: the data sheet's.
        prompt_tokens, response_tokens: means. None: 256 or the limit if that is less, and half of the limit.
    Raises:
        PlanError: on a layout that cannot be.
    """
    if gpu not in GPUS:
        raise PlanError(f"--gpu {gpu}: want one of {', '.join(GPUS)}")
    if num_gpus < 1 or num_nodes < 1:
        raise PlanError(f"--gpus {num_gpus} --nodes {num_nodes}: want at least 1 of each")
    world, tp, shard = num_gpus * num_nodes, config.rollout.tensor_parallel_size, config.train.fsdp_shard_size
    for key, size in {"rollout.tensor_parallel_size": tp, "train.fsdp_shard_size": shard or world}.items():
        if world % size:
            raise PlanError(f"{key} = {size} does not divide the number of GPUs, {world}")
    limits = config.data.max_prompt_length, config.rollout.max_response_length
    job = Job(
        config=config,
        shapes=shapes,
        gpu=GPUS[gpu],
        num_gpus=world,
        num_nodes=num_nodes,
        memory=memory or int(GPUS[gpu].memory_gib * GIB),
        prompt_tokens=min(prompt_tokens or min(256, limits[0]), limits[0]),
        response_tokens=min(response_tokens or max(1, limits[1] // 2), limits[1]),
        assumed=Assumed(vllm_batched_tokens=8192 if gpu == "A100-80" else 16384),
    )
    return settle(job)


def parse_memory(text: str) -> int:
    """Bytes of `80GiB`, `80GB` or `80` (GiB).

    >>> parse_memory("80GiB") == 80 * 2**30, parse_memory("141GB") == 141 * 10**9
    (True, True)
    """
    word = text.strip().lower()
    for unit, size in {"gib": GIB, "gb": 10**9, "g": GIB, "": GIB}.items():
        if word.endswith(unit):
            try:
                value = float(word.removesuffix(unit))
            except ValueError:
                break
            if value > 0:
                return int(value * size)
            break
    raise PlanError(f"--gpu-memory {text}: want a size such as 80GiB or 141GB")


# --- what a rank holds ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of one model's states on the rank with the largest shards."""

    weights: int
    """float32 masters, or for a frozen model its weights in the compute dtype."""
    gradients: int = 0
    """float32 shards, from a mini-batch's first backward to its optimizer step."""
    adam: int = 0
    """Both moments, float32, and one float32 step count a parameter."""


def states(shapes: Shapes, kind: Literal["policy", "critic", "reference"], num_ranks: int, dtype_bytes: int) -> States:
    """What FSDP2 and AdamW hold of a model on one rank; exact.

    A critic has no output projection of its own, and a head of D + 1 parameters in its place.
    """
    parameters = [*shapes.root, *itertools.chain(*shapes.layers)]
    if kind == "critic":
        for shape in shapes.head:
            parameters.remove(shape)
        parameters += [(1, shapes.hidden_size), (1,)]
    elements = count(tuple(parameters), num_ranks)
    if kind == "reference":
        return States(weights=elements * dtype_bytes)
    return States(weights=4 * elements, gradients=4 * elements, adam=8 * elements + 4 * len(parameters))


def saved_per_token(shapes: Shapes, dtype_bytes: int, attention: Literal["packed", "sdpa"]) -> dict[str, int]:
    """Bytes a token that one decoder layer keeps for its backward, by what keeps them. c is dtype_bytes.

    - norms: (4 + 2c) D each: the input in float32 (the norm computes in it), what it was scaled to, and the output, which
      the matrices behind it keep once between them. A norm of queries or keys keeps no output: the rotation saves nothing.
    - attention: queries and output c N H each, keys and values c M H each, 4 N for the softmax's log-sum; the output is what
      the output matrix keeps. SDPA keeps queries, keys and values twice, as packed and as padded, and the padded output.
    - mlp: 4 c I: the gate, its activation, what it multiplies, and the product; 2 c I without a gate.
    """
    c, heads, kv_heads = dtype_bytes, shapes.num_heads * shapes.head_size, shapes.num_kv_heads * shapes.head_size
    once = c * (2 * heads + 2 * kv_heads)
    return {
        "norms": (4 + 2 * c) * shapes.norm_width + (4 + c) * shapes.qk_norm_width,
        "attention": (once if attention == "packed" else 2 * once) + 4 * shapes.num_heads,
        "mlp": c * shapes.intermediate_size * (4 if shapes.mlp_matrices == 3 else 2),
    }


def attention_kind(job: Job) -> Literal["packed", "sdpa"]:
    """flash-attn or varlen where the dtype lets them run, which are the same here."""
    return "sdpa" if job.config.model.attention == "sdpa" or job.dtype_bytes == 4 else "packed"


def activations(job: Job, tokens: int) -> int:
    """Bytes that a forward of `tokens` positions keeps for its backward, the loss's own apart.

    With activation checkpointing each layer keeps its input alone. The last norm keeps its input in float32 and scaled.
    """
    shapes, c = job.shapes, job.dtype_bytes
    if job.config.model.activation_checkpointing:
        layer = c * shapes.hidden_size
    else:
        layer = sum(saved_per_token(shapes, c, attention_kind(job)).values())
    rotation = 2 * c * shapes.head_size
    return tokens * (shapes.num_layers * layer + (4 + c) * shapes.hidden_size + rotation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The parts of a forward and backward where they stand highest together, bytes; shards and gradients apart."""

    gathered: int
    """Parameters gathered by FSDP, in the compute dtype, and gradients not yet scattered."""
    activations: int
    logits: int
    """Logits, and the gradient of the output projection."""

    @property
    def total(self) -> int:
        return self.gathered + self.activations + self.logits


def update_peak(job: Job, kind: Literal["policy", "critic"]) -> Peak:
    """The highest moment of one micro-batch's forward and backward.

    FSDP2 gathers the root (embedding, last norm, head) for the whole of forward and backward, each layer while it works and the
    next one's already beside it. Gradients are scattered in float32: the buffer of one layer is held until the next one's.
    1. In the loss: everything kept for backward, the logits' chunk, the head's gradient in float32.
    2. Leaving the loss: the head's gradient as kept, and scaled.
    3. In the last layer's backward: its activations (recomputed when checkpointing) and their gradients beside the others'.
    4. Behind it: the layer's gradients, and two buffers of scattering.
    5. At the embedding: its gradient beside the head's, and their sum where they are one.
    6. At the end: the root's gradients in both dtypes, or in float32 whole and scattered.
    """
    shapes, c, T, n = job.shapes, job.dtype_bytes, job.micro_batch_tokens, job.shard_size
    D = shapes.hidden_size
    head = shapes.head_parameters if kind == "policy" else 0
    root, layer = _root(shapes, kind), max(map(count, shapes.layers))
    at_work = c * layer * (2 if n > 1 else 1)
    ahead = layer if n > 1 else 0  # backward begins with gathering the last layer
    kept = activations(job, T)
    last_norm = T * (4 + c) * D
    own = T * sum(saved_per_token(shapes, c, attention_kind(job)).values())
    recomputes = job.config.model.activation_checkpointing
    during, behind = kept - last_norm + recomputes * own, kept - last_norm - (not recomputes) * own
    # Without recomputing the highest layer is the first in backward, when nothing is being scattered yet.
    pending = 4 * layer if recomputes else max(0, 4 * layer - own)
    rows = 3 * T * c * D if kind == "policy" else T * (c + 4) * D  # last hidden states, those of the loss, their gradient
    logits = _logits(job, T) if kind == "policy" else 0
    moments = (
        Peak(gathered=c * root, activations=kept + rows, logits=logits + 4 * head),
        Peak(gathered=c * (root + ahead), activations=kept + 2 * T * c * D, logits=2 * c * head),
        Peak(
            gathered=c * root + at_work + pending,
            activations=during + T * _backward_per_token(shapes, c),
            logits=c * head,
        ),
        Peak(gathered=c * root + at_work + (4 + c) * layer + pending, activations=behind + 2 * T * c * D, logits=c * head),
        Peak(gathered=c * (root + shapes.head_parameters + shapes.tied * head) + 4 * layer, activations=0, logits=c * head),
        Peak(gathered=4 * root + max(c * root, 4 * root // n), activations=0, logits=0),
    )
    return max(moments, key=lambda peak: peak.total)


def _root(shapes: Shapes, kind: Literal["policy", "critic"]) -> int:
    return count(shapes.root) - (count(shapes.head) - shapes.hidden_size - 1 if kind == "critic" else 0)


def _logits(job: Job, tokens: int) -> int:
    """One chunk of logits: the budget of rlsp_kernels.linear, or all of them where they take less."""
    return min(LOGITS_BUDGET, tokens * job.shapes.vocab_size * job.dtype_bytes)


LOGITS_BUDGET = 1 << 30  # of rlsp_kernels.linear, which tests/test_plan.py compares: importing it would load torch


def _backward_per_token(shapes: Shapes, dtype_bytes: int) -> int:
    """Gradients that stand beside a layer's activations at the widest place of its backward: the MLP's product and its two
    factors, or a norm's three float32 tensors; and the residual's gradient."""
    c, D, I = dtype_bytes, shapes.hidden_size, shapes.intermediate_size  # noqa: E741
    return max(3 * c * I, 12 * D) + 2 * c * D


def annotate_peak(job: Job, kind: Literal["policy", "critic"]) -> Peak:
    """The highest moment of a forward without gradients: the root just gathered with its buffer not yet given back (on one
    rank: its largest cast); in a layer, the next one's parameters gathered already; or in the loss."""
    shapes, c, T = job.shapes, job.dtype_bytes, job.micro_batch_tokens
    root, layer = _root(shapes, kind), max(map(count, shapes.layers))
    buffers = 2 if job.shard_size > 1 else 1
    opening = root + 2 * layer if buffers == 2 else shapes.head_parameters * (c == 2)
    stream = T * c * (3 * shapes.hidden_size + 2 * shapes.head_size)  # embeddings, residual, a norm's output; the rotation
    inside = T * max(3 * c * shapes.intermediate_size, 12 * shapes.hidden_size)
    moments = [
        Peak(gathered=c * (root + opening), activations=stream, logits=0),
        Peak(gathered=c * (root + buffers * layer), activations=stream + inside, logits=0),
    ]
    if kind == "policy":
        logits = _logits(job, T)
        moments.append(Peak(gathered=c * root, activations=stream + T * c * shapes.hidden_size, logits=logits))
    return max(moments, key=lambda peak: peak.total)


# --- the engine -------------------------------------------------------------------------------

BLOCK = 16  # tokens of a block of vLLM's KV cache


def engine_weights(job: Job) -> int:
    """vLLM's weights on one rank: matrices cut over the tensor-parallel ranks, vectors whole, the vocabulary padded to 64."""
    shapes, tp = job.shapes, job.tensor_parallel if job.config.rollout.engine != "transformers" else 1
    padded = -(-shapes.vocab_size // 64) * 64
    elements = sum(
        math.prod(shape) if len(shape) < 2 else -(-math.prod(shape) // tp) for shape in itertools.chain(*shapes.layers)
    )
    for shape in shapes.root:
        vocab = len(shape) == 2 and shape[0] == shapes.vocab_size
        elements += -(-padded // tp) * shape[1] if vocab else math.prod(shape)
    return elements * job.dtype_bytes


def kv_bytes_per_token(job: Job) -> int:
    """Keys and values of one token on one rank. With more ranks than key-value heads each keeps one head."""
    heads = -(-job.shapes.num_kv_heads // job.tensor_parallel)
    return 2 * job.shapes.num_layers * heads * job.shapes.head_size * job.dtype_bytes


def kv_sequence_bytes(job: Job) -> int:
    """KV cache of one longest sequence, in whole blocks."""
    return -(-job.longest // BLOCK) * BLOCK * kv_bytes_per_token(job)


def engine_workspace(job: Job) -> int:
    """Activations that vLLM reserves while awake: a full batch of tokens through the MLP, and the sampler's three float32
    tensors over the vocabulary for every sequence."""
    shapes, c, tp = job.shapes, job.dtype_bytes, job.tensor_parallel
    batch = min(job.assumed.vllm_batched_tokens, job.config.rollout.max_num_seqs * job.longest)
    inside = (shapes.mlp_matrices * shapes.intermediate_size // tp + 4 * shapes.hidden_size) * c
    return batch * inside + 12 * job.config.rollout.max_num_seqs * shapes.vocab_size


def _graphs(job: Job) -> int:
    rollout = job.config.rollout
    return 0 if rollout.enforce_eager is True or rollout.engine == "transformers" else int(job.assumed.cuda_graphs_gib * GIB)


def _tp_nccl(job: Job) -> int:
    return int(job.assumed.tp_nccl_gib * GIB) if job.tensor_parallel > 1 else 0


def engine_kv_cache(job: Job) -> int:
    """Bytes of KV cache that the recipe asks for: rollout.kv_cache_gib, or what gpu_memory_utilization leaves after weights,
    workspace and graphs; never below 0."""
    rollout = job.config.rollout
    if rollout.engine == "transformers":
        return min(rollout.max_num_seqs, job.samples_per_engine) * job.longest * kv_bytes_per_token(job)
    if rollout.kv_cache_gib:
        return int(rollout.kv_cache_gib * GIB)
    asked = int(rollout.gpu_memory_utilization * job.memory)
    return max(0, asked - engine_weights(job) - engine_workspace(job) - _graphs(job) - _tp_nccl(job))


# --- phases -----------------------------------------------------------------------------------

PHASES = ("generate", "annotate", "update critic", "update actor", "push")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one rank holds at the highest moment of a phase."""

    name: str
    parts: dict[str, int]
    """Bytes by part, in the order they are printed."""
    gone: dict[str, str]
    """Parts that exist and are elsewhere: `asleep` or `host`."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def phases(job: Job) -> list[Phase]:
    """Every phase of a step on the rank with the largest shards."""
    return [_phase(job, name) for name in PHASES if name != "update critic" or job.has_critic]


def peak(job: Job) -> Phase:
    """The phase that takes the most."""
    return max(phases(job), key=lambda phase: phase.total)


def fits(job: Job) -> bool:
    """Whether every phase fits, and vLLM gets a KV cache for at least one longest sequence."""
    return engine_kv_cache(job) >= kv_sequence_bytes(job) and peak(job).total <= job.budget


def _phase(job: Job, name: str) -> Phase:
    n, c, a = job.shard_size, job.dtype_bytes, job.assumed
    actor = states(job.shapes, "policy", n, c)
    critic = states(job.shapes, "critic", n, c) if job.has_critic else None
    generating = name == "generate"
    high = _phase_peak(job, name)
    on_vllm = job.config.rollout.engine != "transformers"
    parts = {"actor weights (f32)": actor.weights, "actor Adam moments": actor.adam}
    if name == "update actor":
        parts["gradients"] = actor.gradients
    if critic is not None:
        parts |= {"critic weights (f32)": critic.weights, "critic Adam moments": critic.adam}
        if name == "update critic":
            parts["gradients"] = critic.gradients
    if job.has_reference:
        parts["reference"] = states(job.shapes, "reference", n, c).weights
    parts |= {"gathered weights": high.gathered, "activations": high.activations, "logits, head's gradient": high.logits}
    parts |= {"engine weights": engine_weights(job), "KV cache": engine_kv_cache(job)}
    parts |= {"engine workspace": engine_workspace(job) if generating else 0, "CUDA graphs": _graphs(job)}
    trainer_groups = 2 if job.shard_size < job.num_gpus else 1
    parts["NCCL"] = (int(a.nccl_gib * GIB * trainer_groups) if job.num_gpus > 1 else 0) + _tp_nccl(job)
    parts["CUDA context, residue"] = int((a.cuda_context_gib + a.vllm_residue_gib * on_vllm) * GIB)
    parts["allocator slack"] = int(a.slack * high.total)
    gone: dict[str, str] = {}
    if generating:
        hosts = {"adam": ("actor Adam moments", "critic Adam moments"), "critic": ("critic weights (f32)",)}
        hosts["reference"] = ("reference",)
        gone = {part: "host" for what in job.offload for part in hosts[what] if part in parts}
    elif on_vllm:
        gone = {"KV cache": "asleep"} | ({} if name == "push" else {"engine weights": "asleep"})
    return Phase(name=name, parts={p: 0 if p in gone else size for p, size in parts.items()}, gone=gone)


def _phase_peak(job: Job, name: str) -> Peak:
    if name == "annotate":
        kinds: tuple[Literal["policy", "critic"], ...] = ("policy", "critic") if job.has_critic else ("policy",)
        return max((annotate_peak(job, kind) for kind in kinds), key=lambda peak: peak.total)
    if name.startswith("update"):
        return update_peak(job, "critic" if name == "update critic" else "policy")
    # A push holds two gathered buckets (a layer, or the embedding or head alone) and a copy of the tensor being loaded; on one
    # rank that copy alone. They are in torch's free list when the KV cache wakes.
    layer, head = max(map(count, job.shapes.layers)), job.shapes.head_parameters
    held = max(2 * layer, layer + head) + head if job.shard_size > 1 else head
    return Peak(gathered=held * job.dtype_bytes, activations=0, logits=0)


def host_bytes(job: Job) -> int:
    """Pinned host memory of one rank: what is offloaded, and at sleep level 1 vLLM's weights."""
    full = _phase(with_key(job, "train.offload", ()), "generate").parts
    offloaded = sum(full[part] for part in _phase(job, "generate").gone)
    level_1 = job.config.rollout.sleep_level == 1 and job.config.rollout.engine != "transformers"
    return offloaded + (engine_weights(job) if level_1 else 0)


# --- budgets ----------------------------------------------------------------------------------


def wanted_kv_bytes(job: Job) -> int:
    """KV cache with which no sequence ever waits: every one of a step's that may decode at once, at its longest."""
    return min(job.config.rollout.max_num_seqs, job.samples_per_engine) * kv_sequence_bytes(job)


def kv_cache_bytes(job: Job) -> int:
    """Bytes for vLLM's KV cache on each rank: all that generation leaves free, and no more than it can use.

    Raises:
        PlanError: when not even one longest sequence fits.
    """
    generate = _phase(job, "generate")
    room = job.budget - (generate.total - generate.parts["KV cache"])
    block = BLOCK * kv_bytes_per_token(job)
    found = min(room // block * block, wanted_kv_bytes(job))
    if found < kv_sequence_bytes(job):
        raise PlanError(
            f"no room for a KV cache: generation takes {_gib(job.budget - room)} GiB of {_gib(job.budget)} without one, and "
            f"one sequence of data.max_prompt_length + rollout.max_response_length = {job.longest} tokens needs "
            f"{_gib(kv_sequence_bytes(job), 2)}"
        )
    return found


def token_budget(job: Job, most: int = 65536) -> int:
    """train.max_tokens_per_micro_batch: the largest multiple of 256, or the longest sequence, with which every phase fits.

    Args:
        most: no larger, since matrix products gain nothing from it.
    Raises:
        PlanError: when the longest sequence does not fit.
    """
    longest = _longest_trained(job)
    training = [name for name in PHASES[1:4] if name != "update critic" or job.has_critic]

    def fit(tokens: int) -> bool:
        tried = with_key(job, "train.max_tokens_per_micro_batch", tokens)
        return all(_phase(tried, name).total <= tried.budget for name in training)

    if not fit(longest):
        needs = max(_phase(with_key(job, "train.max_tokens_per_micro_batch", longest), name).total for name in training)
        raise PlanError(
            f"one sequence of {longest} tokens does not fit: training it takes {_gib(needs)} GiB of {_gib(job.budget)}"
        )
    low, high = longest // 256, max(longest, most) // 256
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle * 256) else (low, middle - 1)
    return max(longest, low * 256)


def settle(job: Job) -> Job:
    """The job with a number for every setting that is `auto`; where none fits, the one that takes the least.

    Of the states to offload, as few as fit, or more where the larger KV cache saves a tenth of a step for each.
    """
    config = job.config
    chooses_kv_cache = config.rollout.kv_cache_gib == "auto"
    if chooses_kv_cache:
        job = with_key(job, "rollout.kv_cache_gib", kv_sequence_bytes(job) / GIB)  # the least there can be
    if config.train.max_tokens_per_micro_batch == "auto":
        job = with_key(job, "train.max_tokens_per_micro_batch", _longest_trained(job))
        try:
            job = with_key(job, "train.max_tokens_per_micro_batch", token_budget(job))
        except PlanError:
            pass  # the plan of the longest sequence alone shows what is missing
    choices = [(), *_offloads(job)] if config.train.offload == "auto" else [config.train.offload]
    settled = [with_key(job, "train.offload", choice) for choice in choices]
    if chooses_kv_cache:
        settled = [_largest_kv_cache(tried) for tried in settled]
    fitting = [tried for tried in settled if fits(tried)] or settled[-1:]
    return min(fitting, key=lambda tried: sum(step_seconds(tried).values()) * (1 + 0.1 * len(tried.offload)))


def _largest_kv_cache(job: Job) -> Job:
    try:
        return with_key(job, "rollout.kv_cache_gib", kv_cache_bytes(job) / GIB)
    except PlanError:
        return job


def settle_without_gpu(config: Config) -> Config:
    """What `auto` means on a CPU: vLLM's own KV cache, nothing offloaded, and the default budget or the longest sequence."""
    tokens = config.train.max_tokens_per_micro_batch
    if tokens == "auto":
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        default = type(config.train).model_fields["max_tokens_per_micro_batch"].default
        tokens = max(default, longest, config.sft.max_length if config.wants_sft else 0)
    kv = None if config.rollout.kv_cache_gib == "auto" else config.rollout.kv_cache_gib
    offload = () if config.train.offload == "auto" else config.train.offload
    train = config.train.model_copy(update={"max_tokens_per_micro_batch": tokens, "offload": offload})
    return config.model_copy(update={"train": train, "rollout": config.rollout.model_copy(update={"kv_cache_gib": kv})})


def with_key(job: Job, key: str, value: Any) -> Job:
    """The job with another setting."""
    section, name = key.split(".")
    part = getattr(job.config, section).model_copy(update={name: value})
    return replace(job, config=job.config.model_copy(update={section: part}))


# --- seconds ----------------------------------------------------------------------------------


def forward_flops(shapes: Shapes, tokens: float, context: float, *, head: bool) -> float:
    """FLOPs of a forward: 2 a parameter and token in the layers and the head, and attention's two products over half of the
    context on average."""
    matrices = sum(count(tuple(s for s in layer if len(s) == 2)) for layer in shapes.layers)
    attention = 2 * shapes.num_layers * shapes.num_heads * shapes.head_size * context
    return tokens * (2 * matrices + attention + (2 * shapes.head_parameters if head else 0))


def step_seconds(job: Job) -> dict[str, float]:
    """Seconds of one step by phase, from FLOPs and bytes and the constants of `Assumed`. Scoring overlaps generation."""
    gpu, a, shapes, c = job.gpu, job.assumed, job.shapes, job.dtype_bytes
    t = job.config.train
    sequence = job.prompt_tokens + job.response_tokens
    tokens = job.num_samples * sequence / job.num_gpus
    n = job.shard_size
    across_nodes = n > job.num_gpus // job.num_nodes
    network = min(gpu.link_gb_s, a.network_gb_s) if job.num_nodes > 1 else gpu.link_gb_s
    link, replica_link = (1e9 * speed * a.link_efficiency for speed in (network if across_nodes else gpu.link_gb_s, network))
    replicas = job.num_gpus // n
    peak_flops = gpu.tflops * 1e12 * (1 if c == 2 else 0.5)
    mini_batches = t.batch_size // t.mini_batch_size
    micro_batches = mini_batches * math.ceil(tokens / mini_batches / (0.9 * job.micro_batch_tokens))

    def passes(times: float, gathers: int, scatters: int, *, head: bool, updates: int = 1) -> float:
        flops = times * forward_flops(shapes, tokens, sequence, head=head)
        compute = flops / (peak_flops * a.train_efficiency)
        moved = micro_batches * shapes.num_parameters * (gathers * c + scatters * 4) * (n - 1) / n
        reduced = micro_batches * shapes.num_parameters * scatters * 4 / n * 2 * (replicas - 1) / replicas  # HSDP's all-reduce
        communicate = moved / link + reduced / replica_link
        return updates * (compute + max(communicate - a.overlap * compute, (1 - a.overlap) * communicate))

    work = 4 if job.config.model.activation_checkpointing else 3
    optimizer = 40 * shapes.num_parameters / n / (gpu.memory_gb_s * 1e9) * mini_batches * t.epochs
    seconds = {"generate": sum(_generate_seconds(job).values()), "old_log_prob": passes(1, 1, 0, head=True)}
    if job.has_reference:
        seconds["ref"] = passes(1, 1, 0, head=True)
    if job.has_critic:
        seconds["values"] = passes(1, 1, 0, head=False)
        seconds["update_critic"] = passes(work, 2, 1, head=False, updates=t.epochs) + optimizer
    seconds["update_actor"] = passes(work, 2, 1, head=True, updates=t.epochs) + optimizer
    whole = shapes.num_parameters * c
    seconds["push and swap"] = whole * (n - 1) / n / link + 2 * engine_weights(job) / (gpu.memory_gb_s * 1e9) + a.swap_s
    seconds["offload"] = 2 * host_bytes(job) / (gpu.host_gb_s * 1e9 * a.host_efficiency)
    return seconds


def _generate_seconds(job: Job) -> dict[str, float]:
    """Reading prompts, and decoding: as many steps as the longest response has tokens, or more where not all fit at once."""
    gpu, a, shapes, tp = job.gpu, job.assumed, job.shapes, job.tensor_parallel
    rollout, sequences = job.config.rollout, job.samples_per_engine
    per_token = kv_bytes_per_token(job)
    mean = job.prompt_tokens + job.response_tokens / 2
    room = max(1, engine_kv_cache(job) // int(per_token * (job.prompt_tokens + job.response_tokens)))
    at_once = max(1, min(rollout.max_num_seqs, sequences, room))
    steps = max(rollout.max_response_length, sequences * job.response_tokens / at_once)
    busy = sequences * job.response_tokens / steps  # sequences decoding, in the mean over all steps
    peak_flops = gpu.tflops * 1e12 * (1 if job.dtype_bytes == 2 else 0.5)
    read = (engine_weights(job) + busy * mean * per_token) / (gpu.memory_gb_s * 1e9 * a.decode_efficiency)
    compute = forward_flops(shapes, busy, mean, head=True) / tp / (peak_flops * a.prefill_efficiency)
    reduce = 2 * shapes.num_layers * a.all_reduce_us * 1e-6 if tp > 1 else 0
    prompts = forward_flops(shapes, sequences * job.prompt_tokens, job.prompt_tokens, head=False)
    return {
        "prompts": prompts / tp / (peak_flops * a.prefill_efficiency),
        "decode": steps * (max(read, compute) + reduce + a.decode_overhead_ms * 1e-3),
    }


# --- changes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A job altered, and what that costs."""

    words: tuple[str, ...]
    """As a person would type them: key=value overrides and options of `rlsp plan`."""
    job: Job
    seconds: float
    """Of a step."""

    @property
    def fits(self) -> bool:
        return fits(self.job)


def single_changes(job: Job) -> list[Change]:
    """Each change alone, those that leave the algorithm and the machine as they are first."""
    found: list[Change] = []

    def add(words: tuple[str, ...], changed: Job) -> None:
        if changed != job:
            found.append(_change(words, changed))

    for tokens in _smaller_budgets(job):
        add((f"train.max_tokens_per_micro_batch={tokens}",), with_key(job, "train.max_tokens_per_micro_batch", tokens))
    add(*_with_kv_cache(job))
    if not job.config.model.activation_checkpointing:
        add(("model.activation_checkpointing=true",), with_key(job, "model.activation_checkpointing", True))
    for size in _larger_tensor_parallel(job):
        add((f"rollout.tensor_parallel_size={size}",), with_key(job, "rollout.tensor_parallel_size", size))
    for states_ in _offloads(job):
        add(_offload_words(states_), with_key(job, "train.offload", states_))
    if job.has_reference:
        add(("algorithm.kl_coef=0", "algorithm.kl_loss_coef=0"), _without_reference(job))
    for nodes in _multiples(job)[1:4]:
        add((f"--nodes {nodes * job.num_nodes}",), _with_nodes(job, nodes))
    return found


def cheapest_change(job: Job) -> Change | None:
    """What makes a job fit for the least time a step: settings first, then a run without reference, then more nodes.

    Every combination of the single changes is tried. A setting more must save a tenth of the step to be preferred: the
    estimate is no better than that.
    """
    for nodes in _multiples(job):
        for reference in (True, False) if job.has_reference else (True,):
            base = job if nodes == 1 else _with_nodes(job, nodes)
            words: tuple[str, ...] = () if nodes == 1 else (f"--nodes {base.num_nodes}",)
            if not reference:
                base, words = _without_reference(base), (*words, "algorithm.kl_coef=0", "algorithm.kl_loss_coef=0")
            found = [change for change in _settings(base, words) if change.fits]
            if found:
                return min(found, key=lambda change: change.seconds * (1 + 0.1 * len(change.words)))
    return None


def _settings(job: Job, words: tuple[str, ...]) -> Iterator[Change]:
    budgets = [job.config.train.max_tokens_per_micro_batch, *_smaller_budgets(job)]
    recompute = {job.config.model.activation_checkpointing, True}
    sizes = [job.tensor_parallel, *_larger_tensor_parallel(job)]
    offloads = [job.offload, *_offloads(job)]
    for tokens, again, size, states_ in itertools.product(budgets, recompute, sizes, offloads):
        tried, said = job, list(words)
        for key, value, shown in (
            ("train.max_tokens_per_micro_batch", tokens, tokens),
            ("model.activation_checkpointing", again, "true"),
            ("rollout.tensor_parallel_size", size, size),
        ):
            section, name = key.split(".")
            if getattr(getattr(job.config, section), name) != value:
                tried = with_key(tried, key, value)
                said.append(f"{key}={shown}")
        if states_ != job.offload:
            tried = with_key(tried, "train.offload", states_)
            said += _offload_words(states_)
        if any(phase.total > tried.budget for phase in phases(tried) if phase.name != "generate"):
            continue
        yield _change(tuple(said), tried)
        more, sized = _with_kv_cache(tried)
        if more:
            yield _change((*said, *more), sized)


def _change(words: tuple[str, ...], job: Job) -> Change:
    return Change(words=words, job=job, seconds=sum(step_seconds(job).values()))


def _longest_trained(job: Job) -> int:
    """Tokens of the longest sequence that training must hold."""
    return max(job.longest, job.config.sft.max_length if job.config.wants_sft else 0)


def _smaller_budgets(job: Job) -> list[int]:
    least = _longest_trained(job)
    now = job.config.train.max_tokens_per_micro_batch
    return [size for size in (now // 2, now // 4, now // 8) if size > least] + ([least] if least < now else [])


def _larger_tensor_parallel(job: Job) -> list[int]:
    """Sizes within a node that share the heads evenly."""
    a_node = job.num_gpus // job.num_nodes
    if job.config.rollout.engine == "transformers":
        return []
    return [s for s in (2, 4, 8) if s > job.tensor_parallel and a_node % s == 0 and job.shapes.num_heads % s == 0]


def _offloads(job: Job) -> list[tuple[Offloaded, ...]]:
    """More and more of the trainer's states, beyond those that are offloaded already."""
    there = [s for s in OFFLOADED if {"adam": True, "critic": job.has_critic, "reference": job.has_reference}[s]]
    grown = [tuple(s for s in OFFLOADED if s in job.offload or s in there[: i + 1]) for i in range(len(there))]
    return [states_ for states_ in dict.fromkeys(grown) if set(states_) != set(job.offload)]


def _offload_words(states_: tuple[Offloaded, ...]) -> tuple[str, ...]:
    return (f"train.offload={','.join(states_)}",)


def _with_kv_cache(job: Job) -> tuple[tuple[str, ...], Job]:
    """The largest KV cache that fits, in quarters of a GiB; unchanged where none fits or the one there is is as large."""
    try:
        gib = int(4 * kv_cache_bytes(job) / GIB) / 4
    except PlanError:
        return (), job
    if gib * GIB < kv_sequence_bytes(job) or abs(gib * GIB - engine_kv_cache(job)) < GIB / 4:
        return (), job
    return (f"rollout.kv_cache_gib={gib:g}",), with_key(job, "rollout.kv_cache_gib", gib)


def _without_reference(job: Job) -> Job:
    return with_key(with_key(job, "algorithm.kl_coef", 0.0), "algorithm.kl_loss_coef", 0.0)


def _multiples(job: Job) -> list[int]:
    """Times as many nodes, as long as every rank has a problem to generate for and a response in each mini-batch."""
    train, n = job.config.train, job.config.rollout.n
    most = min(train.batch_size, train.mini_batch_size * n) // job.num_gpus
    return [1, *(times for times in (2, 3, 4, 6, 8, 16) if times <= most)]


def _with_nodes(job: Job, times: int) -> Job:
    return replace(job, num_gpus=job.num_gpus * times, num_nodes=job.num_nodes * times)


# --- printing ---------------------------------------------------------------------------------


def report(job: Job) -> dict[str, Any]:
    """Everything a plan says, as JSON holds it; bytes and seconds."""
    found, seconds = phases(job), step_seconds(job)
    change = None if fits(job) else cheapest_change(job)
    highest = peak(job)
    return {
        "model": {"path": job.shapes.name, "shapes": job.shapes.source, "parameters": job.shapes.num_parameters},
        "machine": {
            "gpu": asdict(job.gpu),
            "gpus": job.num_gpus,
            "nodes": job.num_nodes,
            "memory": job.memory,
            "budget": job.budget,
        },
        "fits": fits(job),
        "phases": {p.name: {"total": p.total, "fits": p.total <= job.budget, "parts": p.parts, "gone": p.gone} for p in found},
        "peak": {"phase": highest.name, "total": highest.total, "largest": _largest(highest)},
        "kv_cache": {
            "bytes": engine_kv_cache(job),
            "bytes_per_token": kv_bytes_per_token(job),
            "longest_sequence_tokens": job.longest,
            "longest_sequences": engine_kv_cache(job) // kv_sequence_bytes(job),
            "samples_per_engine": job.samples_per_engine,
        },
        "host_memory_per_rank": host_bytes(job),
        "offload": sorted(job.offload),
        "seconds": seconds | {"step": sum(seconds.values())},
        "tokens_per_second_per_gpu": _throughput(job),
        "change": None if change is None else {"words": change.words, "seconds": change.seconds},
        "assumed": {"prompt_tokens": job.prompt_tokens, "response_tokens": job.response_tokens} | asdict(job.assumed),
    }


def _largest(phase: Phase) -> dict[str, int]:
    return dict(Counter(phase.parts).most_common(3))


def _throughput(job: Job) -> float:
    tokens = job.num_samples * (job.prompt_tokens + job.response_tokens)
    return tokens / sum(step_seconds(job).values()) / job.num_gpus


def _gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"


def as_json(job: Job) -> str:
    return json.dumps(report(job), indent=2)


def show(job: Job, width: int | None = None) -> None:
    """Prints the plan for a person."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=width)
    config, shapes = job.config, job.shapes
    nodes = f" on {job.num_nodes} nodes" if job.num_nodes > 1 else ""
    console.print(f"{shapes.name}: {shapes.num_parameters / 1e9:.2f} B parameters, {shapes.num_layers} layers; {shapes.source}")
    console.print(
        f"{job.num_gpus} x {job.gpu.name} of {_gib(job.memory)} GiB{nodes}, {job.assumed.headroom_gib:g} kept free; "
        f"FSDP over {job.shard_size}, vLLM over {job.tensor_parallel}; {config.model.dtype}, {job.micro_batch_tokens:,} tokens "
        "a micro-batch" + (", activations recomputed" if config.model.activation_checkpointing else "")
    )
    console.print(_memory_table(job))
    for line in _verdict(job):
        console.print(line)
    if not fits(job):
        console.print(_changes_table(job))
        for line in _advice(job):
            console.print(line)
    console.print()
    console.print(_seconds_table(job))
    console.print("\nAssumed, not measured:")
    gpu = job.gpu
    console.print(
        f"  {gpu.name} (data sheet): {gpu.tflops:,.0f} TFLOP/s, {gpu.memory_gb_s:,.0f} GB/s memory, each way "
        f"{gpu.link_gb_s:,.0f} GB/s to other GPUs and {gpu.host_gb_s:,.0f} to the host"
    )
    console.print(
        f"  {job.prompt_tokens} tokens a prompt, {job.response_tokens} a response in the mean; the longest reaches the limit"
    )
    for constant in fields(job.assumed):
        console.print(f"  {getattr(job.assumed, constant.name):<6g} {constant.metadata['sentence']}")


def _memory_table(job: Job) -> Any:
    from rich.table import Table

    found = phases(job)
    table = Table(title="GiB on the fullest rank, at each phase's highest moment", title_justify="left")
    table.add_column("")
    for phase in found:
        table.add_column(phase.name, justify="right")
    rows = list(dict.fromkeys(part for phase in found for part in phase.parts))
    for part in sorted(rows, key=_PART_ORDER.index):
        cells = [_cell(phase, part) for phase in found]
        if any(cell != "-" for cell in cells):
            table.add_row(part, *cells)
    table.add_section()
    table.add_row("total", *(_gib(phase.total) for phase in found))
    table.add_row("free", *(_free(job.budget - phase.total) for phase in found))
    return table


_PART_ORDER = [
    "actor weights (f32)", "actor Adam moments", "critic weights (f32)", "critic Adam moments", "reference", "gradients",
    "gathered weights", "activations", "logits, head's gradient", "engine weights", "KV cache", "engine workspace",
    "CUDA graphs", "NCCL", "CUDA context, residue", "allocator slack",
]  # fmt: skip


def _cell(phase: Phase, part: str) -> str:
    if part in phase.gone:
        return phase.gone[part]
    size = phase.parts.get(part, 0)
    return "-" if size == 0 else _gib(size, 1 if size >= GIB / 20 else 2)


def _free(size: int) -> str:
    return _gib(size) if size >= 0 else f"[bold red]{_gib(size)}[/]"


def _verdict(job: Job) -> list[str]:
    highest = peak(job)
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in _largest(highest).items())
    kv, one = engine_kv_cache(job), kv_sequence_bytes(job)
    lines = [f"Peak: {_gib(highest.total)} GiB in {highest.name} ({parts})."]
    at_once = min(job.samples_per_engine, job.config.rollout.max_num_seqs)
    lines.append(
        f"KV cache: {kv_bytes_per_token(job) / 1024:,.0f} KiB a token; {_gib(kv)} GiB hold {kv // one:,} sequences of "
        f"{job.longest:,} tokens; an engine gets {job.samples_per_engine:,} a step, {at_once:,} at once."
    )
    host = host_bytes(job)
    where = (
        "level 1: vLLM's weights go to the host"
        if job.config.rollout.sleep_level == 1
        else "level 2: vLLM's weights are dropped"
    )
    if job.config.rollout.engine != "transformers":
        lines.append(f"Sleep {where}. Pinned host memory: {_gib(host)} GiB a rank.")
    if fits(job):
        lines.append("[bold green]Fits.[/]")
        more, sized = _with_kv_cache(job)
        if more and kv < wanted_kv_bytes(job) and sum(step_seconds(sized).values()) < 0.99 * sum(step_seconds(job).values()):
            lines.append(f"Faster by the estimate: {' '.join(more)} (it fits too).")
    elif kv < one:
        lines.append("[bold red]Does not fit:[/] nothing is left for a KV cache of even one longest sequence.")
    else:
        over = ", ".join(phase.name for phase in phases(job) if phase.total > job.budget)
        lines.append(f"[bold red]Does not fit:[/] {over}.")
    return lines


def _changes_table(job: Job) -> Any:
    from rich.table import Table

    table = Table(title="Each change alone", title_justify="left")
    for name in ("change", "peak, GiB", "in", "fits", "s a step"):
        table.add_column(name, justify="right" if name in ("peak, GiB", "s a step") else "left")
    for change in single_changes(job):
        highest = peak(change.job)
        table.add_row(
            " ".join(change.words), _gib(highest.total), highest.name, "yes" if change.fits else "no", f"{change.seconds:,.0f}"
        )
    return table


def _advice(job: Job) -> list[str]:
    change = cheapest_change(job)
    if change is None:
        return ["No combination of these fits, on any number of nodes that this batch can be spread over."]
    highest = peak(change.job)
    return [
        f"[bold]Cheapest that fits:[/] {' '.join(change.words)}",
        f"  {_gib(highest.total)} GiB in {highest.name}, about {change.seconds:,.0f} s a step.",
    ]


def _seconds_table(job: Job) -> Any:
    from rich.table import Table

    seconds = step_seconds(job)
    step = sum(seconds.values())
    table = Table(title="Seconds of a step, estimated", title_justify="left")
    table.add_column("phase")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    for name, value in seconds.items():
        if value >= 0.005:
            table.add_row(name, f"{value:,.1f}" if value >= 1 else f"{value:.2f}", f"{100 * value / step:.0f} %")
    table.add_section()
    table.add_row("step", f"{step:,.1f}", f"{_throughput(job):,.0f} tokens/s/GPU")
    return table
