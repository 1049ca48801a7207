"""What does linear_ppo_loss cost beside three bare matrix products, and what do inactive rows save?

    python bench/bench_linear_ppo_loss.py [--device cpu|cuda] [--tokens 16384] [--vocab 128256 151936] [--hidden 4096]
                                          [--active 100 75 50 25]

The PPO loss and its gradients with respect to hidden states (T, D) and the output projection (V, D), never holding (T, V):
policy gradient with low, high and dual clip, k3 KL to a reference, entropy bonus, a weight per token. 8 sequences; advantages
are equal within one, because Liger's are.

  FLOPs     6 N V D, N the active rows: logits and two gradients. Providers that compute the logits again in the backward do
            8 N V D, so 75 % is the most that they can show.

Inactive rows (prompts, masked tokens, zero advantage with no KL or entropy term) have weight 0. Ours takes rows_N. Below 100 %,
peers with per-token outputs are given hidden[rows], gathered in the timed call, which favours them: the trainers they
come from hand them every row, at the time of the 100 % table. Liger's GRPO loss takes a mask.

Providers:
  ours                      everything
  ours, no entropy          entropy_coef 0 and no entropy metric
  ours, float32 logits      the logits in float32
  liger ...GRPOLoss         Liger's whole loss
  others                    their log-probabilities, then the loss on (N,) tensors by torch.compile
  scalar losses             the sum of the cross entropy, which is not a policy gradient: their 3 products are the time to beat
"share" is of the rate of the bare product of the logits in the same run; "3 matrix products" are bare as well, written to
memory allocated beforehand. Errors are against float64 on 256 tokens, from the same rounded inputs: for each provider against
its own task.
"""

import argparse
from collections.abc import Callable

import torch
from peers import Peer, PPOSettings, eager_logprob_entropy, linear_peers, losses, ppo_of_logprob
from rlsp_kernels import linear_ppo_loss
from timing import SLICE_TOKENS, Provider, Results, Target, arguments, describe, judge, measure, product_yardstick, report
from torch import Tensor

SETTINGS = PPOSettings()
SEQUENCES = 8


class Inputs:
    """Hidden states, projection and what the loss needs; ratios that the clips catch on both sides."""

    def __init__(self, T: int, V: int, D: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.weight_VD = (3 / D**0.5 * torch.randn(V, D, generator=g, device=device)).to(dtype).requires_grad_()
        self.hidden_TD = torch.randn(T, D, generator=g, device=device).to(dtype).requires_grad_()
        self.token_T = torch.randint(V, (T,), generator=g, device=device)
        with torch.no_grad():
            chunks = zip(self.hidden_TD.split(1024), self.token_T.split(1024), strict=True)
            logprob_T = torch.cat([eager_logprob_entropy(hidden @ self.weight_VD.T, token)[0] for hidden, token in chunks])
        self.old_logprob_T = logprob_T + 0.3 * torch.randn(T, generator=g, device=device)
        self.ref_logprob_T = logprob_T + 0.3 * torch.randn(T, generator=g, device=device)
        self.advantage_S = torch.randn(SEQUENCES, generator=g, device=device)
        self.advantage_T = self.advantage_S.repeat_interleave(T // SEQUENCES)
        self.order_T = torch.randperm(T, generator=g, device=device)
        self.activate(100)

    def activate(self, percent: int) -> None:
        """Leaves a weight to so many rows, spread over all sequences."""
        T = len(self.token_T)
        self.rows_N = self.order_T[: T * percent // 100].sort().values
        self.weight_T = torch.zeros(T, device=self.token_T.device)
        self.weight_T[self.rows_N] = 1 / len(self.rows_N)


def _gradients(loss: Tensor, inputs: Inputs) -> Results:
    d_hidden, d_weight = torch.autograd.grad(loss, (inputs.hidden_TD, inputs.weight_VD))
    return {"value": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def ours(name: str, inputs: Inputs, entropy: bool = True, logits_dtype: torch.dtype | None = None) -> Provider:
    """The fused loss."""

    def call(_: object) -> Results:
        loss, _ = linear_ppo_loss(
            inputs.hidden_TD,
            inputs.weight_VD,
            inputs.token_T,
            inputs.old_logprob_T,
            inputs.advantage_T,
            inputs.weight_T,
            ref_logprob_T=inputs.ref_logprob_T,
            kl_kind="k3",
            **SETTINGS.ours(entropy),
            logits_dtype=logits_dtype,
            rows_N=inputs.rows_N if len(inputs.rows_N) < len(inputs.token_T) else None,
        )
        return _gradients(loss, inputs)

    return Provider(name, call, "" if entropy else "no entropy")


def of_peer(peer: Peer, inputs: Inputs, compiled_ppo: Callable[..., Tensor]) -> Provider:
    """A peer's log-probabilities of the active rows, then the loss on (N,) tensors; or its scalar loss."""

    def call(_: object) -> Results:
        per_token = (inputs.token_T, inputs.old_logprob_T, inputs.ref_logprob_T, inputs.advantage_T, inputs.weight_T)
        hidden = inputs.hidden_TD
        if len(inputs.rows_N) < len(hidden):
            hidden, *per_token = (x[inputs.rows_N] for x in (hidden, *per_token))
        token, *others = per_token
        results = peer.op(hidden, inputs.weight_VD, token)
        if peer.gives == "nll":
            return _gradients(results, inputs)
        logprob, entropy = results if peer.gives == "both" else (results, None)
        return _gradients(compiled_ppo(logprob, entropy, *others, SETTINGS), inputs)

    computes = {"both": "", "logprob": "no entropy", "nll": "sum of NLL"}[peer.gives]
    return Provider(peer.name, call, computes, peer.lacks, peer.package)


def liger(device: str) -> Callable[[Inputs], Provider]:
    """Liger's loss in torch, chunked by sequence."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(
        beta=SETTINGS.kl_coef,
        compiled=device == "cuda",
        epsilon_low=SETTINGS.clip_ratio_low,
        epsilon_high=SETTINGS.clip_ratio_high,
        loss_type="bnpo",
        delta=SETTINGS.dual_clip,
    )

    def provider(inputs: Inputs) -> Provider:
        def by_sequence(x: Tensor) -> Tensor:
            return x.view(SEQUENCES, -1, *x.shape[1:])

        def call(_: object) -> Results:
            loss, _ = loss_of(
                by_sequence(inputs.hidden_TD),
                inputs.weight_VD,
                by_sequence(inputs.token_T),
                by_sequence((inputs.weight_T != 0).float()),
                inputs.advantage_S,
                ref_per_token_logps=by_sequence(inputs.ref_logprob_T),
                old_per_token_logps=by_sequence(inputs.old_logprob_T),
            )
            return _gradients(loss, inputs)

        lacks = "no entropy, no KL but k3, one advantage a sequence, padded (S, L, D), float32 products in the backward"
        return Provider("liger LigerFusedLinearGRPOLoss", call, "no entropy", lacks, "liger-kernel")

    return provider


def truths(inputs: Inputs) -> dict[str, Results]:
    """Loss and gradients in float64 of each task."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (inputs.hidden_TD, inputs.weight_VD))
    logprob_T, entropy_T = eager_logprob_entropy(hidden @ weight.T, inputs.token_T)
    others = (inputs.old_logprob_T, inputs.ref_logprob_T, inputs.advantage_T, inputs.weight_T)
    others = tuple(x.double() for x in others)
    found = {}
    for computes, loss in {
        "": ppo_of_logprob(logprob_T, entropy_T, *others, SETTINGS),
        "no entropy": ppo_of_logprob(logprob_T, None, *others, SETTINGS),
        "sum of NLL": -logprob_T[inputs.rows_N].sum(),
    }.items():
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        found[computes] = {"value": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight.float()}  # float64: 15 GB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--active", type=int, nargs="+", default=[100, 75, 50, 25], help="active rows, per cent")
    args = arguments(__doc__, (16384,), 10, (128256, 151936), 4096, parser)
    peers = linear_peers(args.device, args.providers)
    compiled_ppo = torch.compile(ppo_of_logprob, dynamic=True)
    whole_losses = losses([liger], args.device, args.providers)
    scalar = {peer.name for peer in peers if peer.gives == "nll"}

    def all_of(inputs: Inputs) -> list[Provider]:
        return [
            ours("ours", inputs),
            ours("ours, no entropy", inputs, entropy=False),
            ours("ours, float32 logits", inputs, logits_dtype=torch.float32),
            *(of_peer(peer, inputs, compiled_ppo) for peer in peers),
            *(provider(inputs) for provider in whole_losses),
        ]

    D = args.hidden
    describe(all_of(Inputs(SLICE_TOKENS, 128, D, args.torch_dtype, args.device)))
    for T in args.tokens:
        for V in args.vocab:
            full, small = (Inputs(n, V, D, args.torch_dtype, args.device) for n in (T, SLICE_TOKENS))
            products = [product_yardstick(full.hidden_TD, full.weight_VD, n) for n in (1, 3)]
            for percent in args.active:
                full.activate(percent)
                small.activate(percent)
                flops = 6 * len(full.rows_N) * V * D
                providers = [*products, *all_of(full)]
                times = measure(providers, args.device, args.repeats, all_of(small), truths(small))
                title = (
                    f"linear_ppo_loss, loss and gradients: {T} tokens, {percent} % active, V = {V}, D = {D}, {args.dtype}, "
                    f"{flops / 1e12:.3g} TFLOP"
                )
                case = {"dtype": args.dtype, "tokens": T, "vocab": V, "hidden": D, "active": percent / 100}
                shares = report("linear_ppo_loss", title, case, providers, times, flops, "TFLOP/s", "matrix product")
                out = {"matrix product", "3 matrix products", *scalar}
                others = {name: share for name, share in shares.items() if name not in out and not name.startswith("ours")}
                targets = []
                if others and percent == 100:
                    fastest = max(others, key=others.__getitem__)
                    text = f"times as fast as {fastest}, the fastest with per-token outputs"
                    targets.append(Target(text, shares["ours"] / others[fastest], 1.25, at_most=False))
                if (T, V, D) == (16384, 128256, 4096):
                    limit = {100: 80, 50: 55}.get(percent)
                    if limit:
                        targets.append(Target(f"ms at {percent} % active rows", times["ours"].median_ms, limit))
                    if percent == 100 and times["ours"].extra_bytes is not None:
                        targets.append(Target("extra GB", times["ours"].extra_bytes / 1e9, 3.5))
                judge(targets)


if __name__ == "__main__":
    main()
