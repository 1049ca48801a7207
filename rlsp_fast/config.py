"""Every setting of rlsp_fast: one typed tree, checked before anything is loaded. No torch.

A recipe is a TOML (or YAML) file with these sections; `section.key=value` on the command line overrides it. Each key's
docstring gives its meaning and unit; bounds are in its type.
"""

import difflib
import json
import math
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
KLKind = Literal["k1", "k2", "k3"]
Offloaded = Literal["adam", "critic", "reference"]
EXPLORATION_PARTS = ("length", "length_code", "judge", "repetition")
REPETITION_NGRAM = 30
"""Tokens. Of MATH-500's solutions 0.8 % of the tokens stand in a run of 30 that occurred before, 5.6 % in one of 12."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    path: str
    """Hugging Face model folder or hub name of the starting policy (and of tokenizer and critic backbone)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What forward, backward and the rollout engine compute in. Master weights and Adam moments are always float32."""
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = "auto"
    """Attention over packed sequences: flash-attn, torch.nn.attention.varlen, or SDPA. auto takes the first that works."""
    layer_kernels: Literal["auto", "liger", "torch"] = "auto"
    """RMSNorm, rotary positions and gated MLP: Liger's or Hugging Face's. auto: Liger's on a GPU where it is installed."""
    compile: bool = False
    """torch.compile each decoder layer that is trained or compared with: a minute at the start. On a CPU it gains nothing."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward: about 1.3x the time, activations of one layer instead of all."""


class DataConfig(_Section):
    train: tuple[str, ...] = ()
    """Training problems: .jsonl, .json, .parquet files, `hf:NAME[:CONFIG][:SPLIT]`, `reasoning-gym:TASK?seed=0&size=99&...`."""
    validation: tuple[str, ...] = ()
    """Held-out problems, same forms. Empty: no evaluation."""
    validation_size: Count = 0
    """Use only the first this many held-out problems; 0 uses all."""
    overlap: Literal["refuse", "drop", "allow"] = "refuse"
    """What a run does when training problems or demonstrations overlap the held-out problems (docs/data.md)."""
    prompt_key: str | None = None
    """Column with the problem. Unset: problem, question, prompt or messages, the first that is there."""
    answer_key: str | None = None
    """Column with the answer. Unset: answer, ground_truth, reward_model.ground_truth or solution, the first that is there."""
    template: str | None = None
    """Prompt text with {problem} in it. Unset: the model's chat template."""
    instruction: str = ""
    """Appended to every problem, e.g. `Put the final answer in \\boxed{}.` The paper appends nothing."""
    max_prompt_length: Positive = 2048
    """Tokens."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """A prompt over the limit is dropped and counted, or stops the run before it starts."""


class RolloutConfig(_Section):
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vLLM where it imports, else transformers."""
    n: Positive = 1
    """Responses sampled per problem (K)."""
    dynamic_sampling: Literal["off", "downweight", "drop", "refill"] = "off"
    """Problems whose responses are all right or all wrong count in full, less, not, or are replaced until the batch is full."""
    sampling_weight: Annotated[float, Field(ge=0.001, le=1)] = 0.25
    """With dynamic_sampling = downweight, what such a problem counts in the losses of policy and critic; a mixed one: 1."""
    sampling_rounds: Positive = 4
    """With dynamic_sampling = refill, at most this many rounds of generation a step; then the step trains on what it has."""
    oversample: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Begin this many times batch_size problems a step, train on the first that are answered, carry the others over. 1: off."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Sampling temperature; the trainer's log-probabilities use it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the rollout and trainer distributions differ: see algorithm.tis_cap."""
    max_response_length: Positive = 4096
    """Tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the end-of-sequence token."""
    tensor_parallel_size: Positive = 1
    """Ranks that share one vLLM engine. Must divide the number of ranks."""
    max_num_seqs: Positive = 256
    """Sequences decoded at once per engine."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    """KV cache per rank, GiB. auto: what `rlsp plan` leaves. Unset: as gpu_memory_utilization says. On a CPU both are 1."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of a GPU's memory that vLLM may fill while awake. Ignored on a CPU."""
    enforce_eager: bool | Literal["auto"] = "auto"
    """No CUDA graphs and no torch.compile in vLLM: starts faster, decodes slower. auto: on a CPU."""
    sleep_level: Literal[1, 2] = 2
    """While training: 1 keeps vLLM's weights in host memory, 2 drops them (they are pushed anew anyway)."""
    max_probs_diff: Annotated[float, Field(gt=0, le=1)] | None = None
    """Limit of mean |probability in engine - in trainer| a step; unset: 0.001 (float32), 0.02 (bfloat16); off if top_p < 1."""


class RewardConfig(_Section):
    function: str | None = None
    """`path/to/file.py:compute_score`, a reward of your own (verl's signature). Unset: RLSP's reward."""
    alpha: Fraction = 0.8
    """Weight of the outcome; exploration gets 1 - alpha."""
    exploration: str = "length"
    """none, or parts joined by +: length (the paper's text) or length_code (its code), judge, repetition[:NGRAM]."""
    judge: str | None = None
    """TOML file with the judge's endpoint, model and limits. Unset: rlsp_fast/judge.toml, a vLLM server on this machine."""
    length_c: NonNegative = 1000.0
    """C of the length reward, tokens."""
    exploration_min: Annotated[float, Field(ge=-10, le=0)] = -10.0
    """Lower bound of the exploration reward, reached below C / |bound| tokens (100 at C = 1000). The paper has none."""
    no_answer: Annotated[float, Field(ge=-10, le=1)] = 0.0
    """Outcome of a response without an answer. The paper's code: -0.5."""
    verifier: Literal["strict", "lenient"] = "strict"
    """strict: the answer must be in \\boxed{}. lenient: without a box, the last answer-like expression counts."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Seconds one verification may take before its worker is killed."""

    @field_validator("exploration")
    @classmethod
    def _known_parts(cls, text: str) -> str:
        words = text.split("+") if text != "none" else []
        names = [word.partition(":")[0] for word in words]
        for word, name in zip(words, names, strict=True):
            if name not in EXPLORATION_PARTS:
                near = difflib.get_close_matches(name, ("none", *EXPLORATION_PARTS), n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
                raise ValueError(f"reward.exploration = {text!r}: want none, or parts of {EXPLORATION_PARTS} joined by +{hint}")
            if ":" in word and not re.fullmatch(r"repetition:[1-9]\d{0,3}", word):
                raise ValueError(f"reward.exploration = {text!r}: only repetition takes a number, its n-gram, 1 to 9999")
        if len(set(names)) < len(names) or {"length", "length_code"} <= set(names):
            raise ValueError(f"reward.exploration = {text!r}: want each part once, and one of length and length_code")
        return text

    @property
    def exploration_parts(self) -> tuple[str, ...]:
        """Of EXPLORATION_PARTS, those that are on."""
        return tuple(part for part in EXPLORATION_PARTS if part in re.split(r"[+:]", self.exploration))

    @property
    def repetition_ngram(self) -> int:
        """Tokens; REPETITION_NGRAM unless the recipe says `repetition:NGRAM`."""
        named = re.search(r"repetition:(\d+)", self.exploration)
        return int(named[1]) if named else REPETITION_NGRAM


class AlgorithmConfig(_Section):
    advantage: Literal["gae", "grpo", "rloo", "reinforce_plus_plus"] = "gae"
    """gae is PPO with a critic; the others need none. grpo and rloo compare the rollout.n responses of a problem."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda. The paper's code: 1.0."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the response tokens of all ranks (gae, reinforce_plus_plus)."""
    kl_coef: NonNegative = 0.05
    """KL to the reference policy, subtracted from each token's reward. 0: not computed."""
    kl_kind: KLKind = "k1"
    """Estimator of the KL in the reward."""
    kl_loss_coef: NonNegative = 0.0
    """KL to the reference policy as a term of the loss."""
    kl_loss_kind: KLKind = "k3"
    """Estimator of the KL in the loss."""
    clip_ratio_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO clips the probability ratio below at 1 - this."""
    clip_ratio_high: Annotated[float, Field(gt=0)] = 0.2
    """PPO clips the probability ratio above at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """With a negative advantage the objective is bounded by this times the advantage (usually 3). Unset: off."""
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """The critic's new value is clipped to within this of the old one. `none`: off."""
    entropy_coef: NonNegative = 0.0
    """Entropy bonus in the policy loss."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    """Mean over tokens; mean over sequences of their token means; or token sum over sequences times the length limit."""
    tis_cap: Annotated[float, Field(ge=1)] | None = None
    """Truncated importance sampling: weight each token by min(exp(old - rollout logprob), cap). Unset: off."""


class OptimConfig(_Section):
    actor_lr: Rate = 2e-7
    """Peak learning rate of the policy."""
    critic_lr: Rate = 2e-6
    """Peak learning rate of the critic."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After warm-up, the learning rate falls to min_lr_ratio of its peak."""
    warmup_ratio: Fraction = 0.03
    """Share of all optimizer steps in which the learning rate rises from 0."""
    min_lr_ratio: Fraction = 0.1
    """Last learning rate over peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's two averages."""
    weight_decay: NonNegative = 0.0
    """AdamW, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled to at most this norm, over all ranks."""


class TrainConfig(_Section):
    steps: Count = 200
    """RL steps: generate, score, train. 0: none."""
    batch_size: Positive = 512
    """Problems per step, over all ranks."""
    mini_batch_size: Positive = 128
    """Problems per optimizer update; divides batch_size."""
    epochs: Positive = 1
    """Passes over a step's rollouts."""
    critic_warmup_steps: Count = 4
    """First steps in which only the critic learns."""
    max_tokens_per_micro_batch: Positive | Literal["auto"] = 16384
    """Packed tokens per forward and backward on one rank, at least the longest prompt + response. auto: as the plan says."""
    offload: tuple[Offloaded, ...] | Literal["auto"] = "auto"
    """In host memory while vLLM generates: adam (its moments), critic, reference. auto: what the plan needs; none on a CPU."""
    max_memory_growth_gib: Annotated[float, Field(gt=0)] | None = 2.0
    """Stops the run when the least memory of a step grows by more than this over 20 steps, with a table. `none`: off."""
    fsdp_shard_size: Count = 0
    """Ranks that share one copy of the weights; more ranks hold replicas (HSDP). 0: all ranks share one."""
    seed: Count = 0
    """Of everything random: data order and sampling."""
    monitors: str | None = None
    """TOML file of behaviours to count and detectors that warn or stop, laid over the shipped one. docs/monitors.md."""


class SFTConfig(_Section):
    train: tuple[str, ...] = ()
    """Demonstrations: files with a prompt column and `response` (or `solution`, or an assistant's last message)."""
    validation: tuple[str, ...] = ()
    """Demonstrations for the validation loss."""
    steps: Count = 0
    """Optimizer steps; 0 with epochs = 0 means no SFT."""
    epochs: NonNegative = 0
    """Passes over the demonstrations, used when steps is 0. The paper: 5."""
    batch_size: Positive = 64
    """Demonstrations per step, over all ranks."""
    lr: Rate = 2e-5
    """Peak learning rate."""
    max_length: Positive = 8192
    """Tokens of prompt + response; longer demonstrations are dropped and counted."""


class OutputConfig(_Section):
    dir: str = "outputs/run"
    """Everything a run writes goes here."""
    save_every: Count = 50
    """Steps between checkpoints (resumable state and a Hugging Face folder). The last step is always saved. 0: only that."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest complete checkpoint in dir; never refuses to start in a folder that has one."""
    eval_every: Count = 0
    """Steps between evaluations. 0: only before and after."""
    rollouts_every: Count = 1
    """Every this many steps all rollouts are written to rollouts/step_N.jsonl. 0: never."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] | None = None
    """Besides metrics.jsonl, always written. Unset: tensorboard when it is installed. The W&B project is `rlsp_fast`."""


class Config(_Section):
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        t, r, a = self.train, self.rollout, self.algorithm
        if t.batch_size % t.mini_batch_size:
            divisors = [d for d in range(1, t.batch_size + 1) if t.batch_size % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - t.mini_batch_size))
            raise ValueError(
                f"train.mini_batch_size = {t.mini_batch_size} does not divide train.batch_size = {t.batch_size}; "
                f"the nearest that does is {nearest}"
            )
        if a.advantage in ("grpo", "rloo") and r.n < 2:
            raise ValueError(
                f"algorithm.advantage = {a.advantage} compares the responses of one problem: want rollout.n >= 2, got {r.n}"
            )
        if r.dynamic_sampling != "off" and r.n < 2:
            raise ValueError(
                f"rollout.dynamic_sampling = {r.dynamic_sampling} looks for problems whose responses all fare alike, and one "
                f"alone always does: want rollout.n >= 2, got {r.n}"
            )
        if r.oversample > 1 and r.dynamic_sampling == "refill":
            raise ValueError(
                f"rollout.oversample = {r.oversample:g} ends a step before all are answered, rollout.dynamic_sampling = refill "
                f"goes on until enough are mixed: set rollout.oversample=1, or rollout.dynamic_sampling=drop"
            )
        longest = self.data.max_prompt_length + r.max_response_length
        budget = math.inf if t.max_tokens_per_micro_batch == "auto" else t.max_tokens_per_micro_batch
        if t.steps and longest > budget:
            raise ValueError(
                f"train.max_tokens_per_micro_batch = {t.max_tokens_per_micro_batch} cannot hold one sequence of "
                f"data.max_prompt_length + rollout.max_response_length = {longest} tokens"
            )
        if t.steps and not self.data.train:
            raise ValueError("data.train is empty: name the training problems, or set train.steps=0")
        if (self.sft.steps or self.sft.epochs) and not self.sft.train:
            raise ValueError("sft.train is empty: name the demonstrations, or set sft.steps=0 and sft.epochs=0")
        if self.wants_sft and self.sft.max_length > budget:
            raise ValueError(
                f"train.max_tokens_per_micro_batch = {self.train.max_tokens_per_micro_batch} cannot hold one demonstration of "
                f"sft.max_length = {self.sft.max_length} tokens"
            )
        if self.data.template is not None and "{problem}" not in self.data.template:
            raise ValueError(f"data.template must contain {{problem}}, got {self.data.template!r}")
        return self

    @property
    def wants_sft(self) -> bool:
        return bool(self.sft.steps or self.sft.epochs)


class ConfigError(ValueError):
    """A recipe or override that cannot be used; the message names the key and the fix."""


def leaf_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the tree with its pydantic field, in order."""
    keys: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys |= leaf_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = info
    return keys


def recipe_path(recipe: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships (`demo`)."""
    shipped = Path(str(files("rlsp_fast") / "recipes"))
    for path in (Path(recipe), shipped / f"{recipe}.toml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in shipped.glob("*.toml"))
    near = difflib.get_close_matches(Path(recipe).stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"no recipe {recipe!r}: neither a file nor a shipped recipe; {hint}shipped: {', '.join(names)}")


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a recipe file, applies `dotted.key=value` overrides and checks the result.

    Raises:
        ConfigError: naming the key, the value and the nearest valid key.
    """
    path = recipe_path(recipe)
    try:
        text = path.read_text()
        tree = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: want sections such as [model] and [train], got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return check(tree, str(path))


def check(tree: dict[str, Any], where: str = "config") -> Config:
    """The typed config of a nested dict, or a ConfigError that lists everything wrong with it."""
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        errors = error.errors()
        with_auto = {e["loc"][:2] for e in errors if _OR_AUTO in e["loc"]}  # said with what else the key may be
        lines = [_explain(e, e["loc"][:2] in with_auto) for e in errors if _OR_AUTO not in e["loc"]]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.removeprefix("--")
    if not equals:
        raise ConfigError(f"want dotted.key=value, got {override!r}")
    if key not in leaf_keys():
        raise ConfigError(f"unknown key {key!r} (value {text!r}){_nearest(key)}")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{section} must be a section of keys, got {node!r}")
    node[last] = _value(text, leaf_keys()[key].annotation)


def _value(text: str, annotation: Any) -> Any:
    """A command-line word as what TOML would hold: 3, 1e-4, true, ["a", "b"], null; a plain word is a string."""
    if annotation is str or annotation == str | None and text.lower() not in ("none", "null"):
        return text
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text == "auto":
        return text
    if "tuple" in str(annotation) and not text.startswith("["):
        # a source such as reasoning-gym:TASK?operators=["+","-"] has commas of its own
        parts = [part for part in re.split(r",(?![^\[]*\])", text) if part]
        return [_value(part, float) for part in parts] if "float" in str(annotation) else parts
    for parse in (int, float, json.loads):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _nearest(key: str) -> str:
    keys = list(leaf_keys())
    if "." not in key:
        sections = difflib.get_close_matches(key, list(Config.model_fields), n=1, cutoff=0.7)
        if sections and sections[0] != key and not any(k.endswith("." + key) for k in keys):
            return f"; did you mean [{sections[0]}]?"
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    best = same_leaf or near or difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], n=1)
    if best and "." not in best[0]:
        best = [k for k in keys if k.endswith("." + best[0])]
    return f"; did you mean {best[0]}?" if best else "; `rlsp config` lists every key"


_OR_AUTO = "literal['auto']"  # where pydantic says that a value is not the other thing that it may be


def _explain(error: Any, or_auto: bool) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r} (value {error['input']!r}){_nearest(key)}"
    if error["type"] == "missing":
        if key in Config.model_fields:
            return f"section [{key}] is required: it names the model, e.g. {key}.path=/models/my-model"
        parent = key.rpartition(".")[0]
        return f"{parent} has too few values. {_doc(parent)}" if parent in leaf_keys() else f"{key} is required: {_doc(key)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    key = next((k for k in leaf_keys() if key == k or key.startswith(k + ".")), key)
    message = error["msg"].removeprefix("Input should be ") + (" or 'auto'" if or_auto else "")
    return f"{key} = {error['input']!r}: want {message}. {_doc(key)}".rstrip()


def _doc(key: str) -> str:
    info = leaf_keys().get(key)
    return info.description if info is not None and info.description else ""


def dump(config: Config) -> str:
    """The resolved config as TOML that `load` reads back."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def reference() -> str:
    """Every key with type, default and docstring, as Markdown: docs/config.md is made from it."""
    lines, section = [], None
    for key, info in leaf_keys().items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"## {section}", "", "| key | default | meaning |", "| --- | --- | --- |"]
        default = "required" if info.is_required() else json.dumps(info.default)
        lines.append(f"| `{key}` | `{default}` | {info.description} |")
    return "\n".join(lines).strip() + "\n"
