"""torchtitan's Llama without logits: its decoder stops before the head when told to. Needs torchtitan 0.3."""

import torch
from rlsp_kernels import linear_logprob_entropy
from torchtitan.models.llama3 import llama3_configs

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = llama3_configs["debugmodel"](attn_backend="flex").build().to(device)
model.init_states()
token = torch.randint(model.config.vocab_size, (2, 128), device=device)
positions = torch.arange(128, device=device).expand(2, -1)
label_T = token.roll(-1, 1).flatten()
train_all = device == "cuda"  # FlexAttention has no backward on a CPU: there the head alone gets a gradient


def hidden():
    with torch.set_grad_enabled(train_all):
        model._skip_lm_head = True
        return model(token, positions, model.get_attention_masks(positions)).flatten(0, 1)


log_p = model.lm_head(hidden()).log_softmax(-1)  # what is replaced
plain = -log_p.gather(-1, label_T[:, None]).mean()
plain.backward()
expected = model.lm_head.weight.grad
model.zero_grad()

logprob_T, entropy_T = linear_logprob_entropy(hidden(), model.lm_head.weight, label_T)
loss = -logprob_T.mean()
loss.backward()
print(f"loss {plain.item():.6f} with logits, {loss.item():.6f} without; entropy {entropy_T.mean().item():.3f}")
torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-3, atol=1e-6)
