"""How near to the memory bandwidth does logprob_entropy come?

    python bench/bench_logprob_entropy.py [--device cpu|cuda] [--tokens 16384] [--vocab 128256 151936] [--repeats 20]

Log-probability of one token a row and the entropy of the row, from logits (T, V) of `size` bytes an element.

  forward   T V size bytes: the logits are read once. The T-sized inputs and outputs are less than a thousandth of that.
  backward  2 T V size bytes: read once, the gradient written once, over the logits in place. Both upstream gradients are given,
            differ from row to row, and the forward that comes before is not timed.

No FLOP bound: one exponential an element is half the memory time on Hopper. "share" is of what torch's copy_ reaches in the
same run. Errors are against float64 on 256 tokens of the same vocabulary: for each provider against its own task.
"""

from collections.abc import Callable

import torch
from peers import LmHead, Peer, eager_logprob_entropy, logits_peers
from rlsp_kernels import logprob_entropy
from timing import SLICE_TOKENS, Provider, Results, Target, arguments, copy_yardstick, describe, judge, measure, report
from torch import Tensor

OURS = [
    Peer("ours", "", "both", "", lambda logits, token, inplace: logprob_entropy(logits, token, inplace_backward=inplace)),
    Peer(
        "ours, no entropy", "", "logprob", "the same without the entropy, for the peers that have none",
        lambda logits, token, inplace: logprob_entropy(logits, token, need_entropy=False, inplace_backward=inplace)[0],
    ),
]  # fmt: skip
COMPUTES = {"both": "", "logprob": "no entropy", "nll": "sum of NLL"}


class Inputs:
    """Logits (T, V), sampled tokens and upstream gradients that differ from row to row."""

    def __init__(self, T: int, V: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.logits_TV = torch.empty(T, V, dtype=dtype, device=device)
        for rows in self.logits_TV.split(1024):
            rows.copy_(3 * torch.randn(rows.shape, generator=g, device=device))
        self.token_T = torch.randint(V, (T,), generator=g, device=device)
        self.d_logprob_T, self.d_entropy_T = torch.randn(2, T, generator=g, device=device)
        self.head = LmHead(self.logits_TV.clone())


def outputs(results: object) -> tuple[Tensor, ...]:
    """logprob_T and, where there is one, entropy_T."""
    return results if isinstance(results, tuple) else (results,)


def forward(peer: Peer, inputs: Inputs) -> Provider:
    """The forward alone, keeping what the backward needs."""

    def call(_: object) -> Results:
        results = outputs(peer.op(inputs.head.forward(), inputs.token_T, False))
        return dict(zip(("value", "entropy"), results, strict=False))

    before = _restore(inputs) if "liger" in peer.name else lambda: None  # its forward overwrites the logits
    return Provider(peer.name, call, COMPUTES[peer.gives], peer.lacks, peer.package, before)


def backward(peer: Peer, inputs: Inputs, inplace: bool) -> Provider:
    """The backward alone; the gradient overwrites the logits where the provider can and `inplace` says so."""
    restore = _restore(inputs)

    def before() -> tuple[Tensor, ...]:
        restore()
        return outputs(peer.op(inputs.head.forward(), inputs.token_T, inplace))

    def call(results: tuple[Tensor, ...]) -> Results:
        torch.autograd.backward(results, [inputs.d_logprob_T, inputs.d_entropy_T][: len(results)])
        return {"d_logits": inputs.head.d_logits}

    name = f"{peer.name}, in place" if inplace else peer.name
    return Provider(name, call, COMPUTES[peer.gives], peer.lacks, peer.package, before)


def _restore(inputs: Inputs) -> Callable[[], None]:
    def restore() -> None:
        inputs.head.d_logits = None
        inputs.head.logits.copy_(inputs.logits_TV)

    return restore


def truths(inputs: Inputs) -> dict[str, Results]:
    """Results in float64, with and without the entropy's part."""
    x_TV = inputs.logits_TV.double().requires_grad_()
    logprob_T, entropy_T = eager_logprob_entropy(x_TV, inputs.token_T)
    d_logprob_TV = torch.autograd.grad(logprob_T, x_TV, inputs.d_logprob_T.double(), retain_graph=True)[0]
    d_entropy_TV = torch.autograd.grad(entropy_T, x_TV, inputs.d_entropy_T.double())[0]
    logprob_T, entropy_T = logprob_T.detach(), entropy_T.detach()
    return {
        "": {"value": logprob_T, "entropy": entropy_T, "d_logits": d_logprob_TV + d_entropy_TV},
        "no entropy": {"value": logprob_T, "d_logits": d_logprob_TV},
    }


def main() -> None:
    args = arguments(__doc__, (16384,), 20, (128256, 151936))
    peers = OURS + logits_peers(args.device, args.providers)
    overwriting = [peer for peer in peers if not peer.package or peer.package in ("flash-attn", "quack-kernels")]
    describe([forward(peer, Inputs(1, 8, args.torch_dtype, args.device)) for peer in peers])
    for T in args.tokens:
        for V in args.vocab:
            size = torch.empty((), dtype=args.torch_dtype).element_size()
            full, small = (Inputs(n, V, args.torch_dtype, args.device) for n in (T, SLICE_TOKENS))
            truth = truths(small)
            for phase, num_bytes in (("forward", T * V * size), ("backward", 2 * T * V * size)):
                copy = copy_yardstick(args.device, num_bytes)

                def all_of(inputs: Inputs, phase: str = phase) -> list[Provider]:
                    if phase == "forward":
                        return [forward(peer, inputs) for peer in peers]
                    in_place = [backward(peer, inputs, True) for peer in overwriting]
                    return in_place + [backward(peer, inputs, False) for peer in peers]

                providers = [copy, *all_of(full)]
                times = measure(providers, args.device, args.repeats, all_of(small), truth)
                title = f"logprob_entropy {phase}: {T} tokens of {V}, {args.dtype}, {num_bytes / 1e9:.2f} GB"
                case = {"phase": phase, "dtype": args.dtype, "tokens": T, "vocab": V}
                shares = report("logprob_entropy", title, case, providers, times, num_bytes, "GB/s", "copy")
                name, limit = ("ours", 0.88) if phase == "forward" else ("ours, in place", 0.85)
                judge([Target(f"share of the copy bandwidth, {phase}, V = {V}", shares[name], limit, at_most=False)])


if __name__ == "__main__":
    main()
