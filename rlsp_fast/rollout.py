"""Rollout engines: four verbs (generate, sleep, wake, load_weights) on vLLM in this process, or on transformers.

vLLM runs inside the training process under torchrun's `external_launcher`: one engine per rank, or one per
`tensor_parallel_size` consecutive ranks. What differs between vLLM versions and devices lives in this file alone.
"""

import functools
import importlib.util
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from rlsp_fast import dist
from rlsp_fast.config import Config
from rlsp_fast.types import Problem, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. Two calls with equal arguments and weights give the same rollouts."""

    n: int
    """Responses per problem."""
    temperature: float
    """> 0; 0 is greedy."""
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int = 0
    """Sampling of slot i, sample k, depends on (seed, i, k) alone, not on the rank or batch it runs in."""


class Engine(Protocol):
    """A rollout engine. Ranks call every verb together."""

    name: str

    def generate(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        slots: Sequence[int],
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        """len(problems) * n rollouts, samples of a problem together, in order. on_finish gets each as it completes.

        slots: a number per problem, distinct over all ranks; seeds its sampling.
        """
        ...

    def sleep(self) -> None:
        """Leaves the device to the trainer. Level 2 drops the weights: wake must be followed by load_weights."""
        ...

    def wake(self, *tags: str) -> None:
        """Takes memory back: `weights` before load_weights, `kv_cache` after it."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights. The iterator is consumed on every rank; names are the Hugging Face checkpoint's."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets keys and values computed with the weights before."""
        ...

    def held(self) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        """(its own name, this rank's tensor, checkpoint names that it is made of) of every weight as it stands there."""
        ...

    def sum_over_shares(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks that share one engine."""
        ...

    def close(self) -> None:
        """Gives everything back. Before the process group goes, whose subgroups vLLM holds."""
        ...


def make_engine(config: Config, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Engine:
    """The engine that config.rollout.engine names; says which and why.

    Raises:
        EngineError: when vLLM was asked for by name and does not import, or the parallel layout cannot be.
    """
    rollout = config.rollout
    tp = rollout.tensor_parallel_size
    if dist.world_size() % tp:
        raise EngineError(f"rollout.tensor_parallel_size = {tp} does not divide the number of ranks, {dist.world_size()}")
    why_not = _why_no_vllm()
    if rollout.engine == "vllm" and why_not:
        raise EngineError(f"rollout.engine = vllm: {why_not}. Install it (see README) or set rollout.engine=transformers")
    if rollout.engine == "transformers" or (rollout.engine == "auto" and why_not):
        if tp > 1:
            raise EngineError("rollout.tensor_parallel_size > 1 needs rollout.engine = vllm")
        log.info("rollout engine: transformers (%s)", why_not if rollout.engine == "auto" else "asked for")
        return TransformersEngine(config, path, tokenizer, device)
    engine = VLLMEngine(config, path, tokenizer, device)
    log.info("rollout engine: vLLM %s in process, tensor parallel %d", engine.version, tp)
    return engine


class EngineError(ValueError):
    """An engine that cannot be had as asked; the message names the key and the fix."""


def _why_no_vllm() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _vllm_environment()
    try:
        import vllm  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a wheel built for another torch or CUDA
        return f"vLLM does not import ({str(error).splitlines()[0][:160]})"
    return None


def _vllm_environment() -> None:
    """Variables that vLLM reads at import, and its chatter off; a user's own setting wins."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs before it has read the variable
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: weights are handed over by reference
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads would starve the trainer's own
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and those of generation_config.json."""
    ids = {tokenizer.eos_token_id}
    try:
        extra = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # no generation_config.json: the tokenizer's is all there is
        extra = None
    ids.update(extra if isinstance(extra, list) else [extra])
    return tuple(sorted(i for i in ids if i is not None))


def _seed(seed: int, slot: int, sample: int) -> int:
    return zlib.crc32(f"{seed}/{slot}/{sample}".encode())


# --- vLLM -------------------------------------------------------------------------------------


class VLLMEngine:
    """vLLM in this process."""

    name = "vllm"

    def __init__(self, config: Config, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        _vllm_environment()
        rollout = config.rollout
        self.on_gpu = device.type == "cuda"
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(rollout.kv_cache_gib or 1))))
        import vllm

        if not self.on_gpu:
            _keep_cpu_weights()
        self.version = vllm.__version__
        self.tokenizer = tokenizer
        self.level = rollout.sleep_level
        self.eos_ids = eos_ids(path, tokenizer)
        options: dict[str, Any] = {}
        if self.on_gpu:
            options = {"enable_sleep_mode": True, "gpu_memory_utilization": rollout.gpu_memory_utilization}
            if rollout.kv_cache_gib:
                options["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
        num_threads = torch.get_num_threads()
        self.llm = vllm.LLM(
            model=path,
            tokenizer=path,
            dtype=config.model.dtype,
            tensor_parallel_size=rollout.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=config.data.max_prompt_length + rollout.max_response_length,
            max_num_seqs=rollout.max_num_seqs,
            enforce_eager=rollout.enforce_eager or not self.on_gpu,
            logprobs_mode="processed_logprobs",  # the trainer needs the distribution that was sampled, temperature in it
            generation_config="vllm",  # a model's own top_k or repetition penalty would change that distribution
            seed=config.train.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        torch.set_num_threads(num_threads)  # vLLM's CPU worker sets its own
        self._tp_group, self._tp_ranks = _tensor_parallel_group(rollout.tensor_parallel_size)
        self._requests = 0

    def generate(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        slots: Sequence[int],
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        mine = [(slot, problem) for slot, problem in zip(slots, problems, strict=True)]
        # Ranks of one tensor-parallel engine must see the same requests: all generate all, each keeps its own.
        work = [item for part in self._gather(mine) for item in part]
        own = {slot for slot, _ in mine}
        engine = self.llm.llm_engine
        waiting: dict[str, tuple[int, int, Problem]] = {}
        for slot, problem in work:
            for sample in range(sampling.n):
                self._requests += 1
                request_id = str(self._requests)
                waiting[request_id] = (slot, sample, problem)
                prompt = {"prompt_token_ids": list(problem.prompt_ids)}
                engine.add_request(request_id, prompt, self._params(sampling, slot, sample))
        done: dict[tuple[int, int], Rollout] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                slot, sample, problem = waiting[output.request_id.split("-")[0]]
                if slot in own:
                    done[slot, sample] = self._rollout(problem, sample, output.outputs[0])
                    if on_finish is not None:
                        on_finish(done[slot, sample])
        return [done[slot, sample] for slot in slots for sample in range(sampling.n)]

    def _params(self, sampling: Sampling, slot: int, sample: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop) or None,
            stop_token_ids=list(self.eos_ids),
            seed=_seed(sampling.seed, slot, sample) if sampling.temperature > 0 else None,
            logprobs=0,  # the sampled token's alone
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, problem: Problem, sample: int, completion: Any) -> Rollout:
        ids = tuple(completion.token_ids)
        logprobs = tuple(position[token].logprob for position, token in zip(completion.logprobs, ids, strict=True))
        return Rollout(
            problem=problem,
            sample=sample,
            response_ids=ids,
            rollout_logprob=logprobs,
            finish="length" if completion.finish_reason == "length" else "stop",
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
        )

    def _gather(self, mine: list) -> list[list]:
        if self._tp_group is None:
            return [mine]
        parts: list = [None] * len(self._tp_ranks)
        torch.distributed.all_gather_object(parts, mine, group=self._tp_group)
        return parts

    def sleep(self) -> None:
        if self.on_gpu:  # vLLM's CPU build has nothing to give back
            self.llm.sleep(level=self.level)

    def wake(self, *tags: str) -> None:
        if self.on_gpu:
            self.llm.wake_up(tags=list(tags))

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.on_gpu:
            self._model().load_weights(weights)
        else:
            # The CPU build repacks linear layers after loading, so load_weights on the model fails; this RPC repacks anew.
            # It keeps references until a layer is complete: the iterator must yield tensors of their own.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def held(self) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        model = self._model()
        fused = getattr(model, "packed_modules_mapping", None) or {}  # {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}
        for name, parameter in model.named_parameters():
            parts = (name,)
            for whole, pieces in fused.items():
                if f".{whole}." in name:
                    parts = tuple(name.replace(f".{whole}.", f".{piece}.") for piece in pieces)
            yield name, parameter.data, parts

    def sum_over_shares(self, numbers: Tensor) -> Tensor:
        if self._tp_group is None:
            return numbers
        total = numbers.cpu()
        torch.distributed.all_reduce(total, group=self._tp_group)
        return total.to(numbers.device)

    def _model(self) -> torch.nn.Module:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _keep_cpu_weights() -> None:
    """vLLM's CPU build throws a linear layer's weights away once it has repacked them: kept, a push can be checked there."""
    from vllm.model_executor.layers import utils

    pack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if pack is not None and not isinstance(pack, functools.partial):
        utils.dispatch_cpu_unquantized_gemm = functools.partial(_pack_and_keep, pack)


def _pack_and_keep(pack: Callable[..., None], layer: torch.nn.Module, remove_weight: bool = False) -> None:
    pack(layer, remove_weight=False)


def _tensor_parallel_group(size: int) -> tuple[Any, list[int]]:
    """This rank's group of `size` consecutive ranks, as vLLM lays its tensor-parallel engines out."""
    group, mine = None, [dist.rank()]
    for start in range(0, dist.world_size(), size) if size > 1 else ():
        ranks = list(range(start, start + size))
        candidate = torch.distributed.new_group(ranks, backend="gloo")
        if dist.rank() in ranks:
            group, mine = candidate, ranks
    return group, mine


# --- transformers -----------------------------------------------------------------------------


class TransformersEngine:
    """Batched, cached generation with the Hugging Face model, for machines where vLLM does not run."""

    name = "transformers"

    def __init__(self, config: Config, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        self.tokenizer = tokenizer
        self.device = device
        self.max_num_seqs = config.rollout.max_num_seqs
        self.eos_ids = eos_ids(path, tokenizer)
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()

    @torch.inference_mode()
    def generate(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        slots: Sequence[int],
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        work = [(slot, k, p) for slot, p in zip(slots, problems, strict=True) for k in range(sampling.n)]
        longest_first = sorted(range(len(work)), key=lambda i: -len(work[i][2].prompt_ids))
        done: dict[int, Rollout] = {}
        for start in range(0, len(work), self.max_num_seqs):
            chosen = longest_first[start : start + self.max_num_seqs]
            self._generate_batch([work[i] for i in chosen], chosen, sampling, done, on_finish)
        return [done[i] for i in range(len(work))]

    def _generate_batch(
        self,
        work: list[tuple[int, int, Problem]],
        names: list[int],
        sampling: Sampling,
        done: dict[int, Rollout],
        on_finish: Callable[[Rollout], object] | None,
    ) -> None:
        """Decodes one left-padded batch, dropping finished rows from the cache when half of them are done."""
        longest = max(len(problem.prompt_ids) for _, _, problem in work)
        pad = [longest - len(problem.prompt_ids) for _, _, problem in work]
        ids = torch.tensor([[0] * p + list(w[2].prompt_ids) for p, w in zip(pad, work, strict=True)], device=self.device)
        attend = torch.tensor([[0] * p + [1] * (longest - p) for p in pad], device=self.device)
        position = (attend.cumsum(-1) - 1).clamp(min=0)
        generators = [torch.Generator(self.device).manual_seed(_seed(sampling.seed, slot, k)) for slot, k, _ in work]
        tokens: list[list[int]] = [[] for _ in work]
        logprobs: list[list[float]] = [[] for _ in work]
        rows = list(range(len(work)))  # which work item each row of the batch is
        cache = DynamicCache(config=self.model.config)
        finished: set[int] = set()
        for step in range(sampling.max_tokens):
            out = self.model(
                input_ids=ids, attention_mask=attend, position_ids=position, past_key_values=cache, logits_to_keep=1
            )
            token_B, logprob_B = _sample(out.logits[:, -1].float(), sampling, [generators[r] for r in rows])
            for row, token, logprob in zip(rows, token_B.tolist(), logprob_B.tolist(), strict=True):
                if row in finished:
                    continue
                tokens[row].append(token)
                logprobs[row].append(logprob)
                stopped = token in self.eos_ids or self._hit_stop(tokens[row], sampling.stop)
                if stopped or step + 1 == sampling.max_tokens:
                    finished.add(row)
                    rollout = self._rollout(work[row], tokens[row], logprobs[row], stopped)
                    done[names[row]] = rollout
                    if on_finish is not None:
                        on_finish(rollout)
            if len(finished) == len(work):
                return
            ids, position = token_B[:, None], position[:, -1:] + 1
            attend = torch.cat([attend, attend.new_ones(len(rows), 1)], 1)
            alive = [i for i, row in enumerate(rows) if row not in finished]
            if len(alive) <= len(rows) // 2:
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                ids, position, attend = ids[keep], position[keep], attend[keep]
                rows = [rows[i] for i in alive]

    def _hit_stop(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        return bool(stop) and any(s in self.tokenizer.decode(tokens[-64:]) for s in stop)

    def _rollout(self, work: tuple[int, int, Problem], ids: list[int], logprobs: list[float], stopped: bool) -> Rollout:
        _, sample, problem = work
        return Rollout(
            problem=problem,
            sample=sample,
            response_ids=tuple(ids),
            rollout_logprob=tuple(logprobs),
            finish="stop" if stopped else "length",
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
        )

    def sleep(self) -> None:
        """Keeps its copy: on a CPU there is nothing to swap to, on a GPU a user wants vLLM."""

    def wake(self, *tags: str) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        """Its cache lives for one batch."""

    def held(self) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        for name, tensor in self.model.state_dict().items():
            yield name, tensor, (name,)

    def sum_over_shares(self, numbers: Tensor) -> Tensor:
        return numbers

    def close(self) -> None:
        pass

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = self.model.state_dict()
        missing = set(own)
        for name, tensor in weights:
            own[name].copy_(tensor)
            missing.discard(name)
        assert not missing, f"weights never pushed: {sorted(missing)[:3]}"


def _sample(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability after temperature and top_p. temperature 0 takes the largest."""
    if sampling.temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, logits_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
    log_p_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = log_p_BV.sort(-1, descending=True)
        above_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp() >= sampling.top_p  # mass before this token is enough
        log_p_BV = log_p_BV.masked_fill(above_BV.scatter(-1, order_BV, above_BV), -torch.inf).log_softmax(-1)
    noise_BV = torch.stack([torch.empty_like(log_p_BV[0]).exponential_(generator=g) for g in generators])
    token_B = (log_p_BV - noise_BV.log()).argmax(-1)  # Gumbel: argmax(log p - log Exp(1)) is a sample of p
    return token_B, log_p_BV.gather(-1, token_B[:, None])[:, 0]
