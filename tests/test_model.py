"""The packed model against the ordinary padded Hugging Face model, and what it refuses."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from rlsp_kernels import linear_logprob_entropy
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from rlsp_fast import dist, model
from rlsp_fast.model import Critic, ModelError, Policy, attention_backend
from rlsp_fast.packing import pack

PAIRS = [(s.prompt_ids, s.response_ids) for s in tiny.samples(6, seed=3)]  # 3 to 24 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def build(kind, path, device, **keys):
    config = tiny.recipe(path, model={"path": path, "dtype": "float32"} | keys)
    return model.build(kind, config.model, path, device, dist.mesh(device))


def logprobs(policy, pairs):
    """(T,) log-probability that each packed position gives its target."""
    batch = pack(pairs)

    def fn(hidden_TD, weight_VD, **head):
        return linear_logprob_entropy(hidden_TD, weight_VD, batch.token_T, need_entropy=False, **head)[0]

    return policy(batch, fn)


def padded_ids(pairs):
    rows = [torch.tensor(prompt + response) for prompt, response in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attend = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, attend


def padded_logprobs(path, pairs, grad=False):
    """The same from the plain model with right padding, in packed order; and the model."""
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids, attend = padded_ids(pairs)
    with torch.set_grad_enabled(grad):
        logits = lm(input_ids=ids, attention_mask=attend).logits
        logprob = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return torch.cat([logprob[b, : len(p) + len(r) - 1] for b, (p, r) in enumerate(pairs)]), lm


# --- Liger's layers ---------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """Its kernels where there is no GPU, in Triton's interpreter, which hands on floats as Python's and has no libdevice."""
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):  # taken back afterwards: it is the whole process's
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in [name for name in vars(module) if name == "apply_rotary_pos_emb" or name.endswith(("RMSNorm", "MLP"))]:
            monkeypatch.setattr(module, name, getattr(module, name))
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=2))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_ligers_layers_give_the_logprobs_and_gradients_of_hugging_faces(folder, device, liger, kind, monkeypatch):
    path, found = tiny.save_model(folder, kind), []
    for kernels in ("torch", "liger"):
        monkeypatch.setattr(model, "layer_kernels", lambda *_, kernels=kernels: (kernels, "asked for"))
        policy = build(Policy, path, device)
        logprob_T = logprobs(policy, PAIRS)
        logprob_T[pack(PAIRS).mask_T].mean().backward()
        found.append((logprob_T.detach(), tiny.gradients(policy)))
    (plain_T, expected), (logprob_T, gradients) = found
    rotary = importlib.import_module(type(policy.lm).__module__).apply_rotary_pos_emb
    assert rotary.__module__.startswith("liger_kernel")
    assert "Liger" in repr(policy.lm.base_model.norm) and "Liger" in repr(policy.lm.base_model.layers[1].mlp.forward)
    torch.testing.assert_close(logprob_T, plain_T, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_which_layer_kernels_run_and_why(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert model.layer_kernels("auto", cpu, "llama") == ("torch", "Liger's kernels need a CUDA GPU")
    assert model.layer_kernels("torch", gpu, "llama") == ("torch", "asked for")
    with pytest.raises(ModelError, match="model.layer_kernels = liger: Liger's kernels need a CUDA GPU; use torch or auto"):
        model.layer_kernels("liger", cpu, "llama")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert model.layer_kernels("auto", gpu, "llama") == ("torch", "liger-kernel is not installed")
    monkeypatch.undo()
    pytest.importorskip("liger_kernel")
    assert model.layer_kernels("auto", gpu, "llama") == ("liger", "fastest installed")
    assert model.layer_kernels("auto", gpu, None) == ("liger", "fastest installed")
    assert model.layer_kernels("auto", gpu, "gpt2") == ("torch", "liger-kernel has none for gpt2")
    with pytest.raises(ModelError, match="none for gpt2; use torch or auto"):
        model.layer_kernels("liger", gpu, "gpt2")


# --- torch.compile ----------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++") and not torch.cuda.is_available(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
def test_compiled_layers_give_the_same_and_are_compiled_once_for_all_lengths(folder, device, checkpointing):
    torch._dynamo.reset()
    path = tiny.save_model(folder, "llama")
    policies = [
        build(Policy, path, device, compile=compiled, activation_checkpointing=checkpointing) for compiled in (False, True)
    ]
    graphs = []
    for seed in range(5):
        pairs = [(s.prompt_ids, s.response_ids) for s in tiny.samples(3 + seed, seed=seed)]
        found = []
        for policy in policies:
            logprob_T = logprobs(policy, pairs)
            logprob_T[pack(pairs).mask_T].mean().backward()
            found.append((logprob_T.detach(), tiny.gradients(policy)))
            policy.zero_grad()
        (plain_T, expected), (logprob_T, gradients) = found
        torch.testing.assert_close(logprob_T, plain_T, atol=1e-5, rtol=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1], graphs
    torch._dynamo.reset()


# --- packed is padded -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
def test_packed_logprobs_and_gradients_are_those_of_the_padded_model(folder, device, kind, checkpointing):
    path = tiny.save_model(folder, kind)
    policy = build(Policy, path, device, activation_checkpointing=checkpointing)
    mask_T = pack(PAIRS).mask_T
    ours = logprobs(policy, PAIRS)
    truth, lm = padded_logprobs(path, PAIRS, grad=True)
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    loss, expected_loss = -ours[mask_T].mean(), -truth[mask_T].mean()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    loss.backward()
    expected_loss.backward()
    grads = {name.removeprefix("lm."): grad for name, grad in tiny.gradients(policy).items()}
    expected = tiny.gradients(lm)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


FAMILIES = {  # what each scales, normalises or caps in its own way
    "Qwen3": {"head_dim": 8},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Starcoder2": {},
    "Glm4": {"head_dim": 8},
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": tiny.WINDOW},
    "Gemma3Text": {"head_dim": 8, "sliding_window": tiny.WINDOW, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_of_other_families_are_those_of_their_padded_models(tmp_path, device, family):
    config = getattr(transformers, f"{family}Config")(**tiny.SHARED, num_key_value_heads=2, **FAMILIES[family])
    lm = AutoModelForCausalLM.from_config(config)
    tiny.jitter(lm, 0, 0.1)
    lm.save_pretrained(tmp_path)
    policy = build(Policy, str(tmp_path), device)
    torch.testing.assert_close(logprobs(policy, PAIRS), padded_logprobs(tmp_path, PAIRS)[0], atol=1e-5, rtol=1e-5)


def test_the_windows_of_these_tests_are_shorter_than_their_sequences(folder, device):
    """Otherwise the window would not be tested: the same weights without it must give other numbers."""
    path = tiny.save_model(folder, "mistral-window")
    with_window, lm = padded_logprobs(path, PAIRS)
    lm.config.sliding_window = None
    lm.save_pretrained(folder / "no-window")
    without, _ = padded_logprobs(folder / "no-window", PAIRS)
    assert max(len(p) + len(r) for p, r in PAIRS) > 2 * tiny.WINDOW
    assert (with_window - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen2-window"])
def test_no_position_sees_another_sequence(folder, device, kind):
    policy = build(Policy, tiny.save_model(folder, kind), device)
    changed = list(PAIRS)
    prompt, response = PAIRS[2]
    changed[2] = (tuple(3 + (t + 7) % 50 for t in prompt), tuple(3 + (t + 11) % 50 for t in response))
    before, after = (logprobs(policy, pairs).detach().split(pack(PAIRS).lengths) for pairs in (PAIRS, changed))
    for s, (x, y) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(x, y) == (s != 2)


def test_no_gradient_crosses_from_one_sequence_to_another(folder, device):
    policy = build(Policy, tiny.save_model(folder, "llama"), device)
    seen = []
    policy.lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(out))
    lengths = pack(PAIRS).lengths
    own = logprobs(policy, PAIRS).split(lengths)[3].sum()
    parts = torch.autograd.grad(own, seen[0])[0].squeeze(0).split(lengths)
    assert [bool(part.any()) for part in parts] == [s == 3 for s in range(len(PAIRS))]


def test_sdpa_pads_sequences_to_those_of_about_their_length_alone():
    lengths = (10, 100, 50, 9, 81, 79)
    batch = pack([((3,) * n, (4,)) for n in lengths])
    layout = model._layout(batch, "sdpa")
    assert layout.grids == ((2, 100), (1, 79), (1, 50), (2, 10))
    begins = layout.slot_T[batch.cu_seqlens[:-1]].tolist()
    assert begins == [329, 0, 279, 339, 100, 200]
    assert torch.equal(layout.slot_T, torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)]))


def test_the_order_and_company_of_sequences_does_not_matter(folder, device):
    policy = build(Policy, tiny.save_model(folder, "qwen2"), device)
    together = logprobs(policy, PAIRS).split(pack(PAIRS).lengths)
    for s, pair in enumerate(PAIRS):
        torch.testing.assert_close(logprobs(policy, [pair]), together[s], atol=1e-6, rtol=1e-6)


# --- critic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_a_critic_starts_at_zero_and_has_no_output_layer_to_train(folder, device, kind):
    critic = build(Critic, tiny.save_model(folder, kind), device)
    value_T = critic(pack(PAIRS))
    assert value_T.shape == (pack(PAIRS).num_tokens,) and value_T.dtype == torch.float32
    assert (value_T == 0).all()
    value_T.sum().backward()
    assert critic.value_head.weight.grad is not None
    assert not any("lm_head" in name for name, _ in critic.named_parameters())


def test_values_are_the_head_on_the_padded_hidden_states(folder, device):
    path = tiny.save_model(folder, "qwen2-tied")
    critic = build(Critic, path, device)
    weight = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        critic.value_head.weight.to_local().copy_(weight[None])
        critic.value_head.bias.to_local().fill_(0.5)
    ids, attend = padded_ids(PAIRS)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(input_ids=ids, attention_mask=attend).last_hidden_state
        ours = critic(pack(PAIRS))
    rows = [hidden[b, : len(p) + len(r) - 1] for b, (p, r) in enumerate(PAIRS)]
    torch.testing.assert_close(ours, torch.cat(rows) @ weight + 0.5, atol=1e-5, rtol=1e-5)


# --- precision and tying ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Policy, Critic])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_master_weights_are_float32_whatever_the_checkpoint_and_the_compute_dtype(folder, device, kind, dtype):
    path = tiny.save_model(folder / "half", "qwen2-tied", dtype=torch.bfloat16)
    module = build(kind, path, device, dtype=dtype)
    batch = pack(PAIRS)
    (module(batch) if kind is Critic else logprobs(module, PAIRS)).sum().backward()
    for name, p in module.named_parameters():
        assert p.dtype == torch.float32, name
        assert p.grad is None or p.grad.dtype == torch.float32, name
    for name, p in AutoModel.from_pretrained(path, dtype=torch.float32).named_parameters():
        assert torch.equal(module.lm.model.get_parameter(name).full_tensor(), p), name


def test_compute_in_bfloat16_is_near_float32(folder, device):
    path = tiny.save_model(folder, "llama")
    exact, half = (logprobs(build(Policy, path, device, dtype=d), PAIRS) for d in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    assert 1e-4 < (exact - half).abs().max() < 0.3  # bfloat16 has 8 bits; exactly equal would mean it was not used
    assert (exact - half).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_reference_says_exactly_what_the_policy_it_was_loaded_as_says(folder, device, dtype):
    """Its weights are held in the compute dtype; what is float32 by design (rotary frequencies) must stay so."""
    path = tiny.save_model(folder, "llama")
    config = tiny.recipe(path, model={"path": path, "dtype": dtype}).model
    ref = model.build(Policy, config, path, device, dist.mesh(device), trained=False)
    assert {p.dtype for p in ref.parameters()} == {model.DTYPES[dtype]}
    assert not any(p.requires_grad for p in ref.parameters())
    assert {b.dtype for b in ref.buffers()} == {torch.float32}
    assert torch.equal(logprobs(ref, PAIRS), logprobs(build(Policy, path, device, dtype=dtype), PAIRS))


def test_tied_embeddings_stay_one_parameter(folder, device):
    path = tiny.save_model(folder / "half", "qwen2-tied", dtype=torch.bfloat16)
    policy = build(Policy, path, device)
    assert policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight
    assert "lm.lm_head.weight" not in dict(policy.named_parameters())


def test_two_passes_give_the_same_bits(folder, device):
    policy = build(Policy, tiny.save_model(folder, "llama"), device, activation_checkpointing=True)  # training mode
    assert torch.equal(logprobs(policy, PAIRS), logprobs(policy, PAIRS))


def test_dropout_is_off_in_training_mode(folder, device):
    path = Path(tiny.save_model(folder, "qwen2"))
    dropping = folder / "dropout"
    shutil.copytree(path, dropping)
    text = (dropping / "config.json").read_text()
    assert '"attention_dropout": 0.0' in text
    (dropping / "config.json").write_text(text.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    policy = build(Policy, str(dropping), device, activation_checkpointing=True)
    rates = [m.attention_dropout for m in policy.modules() if hasattr(m, "attention_dropout")]
    assert policy.training and rates == [0.0, 0.0]  # one for each layer: what flash-attn would be handed


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["flash_attn", "varlen"])
def test_an_attention_backend_that_cannot_run_here_is_refused_by_key(folder, choice):
    cpu = torch.device("cpu")
    with pytest.raises(ModelError, match=f"model.attention = {choice}: {choice} needs a CUDA GPU; use sdpa or auto"):
        attention_backend(choice, cpu, torch.bfloat16)
    with pytest.raises(ModelError, match=f"model.attention = {choice}: .*(bfloat16|not installed)"):
        attention_backend(choice, torch.device("cuda"), torch.float32)


def test_auto_takes_sdpa_on_a_cpu_and_says_why():
    name, why = attention_backend("auto", torch.device("cpu"), torch.float32)
    assert name == "sdpa" and "needs a CUDA GPU" in why


def one_line(call):
    with pytest.raises(ModelError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_model_folder_is_named_once(device):
    for path in ("./no/such/model", "/no/such/model", "~/no-such-model"):
        for load in (model.load_tokenizer, model.load_config, lambda path: build(Policy, path, device)):
            text = one_line(lambda path=path, load=load: load(path))
            assert text.startswith(f"model.path = {path!r}: no such folder") and text.count("model.path") == 1


def test_a_hub_name_that_cannot_be_fetched_is_named(device):
    for load in (model.load_tokenizer, model.load_config):
        assert "model.path = 'nobody/no-such-model'" in one_line(lambda load=load: load("nobody/no-such-model"))


def test_a_folder_without_a_model_is_named(tmp_path, device):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert f"model.path = {str(tmp_path)!r}" in one_line(lambda: build(Policy, str(tmp_path), device))
    assert f"model.path = {str(tmp_path)!r}" in one_line(lambda: model.load_tokenizer(str(tmp_path)))


@pytest.mark.parametrize("damage", ["missing", "cut short", "of another shape"])
def test_a_model_whose_weights_cannot_be_used_is_named(tmp_path, device, damage):
    path = Path(tiny.save_model(tmp_path, "llama"))
    weights, config = path / "model.safetensors", path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    assert f"model.path = {str(path)!r}: cannot load the weights" in one_line(lambda: build(Policy, str(path), device))


UNSUPPORTED = {
    "Gemma2": ({"head_dim": 8}, "an attention soft-cap needs model.attention = flash_attn, not sdpa"),
    "GptOss": ({"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "a mixture of experts"),
    "Mamba": ({}, "would carry one packed sequence into the next"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "its conv layers would carry"),
    "FalconH1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}, "into the next"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_model_that_packing_would_get_wrong_is_refused_when_it_is_built(tmp_path, device, family):
    keys, message = UNSUPPORTED[family]
    config = getattr(transformers, f"{family}Config")(**tiny.SHARED, num_key_value_heads=2, **keys)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert message in one_line(lambda: build(Policy, str(tmp_path), device))


def test_a_home_folder_path_loads_everywhere(tmp_path, device, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.save_model(tmp_path, "llama")
    assert model.load_config("~/llama-0").hidden_size == 32
    assert model.load_tokenizer("~/llama-0").eos_token_id == 2
    build(Policy, "~/llama-0", device)
