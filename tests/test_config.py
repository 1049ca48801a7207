"""The config tree: what it refuses and how it says so, overrides of every type, and recipes."""

from operator import attrgetter
from pathlib import Path

import pytest

from rlsp_fast import config
from rlsp_fast.config import ConfigError, dump, leaf_keys, load, recipe_path, reference

RECIPES = sorted((Path(config.__file__).parent / "recipes").glob("*.toml"))
MINIMAL = '[model]\npath = "m"\n[data]\ntrain = ["a.jsonl"]\n'
# Keys whose value cannot be any text.
TYPED = [key for key, field in leaf_keys().items() if field.annotation not in (str, str | None, tuple[str, ...])]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "minimal.toml").write_text(MINIMAL)
    return str(tmp_path / "minimal.toml")


def refusal(recipe, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    return str(caught.value)


# Keys


def test_there_are_fewer_than_90_keys_and_each_has_a_docstring():
    assert len(leaf_keys()) < 90
    assert [key for key, field in leaf_keys().items() if not (field.description or "").strip().endswith(".")] == []


def test_the_reference_explains_every_key():
    text = reference()
    assert all(f"| `{key}` |" in text and field.description in text for key, field in leaf_keys().items())


@pytest.mark.parametrize("key", leaf_keys())
def test_a_misspelt_key_is_refused_with_its_value_and_the_nearest_key(recipe, key):
    text = refusal(recipe, f"{key}s=7")
    assert text == f"unknown key {key + 's'!r} (value '7'); did you mean {key}?"


@pytest.mark.parametrize("key, nearest", [("steps", "train.steps"), ("train.lam", "algorithm.lam"), ("model", "model.path")])
def test_a_key_in_the_wrong_section_is_refused_with_the_right_one(recipe, key, nearest):
    assert f"unknown key {key!r} (value '7'); did you mean {nearest}?" in refusal(recipe, f"{key}=7")


def test_a_key_like_no_other_is_refused_with_where_to_look(recipe):
    assert refusal(recipe, "zzzz.qqqq=7") == "unknown key 'zzzz.qqqq' (value '7'); `rlsp config` lists every key"


# Values


@pytest.mark.parametrize("key", TYPED)
def test_a_value_of_the_wrong_type_is_refused_with_key_value_and_meaning(recipe, key):
    text = refusal(recipe, f"{key}=@@").splitlines()[0]
    assert text.startswith(f"{recipe}: {key} = '@@': want ") and text.endswith(leaf_keys()[key].description)


@pytest.mark.parametrize(
    "override, message",
    [
        ("reward.alpha=1.5", "reward.alpha = 1.5: want less than or equal to 1. Weight of the outcome"),
        ("train.steps=1.5", "train.steps = 1.5: want a valid integer"),
        ("train.seed=-1", "train.seed = -1: want greater than or equal to 0"),
        ("data.max_prompt_length=true", "data.max_prompt_length = True: want a valid integer"),
        ("model.activation_checkpointing=1", "model.activation_checkpointing = 1: want a valid boolean"),
        ("output.resume=always", "output.resume = 'always': want 'auto' or 'never'"),
        ("rollout.sleep_level=3", "rollout.sleep_level = 3: want 1 or 2"),
        ("output.loggers=wandbb", "output.loggers = 'wandbb': want 'tensorboard' or 'wandb'"),
        ("optim.betas=0.9,1.5", "optim.betas = 1.5: want less than or equal to 1"),
        ("algorithm.clip_ratio_high=nan", "algorithm.clip_ratio_high = nan: want a finite number"),
        ("train.mini_batch_size=100", "does not divide train.batch_size = 512; the nearest that does is 128"),
        ("algorithm.advantage=grpo", "compares the responses of one problem: want rollout.n >= 2, got 1"),
        ("train.max_tokens_per_micro_batch=99", "cannot hold one sequence of data.max_prompt_length + rollout.max_"),
        ("data.train=", "data.train is empty: name the training problems, or set train.steps=0"),
        ("sft.steps=3", "sft.train is empty: name the demonstrations, or set sft.steps=0 and sft.epochs=0"),
        ("data.template=Solve it.", "data.template must contain {problem}, got 'Solve it.'"),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_or_at_odds_with_another_is_refused(recipe, override, message):
    assert f"{recipe}: " in refusal(recipe, override) and message in refusal(recipe, override)


def test_everything_wrong_is_listed_at_once(recipe):
    lines = refusal(recipe, "reward.alpha=2", "train.steps=many").splitlines()
    assert [line.split(" = ")[0] for line in lines] == [f"{recipe}: reward.alpha", f"{recipe}: train.steps"]


def test_an_override_without_a_value_is_refused(recipe):
    assert refusal(recipe, "train.steps") == "want dotted.key=value, got 'train.steps'"


# Overrides and round trip

OVERRIDES = [
    ("train.steps=7", 7),
    ("--train.steps=7", 7),
    ("optim.actor_lr=1e-4", 1e-4),
    ("rollout.kv_cache_gib=2", 2.0),
    ("rollout.kv_cache_gib=none", None),
    ("rollout.enforce_eager=auto", "auto"),
    ("rollout.enforce_eager=true", True),
    ("model.activation_checkpointing=True", True),
    ("model.path=3", "3"),
    ("model.dtype=float32", "float32"),
    ("data.instruction=Box it: \\boxed{x = 1}", "Box it: \\boxed{x = 1}"),
    ('data.instruction="Quoted"\n\tand ünusual', '"Quoted"\n\tand ünusual'),
    ("data.template=null", None),
    ("data.template={problem}\n", "{problem}\n"),
    ("data.train=a.jsonl,hf:x:test", ("a.jsonl", "hf:x:test")),
    ('data.train=["a,b.jsonl"]', ("a,b.jsonl",)),
    ("rollout.stop=</answer>", ("</answer>",)),
    ("optim.betas=0.8,0.99", (0.8, 0.99)),
    ("optim.betas=[0.8, 0.99]", (0.8, 0.99)),
    ("rollout.sleep_level=1", 1),
    ("output.loggers=wandb,tensorboard", ("wandb", "tensorboard")),
    ("output.loggers=none", None),
    ("output.loggers=", ()),
]


@pytest.mark.parametrize("override, value", OVERRIDES, ids=[o for o, _ in OVERRIDES])
def test_an_override_is_read_as_the_type_of_its_key(recipe, override, value):
    key = override.partition("=")[0].removeprefix("--")
    found = attrgetter(key)(load(recipe, [override]))
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_over_the_earlier_and_over_the_file(recipe):
    assert load(recipe, ["model.path=a", "model.path=b"]).model.path == "b"


@pytest.mark.parametrize("override", ["train.seed=0", *(override for override, _ in OVERRIDES)])
def test_a_dumped_config_loads_as_itself(recipe, tmp_path, override):
    resolved = load(recipe, [override])
    (tmp_path / "dumped.toml").write_text(dump(resolved))
    assert load(str(tmp_path / "dumped.toml")) == resolved


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_by_its_name(path):
    assert recipe_path(path.stem) == path
    assert load(path.stem) == load(str(path))


@pytest.mark.skipif(not RECIPES, reason="no recipe ships")
def test_an_unknown_recipe_is_refused_with_the_nearest_and_all_that_ship():
    name = RECIPES[0].stem
    text = refusal(name + "x")
    assert text.startswith(f"no recipe {name + 'x'!r}: neither a file nor a shipped recipe; did you mean {name}?")
    assert all(path.stem in text for path in RECIPES)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.toml", "x =", "Invalid value"),
        ("a.toml", "[model]\npath = '\xff'".encode("latin-1"), "can't decode byte 0xff"),
        ("a.yaml", "- a", "want sections such as [model] and [train], got list"),
        ("a.yaml", ": :\n - [", "expected <block end>"),
        ("a.toml", "", "section [model] is required"),
        ("a.toml", "[model]\npaht = 'm'", "unknown key 'model.paht' (value 'm'); did you mean model.path?"),
        ("a.toml", "[model]\npaht = 'm'", "model.path is required: Hugging Face model folder"),
        ("a.toml", "model = 3", "model = 3: want an object"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refusal(str(tmp_path / name))
    assert text.startswith(str(tmp_path / name)) and message in text


def test_yaml_recipes_load_as_toml_recipes_do(recipe, tmp_path):
    (tmp_path / "a.yml").write_text("model: {path: m}\ndata: {train: [a.jsonl]}\n")
    assert load(str(tmp_path / "a.yml")) == load(recipe)
