"""What does linear_logprob_entropy cost beside the bare matrix product?

    python bench/bench_linear_logprob_entropy.py [--device cpu|cuda] [--tokens 16384] [--vocab 128256 151936] [--hidden 4096]

Log-probability and entropy from hidden states (T, D) and the output projection (V, D), never holding (T, V).

  no grad               2 T V D FLOPs, one matrix product: what old and reference log-probabilities need
  forward and backward  6 T V D FLOPs: logits and two gradients. Per-token outputs without the logits kept need a fourth product
                        (the logits again), so 75 % is the most such a provider can show here; those that need none of it
                        (scalar losses, or the logits kept) can show 100 %

The logits through device memory and back are 2 T V size bytes more, at T = 16384 and V = 128256 in bf16 8.4 GB: 2 ms on an H200
beside the product's 22 to 25. "share" is of the rate of the bare product of all tokens, which is measured in the same run and
writes the whole (T, V). Errors are against float64 on 256 tokens, from the same rounded inputs: for each provider against its
own task. Hidden states in bf16 are multiplied into bf16 logits by most, so the errors are those of rounding a logit, unless the
provider says otherwise.
"""

import torch
from peers import Peer, eager_logprob_entropy, linear_peers
from rlsp_kernels import linear_logprob_entropy
from timing import SLICE_TOKENS, Provider, Results, Target, arguments, describe, judge, measure, product_yardstick, report
from torch import Tensor

OURS = [
    Peer("ours", "", "both", "", linear_logprob_entropy),
    Peer(
        "ours, no entropy", "", "logprob", "the same without the entropy, for the peers that have none",
        lambda hidden, weight, token: linear_logprob_entropy(hidden, weight, token, need_entropy=False)[0],
    ),
    Peer(
        "ours, float32 logits", "", "both", "",
        lambda hidden, weight, token: linear_logprob_entropy(hidden, weight, token, logits_dtype=torch.float32),
    ),
]  # fmt: skip
COMPUTES = {"both": "", "logprob": "no entropy", "nll": "sum of NLL"}


class Inputs:
    """Hidden states, projection, tokens and upstream gradients that differ from row to row."""

    def __init__(self, T: int, V: int, D: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.weight_VD = (3 / D**0.5 * torch.randn(V, D, generator=g, device=device)).to(dtype).requires_grad_()
        self.hidden_TD = torch.randn(T, D, generator=g, device=device).to(dtype).requires_grad_()
        self.token_T = torch.randint(V, (T,), generator=g, device=device)
        self.d_logprob_T, self.d_entropy_T = torch.randn(2, T, generator=g, device=device)


def no_grad(peer: Peer, inputs: Inputs) -> Provider:
    """Values alone."""

    def call(_: object) -> Results:
        with torch.no_grad():
            results = peer.op(inputs.hidden_TD, inputs.weight_VD, inputs.token_T)
        return dict(zip(("value", "entropy"), results if peer.gives == "both" else (results,), strict=False))

    return Provider(peer.name, call, COMPUTES[peer.gives], peer.lacks, peer.package)


def forward_backward(peer: Peer, inputs: Inputs) -> Provider:
    """Values and both gradients."""

    def call(_: object) -> Results:
        results = peer.op(inputs.hidden_TD, inputs.weight_VD, inputs.token_T)
        results = results if peer.gives == "both" else (results,)
        upstream = [inputs.d_logprob_T, inputs.d_entropy_T.to(results[-1].dtype)][: len(results)]
        upstream = [None] if peer.gives == "nll" else upstream
        d_hidden, d_weight = torch.autograd.grad(results, (inputs.hidden_TD, inputs.weight_VD), upstream)
        return {"d_hidden": d_hidden, "d_weight": d_weight}

    return Provider(peer.name, call, COMPUTES[peer.gives], peer.lacks, peer.package)


def truths(inputs: Inputs) -> dict[str, Results]:
    """Results in float64 of each task."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (inputs.hidden_TD, inputs.weight_VD)]
    logprob_T, entropy_T = eager_logprob_entropy(leaves[0] @ leaves[1].T, inputs.token_T)
    d_logprob_T, d_entropy_T = inputs.d_logprob_T.double(), inputs.d_entropy_T.double()
    of_both = torch.autograd.grad((logprob_T, entropy_T), leaves, (d_logprob_T, d_entropy_T), retain_graph=True)
    of_logprob = torch.autograd.grad(logprob_T, leaves, d_logprob_T, retain_graph=True)
    of_nll = torch.autograd.grad(-logprob_T.sum(), leaves)
    logprob_T, entropy_T = logprob_T.detach(), entropy_T.detach()

    def named(gradients: tuple[Tensor, ...]) -> Results:  # kept in float32: at V = 151936 in float64 they take 15 GB
        return {name: gradient.float() for name, gradient in zip(("d_hidden", "d_weight"), gradients, strict=True)}

    return {
        "": {"value": logprob_T, "entropy": entropy_T} | named(of_both),
        "no entropy": {"value": logprob_T} | named(of_logprob),
        "sum of NLL": {"value": -logprob_T.sum()} | named(of_nll),
    }


def main() -> None:
    args = arguments(__doc__, (16384,), 10, (128256, 151936), 4096)
    peers = OURS + linear_peers(args.device, args.providers)
    D = args.hidden
    describe([no_grad(peer, Inputs(1, 8, D, args.torch_dtype, args.device)) for peer in peers])
    for T in args.tokens:
        for V in args.vocab:
            full, small = (Inputs(n, V, D, args.torch_dtype, args.device) for n in (T, SLICE_TOKENS))
            truth = truths(small)
            product = product_yardstick(full.hidden_TD, full.weight_VD)
            for phase, run, products in (("no grad", no_grad, 1), ("forward and backward", forward_backward, 3)):
                flops = 2 * products * T * V * D
                providers = [product, *(run(peer, full) for peer in peers)]
                on_slice = [run(peer, small) for peer in peers]
                times = measure(providers, args.device, args.repeats, on_slice, truth)
                title = f"linear_logprob_entropy, {phase}: {T} tokens, V = {V}, D = {D}, {args.dtype}, {flops / 1e12:.3g} TFLOP"
                case = {"phase": phase, "dtype": args.dtype, "tokens": T, "vocab": V, "hidden": D}
                shares = report("linear_logprob_entropy", title, case, providers, times, flops, "TFLOP/s", "matrix product")
                if phase == "no grad":
                    judge([Target(f"time over the bare matrix product, V = {V}", 1 / shares["ours"], 1.08)])


if __name__ == "__main__":
    main()
