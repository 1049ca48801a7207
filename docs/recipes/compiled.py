"""Under torch.compile: the ops are torch.library ops with fakes and gradients, so one graph holds the whole loss."""

import torch
from rlsp_kernels import linear_ppo_loss

T, V, D = 64, 100, 32
torch.manual_seed(0)
lm_head = torch.nn.Linear(D, V, bias=False)
layer = torch.nn.Linear(D, D)


def loss_of(x_TD, token_T, old_logprob_T, advantage_T):
    loss, metrics = linear_ppo_loss(
        layer(x_TD).tanh(), lm_head.weight, token_T, old_logprob_T, advantage_T, torch.full_like(advantage_T, 1 / len(x_TD))
    )
    return loss, metrics.clip_high + metrics.clip_low


inputs = torch.randn(T, D), torch.randint(V, (T,)), torch.full((T,), -4.6), torch.randn(T)
gradients = []
for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):  # the default backend on a GPU
    lm_head.weight.grad = None
    loss, num_clipped = function(*inputs)
    loss.backward()
    gradients.append(lm_head.weight.grad)
    print(f"loss {loss.item():.6f}, clipped {num_clipped.item():.0f}")
torch.testing.assert_close(*gradients)
