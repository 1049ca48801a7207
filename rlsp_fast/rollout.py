"""Rollout engines: four verbs (generate, sleep, wake, load_weights) on vLLM in this process, or on transformers.

vLLM runs inside the training process under torchrun's `external_launcher`: one engine per rank, or one per
`tensor_parallel_size` consecutive ranks. What differs between vLLM versions and devices lives in this file alone.
"""

import functools
import importlib.util
import logging
import os
import secrets
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rlsp_fast import dist
from rlsp_fast.config import Config
from rlsp_fast.types import Group, Problem, Rollout

log = logging.getLogger(__name__)

_STOP_TOKENS = 64  # of a response's end: more than a stop string has
MAX_CARRIES = 4
"""A group carried over this often is waited for. No token trained on is older than this many steps, but where more such groups
than it may take fall to one engine: those beyond wait for the next step."""


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
        groups = {slot: Group(problem=problem) for slot, problem in zip(slots, problems, strict=True)}
        taken, _ = self.generate_until(groups, sampling, enough=len(groups), on_finish=on_finish)
        return [rollout for group in taken.values() for rollout in group.responses]

    def generate_until(
        self,
        groups: Mapping[int, Group],
        sampling: Sampling,
        *,
        enough: int,
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> tuple[dict[int, Group], dict[int, Group]]:
        """Works on groups, new ones and ones that an earlier call left, until `enough` of them are complete.

        Groups carried most often are begun first, then those expected to be longest. Those carried MAX_CARRIES times are among
        the ones taken, however long that lasts.

        Args:
            groups: By slot, with their responses so far, which are continued with what is left of sampling.max_tokens.
            enough: At most len(groups). Ranks of one tensor-parallel engine stop when the sum of theirs is complete, whoever's
                groups these are.
            on_finish: Gets each response as it completes, in groups that are left too; finished ones of earlier calls first.

        Returns:
            By slot, in the order given: the groups taken; and those left, carried once more.
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
    how = "eager" if engine.eager else "compiled"
    log.info("rollout engine: vLLM %s in process, %s, tensor parallel %d", engine.version, how, tp)
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


class Harvest:
    """The groups of an engine as their responses grow: which are taken, and when there are enough."""

    def __init__(
        self,
        groups: Mapping[int, Group],
        num_samples: int,
        enough: int,
        on_finish: Callable[[Rollout], object] | None,
        own: Collection[int],
    ):
        """
        Args:
            groups: By slot, in the order in which to begin those that are otherwise equal.
            own: This rank's slots.
        """
        assert enough <= len(groups), f"{enough} of {len(groups)} groups will never be complete"
        self.groups, self.enough, self.on_finish, self.own = groups, enough, on_finish, own
        self.overdue = {slot for slot, group in groups.items() if group.num_carries >= MAX_CARRIES}
        self.taken: set[int] = set()
        self.responses = {slot: _begun(group, num_samples) for slot, group in groups.items()}
        for slot in self._ordered():
            for rollout in self.responses[slot]:
                if rollout.finish != "unfinished":
                    self.put(slot, rollout)

    def work(self) -> list[tuple[int, Rollout]]:
        """(slot, what there is of it) of every response to begin or continue, in the order to do so."""
        return [(slot, r) for slot in self._ordered() for r in self.responses[slot] if r.finish == "unfinished"]

    def put(self, slot: int, rollout: Rollout) -> None:
        """A response as it is now."""
        self.responses[slot][rollout.sample] = rollout
        if rollout.finish == "unfinished":
            return
        if self.on_finish is not None and slot in self.own:
            self.on_finish(rollout)
        room = self.enough - len(self.taken | self.overdue)
        if (slot in self.overdue or room > 0) and all(r.finish != "unfinished" for r in self.responses[slot]):
            self.taken.add(slot)

    @property
    def full(self) -> bool:
        return len(self.taken) >= self.enough

    def result(self) -> tuple[dict[int, Group], dict[int, Group]]:
        """What Engine.generate_until returns: this rank's groups taken, and left."""
        grown = {slot: replace(self.groups[slot], responses=tuple(self.responses[slot])) for slot in self.own}
        left = {slot: replace(g, num_carries=g.num_carries + 1) for slot, g in grown.items() if slot not in self.taken}
        return {slot: group for slot, group in grown.items() if slot in self.taken}, left

    def _ordered(self) -> list[int]:
        return sorted(self.groups, key=lambda slot: (-self.groups[slot].num_carries, -self.groups[slot].expected))


def _begun(group: Group, num_samples: int) -> list[Rollout]:
    """A group's responses at the beginning of a step: all that is there was carried."""
    if group.responses:
        return [replace(r, num_carried=len(r.response_ids)) for r in group.responses]
    nothing = {"response_ids": (), "rollout_logprob": (), "finish": "unfinished", "text": ""}
    return [Rollout(problem=group.problem, sample=k, **nothing) for k in range(num_samples)]


def _grown(begun: Rollout, ids: Sequence[int], logprobs: Sequence[float], finish: str, decode: Callable[..., str]) -> Rollout:
    """begun with all of its tokens as they are now."""
    text = "" if finish == "unfinished" else decode(ids, skip_special_tokens=True)
    return replace(begun, response_ids=tuple(ids), rollout_logprob=tuple(logprobs), finish=finish, text=text)


# --- vLLM -------------------------------------------------------------------------------------


class VLLMEngine(Engine):
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
            if rollout.tensor_parallel_size > 1:
                _name_shared_memory(dist.gather_objects(secrets.token_hex(8))[0])
        self.version = vllm.__version__
        self.tokenizer = tokenizer
        self.level = rollout.sleep_level
        self.eager: bool = not self.on_gpu if rollout.enforce_eager == "auto" else rollout.enforce_eager
        self.eos_ids = eos_ids(path, tokenizer)
        options: dict[str, Any] = {}
        if self.on_gpu:
            options = {"enable_sleep_mode": True, "gpu_memory_utilization": rollout.gpu_memory_utilization}
            if rollout.kv_cache_gib:
                options["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
        num_threads = torch.get_num_threads()
        with _stdout_with_a_descriptor():
            self.llm = self._load(vllm, config, path, options)
        torch.set_num_threads(num_threads)  # vLLM's CPU worker sets its own
        self._tp_group, self._tp_ranks = _tensor_parallel_group(rollout.tensor_parallel_size)
        self._requests = 0

    def _load(self, vllm: Any, config: Config, path: str, options: dict[str, Any]) -> Any:
        rollout = config.rollout
        return vllm.LLM(
            model=path,
            tokenizer=path,
            dtype=config.model.dtype,
            tensor_parallel_size=rollout.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=config.data.max_prompt_length + rollout.max_response_length,
            max_num_seqs=rollout.max_num_seqs,
            enforce_eager=self.eager,
            enable_chunked_prefill=self.on_gpu,  # on a CPU a request with a seed fails when its prompt is read in parts
            logprobs_mode="processed_logprobs",  # the trainer needs the distribution that was sampled, temperature in it
            generation_config="vllm",  # a model's own top_k or repetition penalty would change that distribution
            seed=config.train.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )

    def generate_until(
        self,
        groups: Mapping[int, Group],
        sampling: Sampling,
        *,
        enough: int,
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> tuple[dict[int, Group], dict[int, Group]]:
        # Ranks of one tensor-parallel engine must see the same requests: all generate all, each keeps its own.
        parts = self._gather((groups, enough))
        everyones = {slot: group for part, _ in parts for slot, group in part.items()}
        harvest = Harvest(everyones, sampling.n, sum(share for _, share in parts), on_finish, groups)
        engine = self.llm.llm_engine
        waiting: dict[str, tuple[int, Rollout]] = {}
        for slot, begun in harvest.work() if not harvest.full else ():
            self._requests += 1
            request_id = str(self._requests)
            waiting[request_id] = (slot, begun)
            prompt = {"prompt_token_ids": [*begun.problem.prompt_ids, *begun.response_ids]}
            engine.add_request(request_id, prompt, self._params(sampling, slot, begun))
        if sampling.stop:
            self._show_carried_text(waiting)
        while not harvest.full:
            for output in engine.step():
                if output.finished:
                    slot, begun = waiting.pop(_request_id(output.request_id))
                    completion = output.outputs[0]
                    finish = "length" if completion.finish_reason == "length" else "stop"
                    harvest.put(slot, self._grown(begun, completion.token_ids, completion.logprobs, finish))
        for request_id, state in self._states().items():
            slot, begun = waiting[request_id]
            ids, logprobs = state.detokenizer.output_token_ids, state.logprobs_processor.logprobs
            harvest.put(slot, self._grown(begun, ids, logprobs, "unfinished"))
        engine.abort_request(list(waiting))
        while engine.engine_core.engine_core.batch_queue:  # what asynchronous scheduling has under way holds cache blocks
            engine.step()
        return harvest.result()

    def _states(self) -> dict[str, Any]:
        """By request, what vLLM keeps of its output: a request cut short has no other."""
        return {_request_id(name): state for name, state in self.llm.llm_engine.output_processor.request_states.items()}

    def _show_carried_text(self, waiting: Mapping[str, tuple[int, Rollout]]) -> None:
        """Puts the end of what was carried before the text that stop strings are looked for in: one may lie across."""
        for request_id, state in self._states().items():
            _, begun = waiting[request_id]
            state.detokenizer.output_text = self.tokenizer.decode(begun.response_ids[-_STOP_TOKENS:], skip_special_tokens=True)

    def _params(self, sampling: Sampling, slot: int, begun: Rollout) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens - len(begun.response_ids),
            stop=list(sampling.stop) or None,
            stop_token_ids=list(self.eos_ids),
            seed=_seed(sampling.seed, slot, begun.sample) if sampling.temperature > 0 else None,
            logprobs=0,  # the sampled token's alone
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _grown(self, begun: Rollout, ids: Sequence[int], positions: Sequence[Any], finish: str) -> Rollout:
        logprobs = [position[token].logprob for position, token in zip(positions, ids, strict=True)]
        ids, logprobs = [*begun.response_ids, *ids], [*begun.rollout_logprob, *logprobs]
        return _grown(begun, ids, logprobs, finish, self.tokenizer.decode)

    def _gather(self, mine: Any) -> list[Any]:
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


def _request_id(name: str) -> str:
    """The name we gave a request; vLLM adds one of its own."""
    return name.split("-")[0]


@contextmanager
def _stdout_with_a_descriptor() -> Iterator[None]:
    """vLLM before 0.31 asks sys.stdout for its file descriptor while it loads; a notebook's has none."""
    try:
        sys.stdout.fileno()
    except (AttributeError, OSError):
        with redirect_stdout(sys.__stdout__):
            yield
    else:
        yield


def _keep_cpu_weights() -> None:
    """vLLM's CPU build throws a linear layer's weights away once it has repacked them: kept, a push can be checked there."""
    from vllm.model_executor.layers import utils

    pack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if pack is not None and not isinstance(pack, functools.partial):
        utils.dispatch_cpu_unquantized_gemm = functools.partial(_pack_and_keep, pack)


def _name_shared_memory(job: str) -> None:
    """vLLM's CPU ranks meet in shared memory named after the address that they were given. external_launcher gives none: two
    jobs on a machine would take one name, and the second would end with `create shm in SHMManager failed. errno: 17`."""
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    name = shared.make_group_name
    if not isinstance(name, functools.partial):
        shared.make_group_name = staticmethod(functools.partial(_named, job, name))


def _named(job: str, name: Callable[..., str], communicator: Any) -> str:
    return f"{name(communicator)}-{job}"  # vLLM's begins with slashes, which nothing may stand before


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


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come: DynamicLayer copies all of them at every token."""

    ROOM = 128

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, k, D) each; returns all there are, (B, H, L + k, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room: tuple[Tensor, Tensor] | None = None
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < after:
            roomy = [x.new_empty(*x.shape[:2], after + self.ROOM, x.shape[-1]) for x in (key_states, value_states)]
            if before:
                roomy[0][..., :before, :], roomy[1][..., :before, :] = self.keys, self.values
            self.room = roomy[0], roomy[1]
        keys, values = self.room
        keys[..., before:after, :], values[..., before:after, :] = key_states, value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


class TransformersEngine(Engine):
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
    def generate_until(
        self,
        groups: Mapping[int, Group],
        sampling: Sampling,
        *,
        enough: int,
        on_finish: Callable[[Rollout], object] | None = None,
    ) -> tuple[dict[int, Group], dict[int, Group]]:
        # Prompts of like length side by side need the least padding.
        shortest_last = sorted(groups.items(), key=lambda item: -len(item[1].problem.prompt_ids))
        harvest = Harvest(dict(shortest_last), sampling.n, enough, on_finish, groups)
        work = harvest.work()
        for start in range(0, len(work), self.max_num_seqs):
            if not harvest.full:
                self._generate_batch(work[start : start + self.max_num_seqs], sampling, harvest)
        return harvest.result()

    def _generate_batch(self, work: list[tuple[int, Rollout]], sampling: Sampling, harvest: Harvest) -> None:
        """Decodes one left-padded batch. The samples of a problem share its prompt's forward; finished rows are dropped when
        computing them in vain has cost about as much as dropping them will: one step."""
        texts = [(*begun.problem.prompt_ids, *begun.response_ids) for _, begun in work]
        prompts = list(dict.fromkeys(texts))
        longest = max(map(len, prompts))
        pad = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * p + list(prompt) for p, prompt in zip(pad, prompts, strict=True)], device=self.device)
        attend = torch.tensor([[0] * p + [1] * (longest - p) for p in pad], device=self.device)
        position = (attend.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        logits_BV = self._forward(ids, attend, position, cache)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        sample = torch.tensor([place[text] for text in texts], device=self.device)
        cache.batch_select_indices(sample)
        logits_BV, attend, position = logits_BV[sample], attend[sample], position[sample]

        seeds = [_seed(sampling.seed, slot, begun.sample) for slot, begun in work]
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        tokens = [list(begun.response_ids) for _, begun in work]
        logprobs = [list(begun.rollout_logprob) for _, begun in work]
        rows = list(range(len(work)))  # which work item each row of the batch is
        finished: set[int] = set()
        in_vain = 0.0  # steps' worth of finished rows
        while True:
            token_B, logprob_B = _sample(logits_BV.float(), sampling, [generators[r] for r in rows])
            for row, token, logprob in zip(rows, token_B.tolist(), logprob_B.tolist(), strict=True):
                if row in finished:
                    continue
                tokens[row].append(token)
                logprobs[row].append(logprob)
                slot, begun = work[row]
                stopped = token in self.eos_ids or self._hit_stop(tokens[row], sampling.stop)
                if stopped or len(tokens[row]) == sampling.max_tokens:
                    finished.add(row)
                    finish = "stop" if stopped else "length"
                    harvest.put(slot, _grown(begun, tokens[row], logprobs[row], finish, self.tokenizer.decode))
            alive = [i for i, row in enumerate(rows) if row not in finished]
            if not alive or harvest.full:
                break
            ids, position = token_B[:, None], position[:, -1:] + 1
            attend = torch.cat([attend, attend.new_ones(len(rows), 1)], 1)
            in_vain += 1 - len(alive) / len(rows)
            if in_vain >= 1:
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                ids, position, attend = ids[keep], position[keep], attend[keep]
                rows, in_vain = [rows[i] for i in alive], 0.0
            logits_BV = self._forward(ids, attend, position, cache)
        for row in set(range(len(work))) - finished:
            slot, begun = work[row]
            harvest.put(slot, _grown(begun, tokens[row], logprobs[row], "unfinished", self.tokenizer.decode))

    def _forward(self, ids: Tensor, attend: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of each row's last position, (B, V)."""
        out = self.model(input_ids=ids, attention_mask=attend, position_ids=position, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1]

    def _hit_stop(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        return bool(stop) and any(s in self.tokenizer.decode(tokens[-_STOP_TOKENS:]) for s in stop)

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
    cdf_BV = log_p_BV.exp().cumsum(-1, dtype=torch.float64)
    uniform_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators])
    token_B = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)[:, 0]  # never one of probability 0
    token_B = token_B.clamp(max=log_p_BV.shape[-1] - 1)  # NaN probabilities: any token; the trainer's comparison stops the run
    return token_B, log_p_BV.gather(-1, token_B[:, None])[:, 0]
