"""What test_kernels.py runs under torchrun on two ranks: a vocabulary spread over them, and weights that are DTensors.

Run as: torchrun --nproc-per-node 2 tests/vocab_ranks.py
"""

import torch
import torch.distributed as dist
from rlsp_kernels import linear_logprob_entropy, linear_ppo_loss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

T, D, V = 9, 12, 70


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ops(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, backend: str, most: int = V, **options
):
    """Outputs of both linear ops, and one number whose gradient uses all of them."""
    token_T = torch.randint(most, (T,), generator=torch.Generator().manual_seed(3))
    temperature_T, softcap = torch.linspace(0.6, 1.7, T), 9.0
    shared = {"bias_V": bias_V, "temperature": temperature_T, "softcap": softcap, "logit_scale": 0.8, "backend": backend}
    shared |= {"logits_budget": 4 * 4 * V, **options}
    logprob_T, entropy_T = linear_logprob_entropy(hidden_TD, weight_VD, token_T, **shared)
    weight_T = torch.ones(T)
    weight_T[4] = 0
    loss, metrics = linear_ppo_loss(
        hidden_TD, weight_VD, token_T, draw(T, seed=4) - 4, draw(T, seed=5), weight_T,
        ref_logprob_T=draw(T, seed=6) - 4, kl_coef=0.1, entropy_coef=0.05, dual_clip=2.0, **shared,
    )  # fmt: skip
    total = (logprob_T * draw(T, seed=7) + entropy_T * draw(T, seed=8)).sum() + loss
    return [logprob_T, entropy_T, loss, *metrics], total


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for backend in ("torch", "triton"):
        hidden_TD, weight_VD, bias_V = draw(T, D, seed=0), draw(V, D, seed=1), draw(V, seed=2)
        leaves = [x.requires_grad_() for x in (hidden_TD, weight_VD, bias_V)]
        truth, total = both_ops(*leaves, backend)
        grads = torch.autograd.grad(total, leaves)
        mine = slice(rank * V // 2, (rank + 1) * V // 2)

        def check(claim: str, ours: list, their_grads: list, expected: list, truth=truth, backend=backend) -> None:
            torch.testing.assert_close([x.float() for x in ours], [x.float() for x in truth], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(their_grads, expected, atol=2e-5, rtol=1e-5)
            dist.barrier()
            if rank == 0:
                print(f"{claim}, {backend}: equal", flush=True)

        share = [hidden_TD, weight_VD.detach()[mine].requires_grad_(), bias_V.detach()[mine].requires_grad_()]
        ours, total = both_ops(*share, backend, vocab_group=dist.group.WORLD)
        expected = [grads[0], grads[1][mine], grads[2][mine]]
        check("a spread vocabulary", ours, list(torch.autograd.grad(total, share)), expected)

        weight, bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight_VD, bias_V))
        ours, total = both_ops(hidden_TD, weight, bias, backend, vocab_group=mesh.get_group())
        d_hidden, d_weight, d_bias = torch.autograd.grad(total, (hidden_TD, weight, bias))
        check("a sharded DTensor", ours, [d_hidden, d_weight.to_local(), d_bias.to_local()], expected)

        # One row more on rank 0 than on rank 1, and chunks that must be the same all the same.
        short = [x.detach()[: V - 1].clone().requires_grad_() for x in (weight_VD, bias_V)]
        odd_truth, total = both_ops(hidden_TD, *short, backend, most=V - 1)
        odd_grads = torch.autograd.grad(total, (hidden_TD, *short))
        spread = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in short]
        ours, total = both_ops(hidden_TD, *spread, backend, most=V - 1, vocab_group=mesh.get_group(), logits_budget=20 * V)
        d_hidden, *d_spread = torch.autograd.grad(total, (hidden_TD, *spread))
        part = slice(0, V // 2) if rank == 0 else slice(V // 2, V - 1)
        expected_odd = [odd_grads[0], odd_grads[1][part], odd_grads[2][part]]
        check("uneven shares", ours, [d_hidden, *(x.to_local() for x in d_spread)], expected_odd, truth=odd_truth)

        masked_V = bias_V.detach().clone()
        masked_V[V // 2 :] = -torch.inf
        masked_truth, total = both_ops(hidden_TD, weight_VD, masked_V, backend, most=V // 2, softcap=None)
        masked_grad = torch.autograd.grad(total, hidden_TD)[0]
        ours, total = both_ops(
            hidden_TD, share[1], masked_V[mine], backend, most=V // 2, softcap=None, vocab_group=dist.group.WORLD
        )
        check("a share of nothing but -inf", ours, list(torch.autograd.grad(total, [hidden_TD])), [masked_grad], masked_truth)

        head = nn.Linear(D, V)
        with torch.no_grad():
            head.weight.copy_(weight_VD)
            head.bias.copy_(bias_V)
        fully_shard(head, mesh=mesh)
        ours, total = both_ops(hidden_TD, head.weight, head.bias, backend)
        total.backward(inputs=[hidden_TD, head.weight, head.bias])  # every rank has the same tokens: the mean is one's own
        check(
            "a DTensor of FSDP2",
            ours,
            [hidden_TD.grad, head.weight.grad.full_tensor(), head.bias.grad.full_tensor()],
            list(grads),
        )
        hidden_TD.grad = None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
