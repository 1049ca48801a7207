"""Checkpoints: what is saved continues bit for bit, and what is exported is an ordinary Hugging Face model."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from rlsp_kernels import linear_logprob_entropy
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsp_fast import checkpoint, dist, model
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.packing import pack

PAIRS = [(s.prompt_ids, s.response_ids) for s in tiny.samples(4, seed=3)]
BATCH = pack(PAIRS)
OPTIM = {"actor_lr": 1e-2, "warmup_ratio": 0.3, "schedule": "linear", "weight_decay": 0.1}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models"), "qwen2-tied")


def make(path, device, **optim):
    """An actor and a critic, and their optimizers over ten steps."""
    config = tiny.recipe(path, optim=OPTIM | optim)
    trained = {}
    for name, kind in (("actor", Policy), ("critic", Critic)):
        module = model.build(kind, config.model, path, device, dist.mesh(device))
        trained[name] = (module, Optimizer(module, config.optim, config.optim.actor_lr, 10))
    return trained


def loss(module):
    if isinstance(module, Critic):
        return (module(BATCH) - 1).square().mean()

    def fn(hidden_TD, weight_VD, **head):
        return -linear_logprob_entropy(hidden_TD, weight_VD, BATCH.token_T, **head)[0].mean()

    return module(BATCH, fn)


def update(trained, names=("actor", "critic")):
    """One optimizer step of each; the learning rates used."""
    rates = []
    for name in names:
        module, optimizer = trained[name]
        rates.append(optimizer.adamw.param_groups[0]["lr"])
        loss(module).backward()
        optimizer.step()
    return rates


def weights(trained):
    return {
        f"{name}.{key}": p.full_tensor().detach().clone()
        for name, (module, _) in trained.items()
        for key, p in module.named_parameters()
    }


def assert_same_bits(trained, expected):
    ours = weights(trained)
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


# --- resumable state --------------------------------------------------------------------------------


def test_a_loaded_run_goes_on_bit_for_bit(path, device, tmp_path):
    first = make(path, device)
    for _ in range(3):
        update(first)
    checkpoint.save(tmp_path, 3, first)
    saved = weights(first)
    rates = [update(first) for _ in range(2)]
    expected = weights(first)
    second = make(path, device)
    checkpoint.load(tmp_path, 3, second)
    assert_same_bits(second, saved)
    assert [update(second) for _ in range(2)] == rates
    assert_same_bits(second, expected)


def test_saving_changes_nothing_in_the_run_that_saves(path, device, tmp_path):
    plain, saving = make(path, device), make(path, device)
    for step in range(3):
        update(plain)
        update(saving)
        checkpoint.save(tmp_path, step + 1, saving)
    assert_same_bits(saving, weights(plain))


def test_a_checkpoint_during_critic_warmup_leaves_the_actor_untrained(path, device, tmp_path):
    """The actor's optimizer has not stepped yet: neither saving nor loading may count as its first step."""
    plain, saving, loaded = (make(path, device) for _ in range(3))
    update(plain, ["critic"])
    update(saving, ["critic"])
    checkpoint.save(tmp_path, 1, saving)
    checkpoint.load(tmp_path, 1, loaded)
    for trained in (plain, saving, loaded):
        update(trained)
    assert_same_bits(saving, weights(plain))
    assert_same_bits(loaded, weights(plain))


def test_a_new_learning_rate_holds_from_the_step_it_is_set(path, device, tmp_path):
    """A resumed run says which settings changed: they must not be overruled by the checkpoint's."""
    first = make(path, device)
    update(first)
    checkpoint.save(tmp_path, 1, first)
    second = make(path, device, actor_lr=3e-2, betas=[0.5, 0.6])
    checkpoint.load(tmp_path, 1, second)
    before, after = update(first), update(second)
    assert after == pytest.approx([3 * rate for rate in before])
    assert update(second) == pytest.approx([3 * rate for rate in update(first)])
    assert [group["betas"] for group in second["actor"][1].adamw.param_groups] == [(0.5, 0.6)] * 2


def test_an_unfinished_checkpoint_is_ignored(path, device, tmp_path):
    trained = make(path, device)
    assert checkpoint.complete(tmp_path) == []
    for step in (1, 2):
        update(trained)
        checkpoint.save(tmp_path, step, trained)
    (tmp_path / "checkpoints" / "step_2" / "complete.json").unlink()
    (tmp_path / "checkpoints" / "step_9").mkdir()
    assert checkpoint.complete(tmp_path) == [1]


def test_the_newest_two_checkpoints_are_kept_in_the_order_of_their_steps(path, device, tmp_path):
    trained = make(path, device)
    for step in (8, 9, 10, 11):  # as text, 9 comes after 10
        checkpoint.save(tmp_path, step, trained)
    assert checkpoint.complete(tmp_path) == [10, 11]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_11"]


def test_a_save_over_an_unfinished_one_is_whole(path, device, tmp_path):
    trained = make(path, device)
    update(trained)
    checkpoint.save(tmp_path, 1, trained)
    (tmp_path / "checkpoints" / "step_1" / "complete.json").unlink()
    update(trained)
    checkpoint.save(tmp_path, 1, trained)
    second = make(path, device)
    checkpoint.load(tmp_path, 1, second)
    assert_same_bits(second, weights(trained))


# --- Hugging Face folders ---------------------------------------------------------------------------


def plain_logprobs(folder, **options):
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)
    rows = []
    for prompt, response in PAIRS:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, :-1].float()
        rows.append(F.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen2-window"])
def test_an_exported_policy_is_the_trained_one_in_transformers(device, tmp_path, kind):
    path = tiny.save_model(tmp_path, kind)
    trained = make(path, device)
    update(trained)
    update(trained)
    policy = trained["actor"][0]
    with torch.no_grad():
        loss(policy)  # as after annotate: the root's parameters may still be gathered
    folder = checkpoint.export(policy, tiny.tokenizer(), tmp_path / "exported", tiny.recipe(path))
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, p in policy.lm.named_parameters():
        assert torch.equal(state[name], p.full_tensor()), name

    def fn(hidden_TD, weight_VD, **head):
        return linear_logprob_entropy(hidden_TD, weight_VD, BATCH.token_T, **head)[0]

    torch.testing.assert_close(plain_logprobs(folder), policy(BATCH, fn).detach(), atol=1e-5, rtol=1e-5)
    assert (plain_logprobs(folder) - plain_logprobs(path)).abs().max() > 1e-2  # it was trained


def test_an_exported_folder_is_in_the_models_dtype_and_has_its_tokenizer(device, tmp_path):
    path = tiny.save_model(tmp_path, "llama")
    policy = make(path, device)["actor"][0]
    config = tiny.recipe(path, model={"path": path, "dtype": "bfloat16"})
    folder = checkpoint.export(policy, tiny.tokenizer(), tmp_path / "exported", config)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    written = json.loads((folder / "config.json").read_text())
    assert (written["dtype"], written["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids == [5, 7]
    assert "rlsp" not in (folder / "config.json").read_text()  # no trace of our attention, which others do not have


def test_training_goes_on_unchanged_after_an_export(path, device, tmp_path):
    plain, exporting = make(path, device), make(path, device)
    update(plain)
    update(exporting)
    checkpoint.export(exporting["actor"][0], tiny.tokenizer(), tmp_path / "exported", tiny.recipe(path))
    update(plain)
    update(exporting)
    assert_same_bits(exporting, weights(plain))


def test_a_second_export_replaces_the_first_whole(path, device, tmp_path):
    trained = make(path, device)
    folder = tmp_path / "exported"
    checkpoint.export(trained["actor"][0], tiny.tokenizer(), folder, tiny.recipe(path))
    (folder / "left-over.txt").write_text("from before")
    update(trained)
    checkpoint.export(trained["actor"][0], tiny.tokenizer(), folder, tiny.recipe(path))
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]
    assert not (folder / "left-over.txt").exists()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    embedding = trained["actor"][0].lm.model.embed_tokens.weight.full_tensor()
    assert torch.equal(state["model.embed_tokens.weight"], embedding)


def test_an_export_cut_short_leaves_no_folder_of_that_name(path, device, tmp_path):
    policy = make(path, device)["actor"][0]
    checkpoint.export(policy, tiny.tokenizer(), tmp_path / "exported", tiny.recipe(path))
    shutil.move(tmp_path / "exported", tmp_path / "exported.partial")  # what a killed run leaves
    (tmp_path / "exported.partial" / "model.safetensors").write_bytes(b"")
    checkpoint.export(policy, tiny.tokenizer(), tmp_path / "exported", tiny.recipe(path))
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]
    AutoModelForCausalLM.from_pretrained(Path(tmp_path / "exported"))
