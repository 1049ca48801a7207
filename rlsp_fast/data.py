"""Problems and demonstrations: from files, Hugging Face datasets and generators to token ids. No torch.

A source is a .jsonl, .json or .parquet file, `hf:NAME[:CONFIG][:SPLIT]` (hub name or local folder, split `train` unless
named) or `reasoning-gym:TASK?key=value&...`. A mistake in one is a DataError that names the file, the row and the fix.
"""

import dataclasses
import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from pyarrow import parquet

from rlsp_fast.config import DataConfig
from rlsp_fast.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_KEYS = ("problem", "question", "prompt", "messages")
ANSWER_KEYS = ("answer", "ground_truth", "reward_model.ground_truth", "solution")
RESPONSE_KEYS = ("response", "completion", "solution", "answer")
SUFFIXES = (".jsonl", ".json", ".parquet")
HUB, GYM = "hf:", "reasoning-gym:"
# reasoning-gym makes item i of seed s from s + i, so seeds 0 and 1 give nearly the same problems: a train and a
# validation set that differ in the seed alone would overlap. Seeds this far apart do not, up to this many problems.
GYM_SEED_STRIDE = 1_000_000

Row = dict[str, Any]
Messages = tuple[dict[str, str], ...]
Item = TypeVar("Item")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the row and the fix."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One worked problem to imitate."""

    messages: Messages
    """The prompt, as in Problem: the last message is the user's."""
    response: str
    """What the model shall answer, without the end-of-sequence token."""
    source: str
    """Where it comes from: `file.jsonl`, or the source as configured where two files share a name."""
    index: int
    """Row in its source, from 0."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """A row as it stands in its source, and the problem in it."""

    row: Row
    text: str
    """Of the user's last message."""
    source: str
    """As Demonstration.source."""
    index: int
    """Row in its source, from 0."""


def load_rows(sources: Sequence[str], data: DataConfig) -> list[SourceRow]:
    """Reads problems or demonstrations as rows, in order; an answer or response is not asked for.

    Raises:
        DataError: as load_demonstrations, for whatever cannot be read or lacks a problem.
    """
    found = []
    for source, label in zip(sources, _labels(sources), strict=True):
        for index, row in _rows(source):
            _, messages = _shown_prompt(row, _at(source, index), data)
            found.append(SourceRow(row=row, text=messages[-1]["content"], source=label, index=index))
    return found


def load_problems(sources: Sequence[str], data: DataConfig) -> list[Problem]:
    """Reads problems with their answers, in order.

    The problem is the first of PROMPT_KEYS that a row has, the answer the first of ANSWER_KEYS; data.prompt_key and
    data.answer_key (dotted for nested columns) replace that for files and datasets. Of an answer that ends in GSM8K's
    `#### 42` the number is kept, of one with a complete \\boxed{} the content of its last box; numbers become strings.
    Problem.extra is the row's `extra_info`, or else its remaining columns. Rows that share a `data_source` are numbered
    through all sources.

    Raises:
        DataError: naming source and row, for whatever cannot be read or lacks a problem or an answer.
    """
    problems, numbers = [], defaultdict(count)
    for source, label in zip(sources, _labels(sources), strict=True):
        generated = source.startswith(GYM)
        for index, row in _rows(source):
            at, named = _at(source, index), str(row.get("data_source") or "")
            prompt_key, prompt = _find(row, at, "prompt", PROMPT_KEYS, None if generated else data.prompt_key)
            answer_key, answer = _find(row, at, "answer", ANSWER_KEYS, None if generated else data.answer_key)
            extra = row.get("extra_info")
            if not isinstance(extra, dict):
                extra = {key: value for key, value in row.items() if key not in (prompt_key, answer_key)}
            problems.append(
                Problem(
                    messages=_messages(prompt, at, prompt_key, data.instruction),
                    answer=_answer(answer, at, answer_key, needs_box=answer_key == "solution" != data.answer_key),
                    source=named or label,
                    index=next(numbers[named]) if named else index,
                    extra=extra,
                )
            )
    return problems


def load_demonstrations(sources: Sequence[str], data: DataConfig) -> list[Demonstration]:
    """Reads demonstrations, in order.

    The response is the last of a row's `messages` if that is the assistant's, else the first of RESPONSE_KEYS (whole:
    of GSM8K the worked answer). The prompt is made as for problems, instruction included; data.prompt_key counts where
    a row has it, since demonstrations and problems may come from different files.

    Raises:
        DataError: as load_problems.
    """
    demonstrations = []
    for source, label in zip(sources, _labels(sources), strict=True):
        for index, row in _rows(source):
            at = _at(source, index)
            chat, messages = _shown_prompt(row, at, data)
            response_key, response = ("messages", chat) if chat else _find(row, at, "response", RESPONSE_KEYS)
            demonstrations.append(
                Demonstration(
                    messages=messages,
                    response=_text(response, at, response_key),
                    source=label,
                    index=index,
                )
            )
    return demonstrations


def render(problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> tuple[list[Problem], int]:
    """Fills prompt_ids by data.template, with the tokenizer's BOS if it adds one, or else by the chat template.

    Returns:
        The problems of at most data.max_prompt_length tokens, in order, and how many longer ones were dropped.

    Raises:
        DataError: no chat template and no data.template; a row the template refuses; a prompt over the limit when
            data.overlong_prompts is `error`; or every prompt over it.

    Cost: batched tokenizer calls, threaded by the tokenizers library.
    """
    kept, prompts = [], _prompt_ids(problems, tokenizer, data)
    for problem, ids in zip(problems, prompts, strict=True):
        if len(ids) <= data.max_prompt_length:
            kept.append(dataclasses.replace(problem, prompt_ids=tuple(ids)))
        elif data.overlong_prompts == "error":
            raise DataError(
                f"{_at(problem.source, problem.index)}: a prompt of {len(ids)} tokens, data.max_prompt_length = "
                f"{data.max_prompt_length}: {problem.messages[-1]['content'][:60]!r}; raise the limit, drop the row, "
                "or set data.overlong_prompts = 'drop'"
            )
    if problems and not kept:
        limit, shortest = data.max_prompt_length, min(map(len, prompts))
        raise DataError(f"data.max_prompt_length = {limit} drops every prompt: the shortest has {shortest} tokens")
    return kept, len(problems) - len(kept)


def render_demonstrations(
    demonstrations: Sequence[Demonstration], tokenizer: "PreTrainedTokenizerBase", data: DataConfig, max_length: int
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Token ids of prompt (as `render` makes it) and response (ends with the end-of-sequence token, once).

    Returns:
        (prompt_ids, response_ids) of each demonstration of at most max_length tokens, and how many were dropped.

    Raises:
        DataError: as `render`; no end-of-sequence token; every demonstration over max_length.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos_token, so a response could not end: set it in tokenizer_config.json")
    prompts = _prompt_ids(demonstrations, tokenizer, data)
    responses = _token_ids([d.response for d in demonstrations], tokenizer)
    pairs = [
        (tuple(prompt), tuple(response) if response[-1:] == [eos] else (*response, eos))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= max_length]
    if pairs and not kept:
        shortest = min(len(prompt) + len(response) for prompt, response in pairs)
        raise DataError(f"sft.max_length = {max_length} drops every demonstration: the shortest has {shortest} tokens")
    return kept, len(pairs) - len(kept)


def batch(items: Sequence[Item], *, seed: int, start: int, size: int) -> list[Item]:
    """One step's items: positions [start, start + size) of epochs laid end to end.

    Each epoch is a permutation of its own, drawn from (seed, epoch). Nothing is remembered between steps: a resumed
    run, and every rank, gets the same items from the same arguments.

    Args:
        items: problems or demonstrations.
        start: from 0.
        size: may exceed len(items). A batch across the border of two epochs may hold an item twice.

    Raises:
        DataError: no items.

    Cost: O(len(items) + size), whatever the start.
    """
    if not items:
        raise DataError("want at least one item to draw a batch from, got none")
    n = len(items)
    epochs = range(start // n, (start + size - 1) // n + 1)
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in epochs}
    return [items[order[at // n][at % n]] for at in range(start, start + size)]


# Sources


def _rows(source: str) -> Iterator[tuple[int, Row]]:
    """(index, row) of a source, from 0; of a .jsonl file the index is the line's."""
    read = _read_gym if source.startswith(GYM) else _read_hub if source.startswith(HUB) else _read_file
    index = None
    for index, row in read(source):
        if not isinstance(row, dict):
            raise DataError(f"{_at(source, index)}: want an object of columns, got {json.dumps(row)[:60]}")
        yield index, row
    if index is None:
        raise DataError(f"{source} is empty: it has no rows")


def _read_file(source: str) -> Iterable[tuple[int, Any]]:
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source}: want a {', '.join(SUFFIXES)} file, {HUB}NAME[:SPLIT] or {GYM}TASK?key=value")
    if not path.is_file():
        near = _nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{source}: no such file{near}")
    try:
        if path.suffix == ".parquet":
            return enumerate(parquet.ParquetFile(path).read().to_pylist())
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        return enumerate(_json(content, source))
    lines = enumerate(content.split(b"\n"))
    return ((index, _json(line, _at(source, index))) for index, line in lines if line.strip())


def _json(content: bytes, at: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{at} is not JSON (want an object a line, or a list of objects): {error}") from None


def _read_hub(source: str) -> Iterable[tuple[int, Row]]:
    import datasets  # here, since it takes a second

    parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))  # not at the colon of `train[:100]`
    name, *config, split = parts if len(parts) > 1 else (*parts, "train")
    try:
        if len(parts) == 1 and (Path(name) / "state.json").is_file():  # of save_to_disk, which load_dataset refuses
            return enumerate(datasets.load_from_disk(name).to_list())
        return enumerate(datasets.load_dataset(name, *config, split=split).to_list())
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        want = f"{HUB}NAME[:CONFIG][:SPLIT] with a dataset on the hub or a local folder"
        raise DataError(f"{source}: {error.__cause__ or error}; want {want}") from None


def _read_gym(source: str) -> Iterable[tuple[int, Row]]:
    import reasoning_gym  # here, since it takes a second
    from reasoning_gym.factory import DATASETS

    task, _, query = source.removeprefix(GYM).partition("?")
    if task not in DATASETS:
        raise DataError(f"{source}: reasoning-gym has no task {task!r}{_nearest(task, DATASETS)}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    params = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        if key not in known or not equals:
            near = _nearest(key, known)
            raise DataError(f"{source}: want key=value, got {pair!r}{near}; {task} has {', '.join(known)}")
        try:
            params[key] = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            params[key] = text
    if not isinstance(params.get("seed"), int):
        raise DataError(f"{source}: add seed=0 (held-out problems: seed=1), so that every run has the same ones")
    try:
        items = list(reasoning_gym.create_dataset(task, **params | {"seed": params["seed"] * GYM_SEED_STRIDE}))
    except (AssertionError, TypeError, ValueError) as error:  # how its tasks refuse a value
        raise DataError(f"{source}: {task} refuses these parameters: {error}") from None
    return enumerate({"question": i["question"], "answer": i["answer"], "extra_info": i["metadata"]} for i in items)


def _labels(sources: Sequence[str]) -> list[str]:
    """Problem.source per source: file, dataset or task name; the source as it stands where two would share that."""
    short = [s.split("?")[0] if s.startswith((HUB, GYM)) else Path(s).name for s in sources]
    return [source if short.count(label) > 1 else label for source, label in zip(sources, short, strict=True)]


def _at(source: str, index: int) -> str:
    return f"{source} {'line' if source.endswith('.jsonl') else 'row'} {index + 1}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# Columns


def _shown_prompt(row: Row, at: str, data: DataConfig) -> tuple[Any, Messages]:
    """The assistant's message that ends a row's `messages` (None without one), and the prompt before it or of its own."""
    chat = row.get("messages")
    if isinstance(chat, list) and chat and _role(chat[-1]) == "assistant":
        return chat[-1], _messages(chat[:-1], at, "messages", data.instruction)
    key, prompt = _find(row, at, "prompt", ((data.prompt_key,) if data.prompt_key else ()) + PROMPT_KEYS)
    return None, _messages(prompt, at, key, data.instruction)


def _find(row: Row, at: str, what: str, keys: Sequence[str], wanted: str | None = None) -> tuple[str, Any]:
    """(column, value) of the wanted column, or of the first of `keys` that the row has; null counts as absent."""
    for key in (wanted,) if wanted else keys:
        value = _get(row, key)
        if value is not None and value == value:  # NaN is how pandas writes null
            return key, value
    columns = _columns(row)
    near = _nearest(wanted, columns) if wanted and wanted not in columns else ""
    fix = "name one of them response" if what == "response" else f"set data.{what}_key to one of them"
    where = wanted or ", ".join(keys)
    raise DataError(f"{at}: no {what} in {where}{near}; its columns: {', '.join(columns)}; {fix}, or drop the row")


def _get(row: Row, key: str) -> Any:
    """The value of a column, or of a field in it (`reward_model.ground_truth`); None without one."""
    value = row
    for part in (key,) if key in row else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _columns(row: Row) -> list[str]:
    nested = ((key, _columns(value) if isinstance(value, dict) else ()) for key, value in row.items())
    return [name for key, fields in nested for name in ([f"{key}.{field}" for field in fields] or [key])]


def _messages(value: Any, at: str, key: str, instruction: str) -> Messages:
    if not isinstance(value, list):
        value = [{"role": "user", "content": value}]
    if not value or not all(_role(message) for message in value):
        raise DataError(f'{at}: want text or a list of {{"role": ..., "content": ...}} messages in {key}')
    if value[-1]["role"] != "user":
        raise DataError(f"{at}: want the user's message last in {key}, got the {value[-1]['role']}'s")
    messages = [{"role": m["role"], "content": _text(m.get("content"), at, key)} for m in value]
    if instruction:
        messages[-1]["content"] += "\n" + instruction
    return tuple(messages)


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


def _text(value: Any, at: str, key: str) -> str:
    """A cell as text: a number is spelled out, a list of one is its item, an assistant's message its content."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if _role(value) == "assistant":
        value = value.get("content")
    if isinstance(value, int | float | Decimal):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{at}: want text in {key}, got {type(value).__name__} {json.dumps(value, default=str)[:60]}")
    if not value.strip():
        raise DataError(f"{at}: {key} is empty; fill it in or drop the row")
    return value


def _answer(value: Any, at: str, key: str, needs_box: bool) -> str:
    text = _text(value, at, key).strip()
    if marked := re.search(r"^#### +(\S.*)\Z", text, re.MULTILINE):  # GSM8K
        return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", marked[1])  # 1,450,000 -> 1450000
    box = _last_box(text)
    if box is None and needs_box:
        raise DataError(f"{at}: no complete \\boxed{{}} in {key}; set data.answer_key, or drop the row")
    return _text(text if box is None else box, at, f"the \\boxed{{}} of {key}").strip()


def _last_box(text: str) -> str | None:
    """The content of the last \\boxed{} whose braces close."""
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[box.end() :], re.DOTALL):  # \{ and \} open and close nothing
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[box.end() :][: brace.start()]
    return None


# Token ids


def _prompt_ids(
    items: Sequence[Problem | Demonstration], tokenizer: "PreTrainedTokenizerBase", data: DataConfig
) -> list[list[int]]:
    if data.template is None:
        if tokenizer.chat_template is None:
            raise DataError("the model has no chat template: set data.template, such as 'Problem: {problem}'")
        return _token_ids([_chat_text(item, tokenizer) for item in items], tokenizer)
    for item in items:
        if len(item.messages) > 1:
            at, num = _at(item.source, item.index), len(item.messages)
            raise DataError(f"{at}: {num} messages, data.template has room for one; unset it to use the chat template")
    texts = [data.template.replace("{problem}", item.messages[-1]["content"]) for item in items]
    prompts = _token_ids(texts, tokenizer)
    # The BOS that the tokenizer itself adds, but no EOS, which some add too, and no second BOS after a template's own.
    bos = tokenizer("")["input_ids"][:1]
    if bos != [tokenizer.bos_token_id]:
        return prompts
    return [ids if ids[:1] == bos else bos + ids for ids in prompts]


def _chat_text(item: Problem | Demonstration, tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.apply_chat_template(list(item.messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # such as a template without a system role
        raise DataError(f"{_at(item.source, item.index)}: the chat template refuses these messages: {error}") from None


def _token_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """No special tokens but those that the text spells."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), 1024):  # calls large enough to keep every core busy, small enough for memory:
        part = texts[start : start + 1024]  # until it returns, a call holds about 100 bytes a token
        ids += tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids
