"""A policy-gradient loop written by hand: PPO on a model that is taught to answer with its favourite token. Runs anywhere.

T tokens, V vocabulary, D hidden size.
"""

import torch
from rlsp_kernels import linear_logprob_entropy, linear_ppo_loss

T, V, D, FAVOURITE = 256, 100, 32, 7
torch.manual_seed(0)
body = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, D), torch.nn.Tanh())
lm_head = torch.nn.Linear(D, V, bias=False)
optimizer = torch.optim.AdamW([*body.parameters(), *lm_head.parameters()], lr=0.01)

for step in range(30):
    prompt_T = torch.randint(V, (T,))
    with torch.no_grad():  # the rollout, and what it was sampled with
        hidden_TD = body(prompt_T)
        token_T = lm_head(hidden_TD).softmax(-1).multinomial(1).squeeze(-1)
        old_logprob_T, _ = linear_logprob_entropy(hidden_TD, lm_head.weight, token_T)
    reward_T = (token_T == FAVOURITE).float()
    advantage_T = reward_T - reward_T.mean()
    for _ in range(2):
        loss, metrics = linear_ppo_loss(  # (T, V) is never held; weight_T makes it a mean
            body(prompt_T), lm_head.weight, token_T, old_logprob_T, advantage_T, torch.full((T,), 1 / T), entropy_coef=0.001
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"step {step}: reward {reward_T.mean():.2f}, entropy {metrics.entropy / metrics.num_tokens:.2f}")
