"""Sources, prompts and batches: real files, real generators, and a real tokenizer of one token per byte."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlsp_fast.config import DataConfig
from rlsp_fast.data import (
    DataError,
    Demonstration,
    batch,
    load_demonstrations,
    load_problems,
    render,
    render_demonstrations,
)
from rlsp_fast.types import Problem

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHAT
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1 = ?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 7},
}
SUM = {"problem": "1 + 1 = ?", "answer": "2"}


def byte_tokenizer(chat_template=CHAT, specials="$A", eos="<eos>"):
    """Token ids are bytes, so that decoding gives back the text; `specials` is what it adds: `<bos> $A`, or nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=specials, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, chat_template=chat_template)


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problem(text="1 + 1 = ?", *before, **fields):
    messages = tuple({"role": role, "content": content} for role, content in (*before, ("user", text)))
    return Problem(**({"messages": messages, "answer": "2", "source": "sums.jsonl", "index": 0} | fields))


def demonstration(text, response):
    return Demonstration(messages=({"role": "user", "content": text},), response=response, source="sums.jsonl", index=0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# Files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_file_format_gives_the_same_problems(tmp_path, name):
    first, second = load_problems([write(tmp_path / name, [SUM, {"problem": "2 + 2 = ?", "answer": "4"}])], DataConfig())
    assert second.messages == ({"role": "user", "content": "2 + 2 = ?"},)
    assert (first.answer, second.answer) == ("2", "4")
    assert (second.source, second.index, second.extra) == (name, 1, {})


@pytest.mark.parametrize("content", [b' [{"problem": "p", "answer": "1"}]', b'\n{"problem": "p", "answer": "1"}\n\n'])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_a_json_file_may_be_a_list_or_hold_an_object_a_line(tmp_path, mark, content):
    (tmp_path / "a.json").write_bytes(mark + content)
    assert [p.answer for p in load_problems([str(tmp_path / "a.json")], DataConfig())] == ["1"]


@pytest.mark.parametrize("column", ["problem", "question", "prompt", "messages"])
def test_each_usual_prompt_column_is_found(tmp_path, column):
    value = [{"role": "user", "content": "1 + 1 = ?"}] if column == "messages" else "1 + 1 = ?"
    (found,) = load_problems([write(tmp_path / "a.jsonl", [{column: value, "answer": "2"}])], DataConfig())
    assert found.messages == problem().messages


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"answer": "2"}, "2"),
        ({"ground_truth": " 2 "}, "2"),
        ({"reward_model": {"ground_truth": "2"}, "solution": "It is \\boxed{3}."}, "2"),
        ({"answer": 42}, "42"),
        ({"answer": 42.0}, "42.0"),
        ({"answer": ["2"]}, "2"),
        ({"answer": None, "ground_truth": "2"}, "2"),
        ({"answer": float("nan"), "ground_truth": "2"}, "2"),
        ({"answer": "1,234"}, "1,234"),  # may be two numbers: only the verifier can tell
        ({"answer": "48/2 = <<48/2=24>>24\n#### 24"}, "24"),
        ({"answer": "So much.\n#### 1,450,000\n"}, "1450000"),
        ({"answer": "Two.\n#### (1,2000)"}, "(1,2000)"),
        ({"answer": "#####\n#..X#\n#####"}, "#####\n#..X#\n#####"),  # a maze
        ({"solution": "First \\boxed{1}, so \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}"),
        ({"solution": "\\boxed{\\left\\{1, 2\\right.}"}, "\\left\\{1, 2\\right."),
        ({"solution": "$\\fbox {C}$"}, "C"),
        ({"solution": "\\boxed{7}, and cut off: \\boxed{\\frac{1}{"}, "7"),
    ],
)
def test_the_answer_is_taken_from(tmp_path, row, answer):
    (found,) = load_problems([write(tmp_path / "a.jsonl", [{"problem": "?"} | row])], DataConfig())
    assert found.answer == answer


def test_verl_rows_keep_messages_data_source_and_extra_info(tmp_path):
    (found,) = load_problems([write(tmp_path / "train.parquet", [VERL])], DataConfig(instruction="Box it."))
    assert found == Problem(
        messages=({"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1 = ?\nBox it."}),
        answer="2",
        source="openai/gsm8k",
        index=0,
        extra={"split": "train", "index": 7},
    )


def test_remaining_columns_become_extra_without_extra_info(tmp_path):
    (found,) = load_problems([write(tmp_path / "a.jsonl", [SUM | {"level": 5}])], DataConfig())
    assert found.extra == {"level": 5}


def test_source_and_index_name_one_problem(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    files = [write(tmp_path / name, [SUM, SUM]) for name in ("x/a.jsonl", "y/a.jsonl", "b.jsonl")]
    files += [write(tmp_path / name, [VERL, VERL]) for name in ("0.parquet", "1.parquet")]
    names = [(p.source, p.index) for p in load_problems(files, DataConfig())]
    assert names[:2] == [(files[0], 0), (files[0], 1)] and names[4:6] == [("b.jsonl", 0), ("b.jsonl", 1)]
    assert names[6:] == [("openai/gsm8k", i) for i in range(4)]
    assert len(set(names)) == len(names)


def test_configured_keys_win_and_may_be_dotted(tmp_path):
    row = SUM | {"task": {"text": "2 + 2 = ?", "gold": "4"}, "a.b": "dot"}
    path = write(tmp_path / "a.parquet", [row])
    (found,) = load_problems([path], DataConfig(prompt_key="task.text", answer_key="task.gold"))
    assert (found.messages[0]["content"], found.answer) == ("2 + 2 = ?", "4")
    (found,) = load_problems([path], DataConfig(prompt_key="a.b"))
    assert found.messages[0]["content"] == "dot"


def test_a_solution_named_by_the_user_needs_no_box(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "?", "solution": "34"}])
    assert load_problems([path], DataConfig(answer_key="solution"))[0].answer == "34"


# Datasets and generators


def test_hub_sources_read_local_folders_with_train_as_the_usual_split(tmp_path):
    write(tmp_path / "train.jsonl", [SUM])
    write(tmp_path / "test.jsonl", [SUM | {"answer": "two"}, SUM])
    assert [p.answer for p in load_problems([f"hf:{tmp_path}"], DataConfig())] == ["2"]
    found = load_problems([f"hf:{tmp_path}:default:test"], DataConfig())
    assert [p.answer for p in found] == ["two", "2"] and found[1].index == 1
    assert len(load_problems([f"hf:{tmp_path}:test[:1]"], DataConfig())) == 1


def test_hub_sources_read_what_save_to_disk_wrote(tmp_path):
    datasets.Dataset.from_list([VERL]).save_to_disk(tmp_path / "saved")
    (found,) = load_problems([f"hf:{tmp_path}/saved"], DataConfig())
    assert (found.answer, found.extra) == ("2", VERL["extra_info"])


def test_generated_problems_are_those_of_reasoning_gym_with_typed_parameters():
    source = "reasoning-gym:chain_sum?size=20&seed=3&min_terms=3&max_terms=3&min_digits=2&allow_negation=False"
    found = load_problems([source], DataConfig(prompt_key="text", answer_key="gold"))
    assert len(found) == 20 and found[4].source == "reasoning-gym:chain_sum" and found[4].index == 4
    for one in found:
        expression = one.extra["expression"]
        assert re.fullmatch(r"\d{2,4}( [+-] \d{2,4}){2}", expression) and expression in one.messages[0]["content"]
        assert eval(expression) == int(one.answer)
    assert found == load_problems([source], DataConfig())


def test_generated_problems_of_neighbouring_seeds_do_not_overlap():
    sources = [f"reasoning-gym:chain_sum?size=200&seed={seed}&min_terms=5" for seed in (0, 1)]
    train, held_out = ({p.messages[0]["content"] for p in load_problems([s], DataConfig())} for s in sources)
    assert len(train) == 200 and not train & held_out


def test_a_list_valued_generator_parameter_is_json():
    (found,) = load_problems(['reasoning-gym:basic_arithmetic?size=1&seed=0&operators=["+"]'], DataConfig())
    assert "+" in found.messages[0]["content"] and not set("*/") & set(found.extra["expression"])


# What is refused


def refusal(sources, data=None, load=load_problems):
    with pytest.raises(DataError) as caught:
        load(sources, data or DataConfig())
    return str(caught.value)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "is empty: it has no rows"),
        ("\n\n", "is empty: it has no rows"),
        ('\n{"problem": "p"', "line 2 is not JSON (want an object a line, or a list of objects): Expecting ',' del"),
        ("[1, 2]", "line 1: want an object of columns, got [1, 2]"),
        ('{"text": "p"}', "line 1: no prompt in problem, question, prompt, messages; its columns: text"),
        ('{"problem": "p", "gold": 1}', "no answer in answer, ground_truth, reward_model.ground_truth, solution"),
        ('{"problem": "p", "answer": null}', "its columns: problem, answer; set data.answer_key to one of them"),
        ('{"problem": "p", "answer": " "}', "line 1: answer is empty; fill it in or drop the row"),
        ('{"problem": "", "answer": 1}', "line 1: problem is empty"),
        ('{"problem": {"a": 1}, "answer": 1}', 'line 1: want text in problem, got dict {"a": 1}'),
        ('{"problem": "p", "answer": ["1", "2"]}', 'line 1: want text in answer, got list ["1", "2"]'),
        ('{"problem": "p", "solution": "\\\\boxed{1"}', "no complete \\boxed{} in solution; set data.answer_key"),
        ('{"problem": "p", "solution": "\\\\boxed{ }"}', "line 1: the \\boxed{} of solution is empty"),
        ('{"messages": [], "answer": 1}', 'line 1: want text or a list of {"role": ..., "content": ...} messages'),
        ('{"messages": ["hi"], "answer": 1}', 'line 1: want text or a list of {"role": ..., "content": ...} messages'),
        ('{"messages": [{"role": "assistant"}], "answer": 1}', "want the user's message last in messages"),
        ('{"messages": [{"role": "user", "content": null}], "answer": 1}', "want text in messages, got NoneType null"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_file(tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    text = refusal([str(tmp_path / "bad.jsonl")])
    assert text.startswith(str(tmp_path / "bad.jsonl")) and message in text


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(SUM).encode() + b'\n{"problem": "caf\xe9", "answer": 1}\n')
    assert "bad.jsonl line 2 is not JSON" in refusal([str(tmp_path / "bad.jsonl")])


def test_a_bad_row_of_parquet_is_numbered_from_1(tmp_path):
    path = write(tmp_path / "a.parquet", [SUM, SUM | {"answer": ""}])
    assert refusal([path]) == f"{path} row 2: answer is empty; fill it in or drop the row"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b'{"problem": "p"}'])
def test_a_broken_parquet_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    assert refusal([str(tmp_path / "a.parquet")]).startswith(f"{tmp_path}/a.parquet cannot be read: ")


def test_a_missing_file_brings_up_its_nearest_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", [SUM])
    assert refusal([f"{tmp_path}/trian.jsonl"]) == f"{tmp_path}/trian.jsonl: no such file; did you mean train.jsonl?"
    assert refusal([f"{tmp_path}/nowhere/a.json"]) == f"{tmp_path}/nowhere/a.json: no such file"
    assert "want a .jsonl, .json, .parquet file, hf:NAME" in refusal([f"{tmp_path}/a.csv"])


def test_a_wrong_key_lists_the_columns_and_the_nearest(tmp_path):
    path = write(tmp_path / "a.parquet", [VERL])
    text = refusal([path], DataConfig(answer_key="reward_model.groundtruth"))
    assert text.startswith(f"{path} row 1: no answer in reward_model.groundtruth; did you mean reward_model.ground_truth?")
    assert "its columns: data_source, prompt, ability, reward_model.style, reward_model.ground_truth" in text
    assert "no prompt in promt; did you mean prompt?" in refusal([path], DataConfig(prompt_key="promt"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("chain_sums?seed=0", "has no task 'chain_sums'; did you mean chain_sum?"),
        ("chain_sum?seed=0&sise=5", "got 'sise=5'; did you mean size?; chain_sum has min_terms, max_terms"),
        ("chain_sum?seed", "want key=value, got 'seed'"),
        ("chain_sum?size=5", "add seed=0 (held-out problems: seed=1)"),
        ("chain_sum?size=0&seed=0", "chain_sum refuses these parameters: size must be positive"),
        ("chain_sum?size=many&seed=0", "chain_sum refuses these parameters"),
        ("rubiks_cube?size=1&seed=0", "row 1: no answer in answer"),
    ],
)
def test_a_generator_that_cannot_run_says_why(source, message):
    text = refusal(["reasoning-gym:" + source])
    assert text.startswith("reasoning-gym:" + source) and message in text


def test_an_unusable_local_dataset_is_named(tmp_path):
    write(tmp_path / "train.jsonl", [SUM])
    assert "Unknown split \"dev\". Should be one of ['train']" in refusal([f"hf:{tmp_path}:dev"])
    assert refusal([f"hf:{tmp_path}:other:train"]).startswith(f"hf:{tmp_path}:other:train: BuilderConfig 'other' not found")
    (tmp_path / "train.jsonl").write_text('{"problem": ')
    assert "JSON parse error" in refusal([f"hf:{tmp_path}"]) and "want hf:NAME" in refusal([f"hf:{tmp_path}"])


def test_a_hub_dataset_that_cannot_be_reached_ends_in_one_message():
    code = "from rlsp_fast import config, data\ntry:\n data.load_problems(['hf:no/such'], config.DataConfig())\n"
    code += "except data.DataError as error:\n print(error)"
    root = Path(__file__).parent.parent
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf:no/such: Couldn't reach 'no/such' on the Hub")


def test_loading_problems_does_not_import_torch():
    code = "import sys, rlsp_fast.data; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}, check=True)


# Prompts


def test_the_chat_template_ends_with_the_generation_prompt_and_adds_no_second_bos():
    tokenizer = byte_tokenizer("<bos>" + CHAT, specials="<bos> $A")
    (found,), num_dropped = render([problem("é?", ("system", "Think."))], tokenizer, DataConfig())
    assert tokenizer.decode(found.prompt_ids) == "<bos><|system|>Think.<eos><|user|>é?<eos><|assistant|>"
    assert found.prompt_ids.count(tokenizer.bos_token_id) == 1 and num_dropped == 0
    assert dataclasses.replace(found, prompt_ids=()) == problem("é?", ("system", "Think."))


@pytest.mark.parametrize(
    "specials, template, text",
    [
        ("$A", "Problem: {problem}\n", "Problem: {x}{problem}\n"),
        ("<bos> $A", "Problem: {problem}", "<bos>Problem: {x}{problem}"),
        ("<bos> $A <eos>", "Problem: {problem}", "<bos>Problem: {x}{problem}"),  # a prompt must not end the sequence
        ("$A <eos>", "{problem}", "{x}{problem}"),
        ("<bos> $A", "<bos>{problem}", "<bos>{x}{problem}"),
    ],
)
def test_a_template_gets_the_bos_that_the_tokenizer_adds_once_and_nothing_else(specials, template, text):
    tokenizer = byte_tokenizer(specials=specials)
    (found,), _ = render([problem("{x}{problem}")], tokenizer, DataConfig(template=template))
    assert tokenizer.decode(found.prompt_ids) == text


def test_prompts_over_the_limit_are_dropped_and_counted():
    tokenizer, data = byte_tokenizer(), DataConfig(template="{problem}", max_prompt_length=3)
    kept, num_dropped = render([problem("1234"), problem("123"), problem("12"), problem("12345")], tokenizer, data)
    assert [tokenizer.decode(p.prompt_ids) for p in kept] == ["123", "12"] and num_dropped == 2


def test_a_prompt_over_the_limit_is_an_error_where_asked_for():
    data = DataConfig(template="{problem}", max_prompt_length=3, overlong_prompts="error")
    with pytest.raises(DataError, match=r"sums.jsonl line 5: a prompt of 4 tokens, data.max_prompt_length = 3: '1234'"):
        render([problem("123"), problem("1234", index=4)], byte_tokenizer(), data)


def test_no_prompt_within_the_limit_is_an_error():
    with pytest.raises(DataError, match="max_prompt_length = 3 drops every prompt: the shortest has 4 tokens"):
        render([problem("12345"), problem("1234")], byte_tokenizer(), DataConfig(template="{problem}", max_prompt_length=3))
    assert render([], byte_tokenizer(), DataConfig()) == ([], 0)


def test_prompts_that_no_template_can_take_are_refused():
    with pytest.raises(DataError, match="no chat template: set data.template"):
        render([problem()], byte_tokenizer(chat_template=None), DataConfig())
    with_system = problem("?", ("system", "Think."), index=2)
    with pytest.raises(DataError, match="sums.jsonl line 3: the chat template refuses .*: no system role here"):
        render([problem(), with_system], byte_tokenizer(NO_SYSTEM), DataConfig())
    with pytest.raises(DataError, match="sums.jsonl line 3: 2 messages, data.template has room for one"):
        render([problem(), with_system], byte_tokenizer(), DataConfig(template="{problem}"))


# Batches


def positions(num_problems, seed, step, batch_size):
    problems = [problem(index=i) for i in range(num_problems)]
    return [p.index for p in batch(problems, seed=seed, start=step * batch_size, size=batch_size)]


@pytest.mark.parametrize("num_problems, batch_size", [(7, 3), (7, 7), (3, 10), (1, 4), (8, 4)])
def test_batches_walk_through_every_problem_once_an_epoch(num_problems, batch_size):
    num_epochs = 6
    steps = range(-(-num_epochs * num_problems // batch_size))
    walk = [i for step in steps for i in positions(num_problems, 1, step, batch_size)]
    assert len(walk) == len(steps) * batch_size
    epochs = [walk[at : at + num_problems] for at in range(0, num_epochs * num_problems, num_problems)]
    assert all(sorted(epoch) == list(range(num_problems)) for epoch in epochs)
    assert num_problems < 3 or len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_seed_and_step_alone():
    assert positions(50, 3, 9, 16) == positions(50, 3, 9, 16)
    assert positions(50, 3, 0, 16) != positions(50, 4, 0, 16)
    # The order is part of a run: a change of it makes a resumed run train on other problems than it would have.
    assert positions(10, 0, 0, 10) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_a_late_step_costs_no_more_than_the_first():
    problems = [problem()] * 100_000
    started = time.perf_counter()
    assert len(batch(problems, seed=0, start=512 * 10**9, size=512)) == 512
    assert time.perf_counter() - started < 0.5


def test_no_problems_make_no_batch():
    with pytest.raises(DataError, match="want at least one item"):
        batch([], seed=0, start=0, size=1)


# Demonstrations


@pytest.mark.parametrize(
    "row, response",
    [
        ({"question": "1 + 1 = ?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, "1 + 1 = <<1+1=2>>2\n#### 2"),
        (SUM | {"solution": "It is \\boxed{2}."}, "It is \\boxed{2}."),
        (SUM | {"solution": "no", "response": " yes\n"}, " yes\n"),
        (SUM | {"solution": "no", "completion": [{"role": "assistant", "content": "yes"}]}, "yes"),
        ({"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "response": "2"}, "2"),
        (SUM | {"messages": [*VERL["prompt"][1:], {"role": "assistant", "content": "Two."}]}, "Two."),
    ],
)
def test_the_response_of_a_demonstration_is_taken_from(tmp_path, row, response):
    path = write(tmp_path / "a.jsonl", [row])
    (found,) = load_demonstrations([path], DataConfig(instruction="Box it.", prompt_key="elsewhere"))
    assert found.messages == problem("1 + 1 = ?\nBox it.").messages
    assert (found.response, found.source, found.index) == (response, "a.jsonl", 0)


def test_demonstrations_without_a_response_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "p", "text": "t"}])
    text = refusal([path], load=load_demonstrations)
    assert text.startswith(f"{path} line 1: no response in response, completion, solution, answer; its columns: problem, text")
    path = write(tmp_path / "a.jsonl", [{"problem": "p", "response": "\n"}])
    assert refusal([path], load=load_demonstrations) == f"{path} line 1: response is empty; fill it in or drop the row"


def test_rendered_demonstrations_continue_the_rendered_prompt_and_end_once():
    tokenizer = byte_tokenizer(specials="<bos> $A <eos>")
    pairs, num_dropped = render_demonstrations(
        [demonstration("1?", " 1"), demonstration("2?", "2<eos>")], tokenizer, DataConfig(), 100
    )
    (asked,), _ = render([problem("1?")], tokenizer, DataConfig())
    assert pairs[0][0] == asked.prompt_ids and num_dropped == 0
    assert [tokenizer.decode(response) for _, response in pairs] == [" 1<eos>", "2<eos>"]
    assert all(response.count(tokenizer.eos_token_id) == 1 for _, response in pairs)


def test_long_demonstrations_are_dropped_and_counted_with_their_end():
    tokenizer, data = byte_tokenizer(), DataConfig(template="{problem}", max_prompt_length=1)
    fits, long = demonstration("12", "345"), demonstration("12", "3456")
    pairs, num_dropped = render_demonstrations([long, fits, long], tokenizer, data, max_length=6)
    assert tokenizer.decode(pairs[0][1]) == "345<eos>" and (len(pairs), num_dropped) == (1, 2)
    with pytest.raises(DataError, match="sft.max_length = 6 drops every demonstration: the shortest has 7 tokens"):
        render_demonstrations([long], tokenizer, data, max_length=6)
    with pytest.raises(DataError, match="the tokenizer has no eos_token"):
        render_demonstrations([fits], byte_tokenizer(eos=None), data, max_length=6)


# Published problem sets


@pytest.mark.skipif(not os.environ.get("RLSP_FAST_DATA"), reason="RLSP_FAST_DATA names no folder of problem sets")
@pytest.mark.parametrize(
    "name, num_problems, first",
    [
        ("gsm8k_train.jsonl", 7473, "72"),
        ("gsm8k_test.jsonl", 1319, "18"),
        ("math12k_train_no_math500.jsonl", 11968, "0"),
        ("math500_test.jsonl", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("aime_1983_2023_train.jsonl", 918, "60"),
        ("minerva_math_test.jsonl", 272, "1.6"),
        ("amc23_test.jsonl", 40, "27.0"),
    ],
)
def test_published_problem_sets_load_whole(name, num_problems, first):
    found = load_problems([str(Path(os.environ["RLSP_FAST_DATA"]) / name)], DataConfig())
    assert len(found) == num_problems and found[0].answer == first
    assert not name.startswith("gsm8k") or all(p.answer.lstrip("-").replace(".", "").isdigit() for p in found)
