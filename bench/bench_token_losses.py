"""How near to the memory bandwidth do kl_penalty and value_loss come?

    python bench/bench_token_losses.py [--device cpu|cuda] [--tokens 16384 1048576 16777216] [--repeats 50]

Forward and backward over T packed float32 tokens, called as a trainer calls them, autograd and all.

  kl_penalty   28 bytes a token: log-probability and reference read, KL written; both read again with the upstream gradient,
               the gradient written
  value_loss   20 bytes a token: value, old value, return and weight read, gradient written; the loss is one number

At 16384 tokens that is less than half a megabyte: launching costs more than moving, and the microseconds count, not the GB/s.
"share" is of what torch's copy_ of as many bytes reaches in the same run. Errors are against float64 on 256 tokens.
"""

from collections.abc import Callable, Sequence

import torch
from rlsp_kernels import kl_penalty, value_loss
from timing import SLICE_TOKENS, Provider, Results, arguments, copy_yardstick, measure, report
from torch import Tensor

BYTES_A_TOKEN = {"kl_penalty": 28, "value_loss": 20}


def eager_kl(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """k3, the way trainers write it: without expm1 and a clamp."""
    log_ratio_T = ref_logprob_T - logprob_T
    return log_ratio_T.exp() - log_ratio_T - 1


def eager_value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, weight_T: Tensor) -> Tensor:
    """The clipped value loss, the way trainers write it."""
    clipped_T = old_value_T + (value_T - old_value_T).clamp(-0.2, 0.2)
    return 0.5 * (torch.maximum((value_T - return_T) ** 2, (clipped_T - return_T) ** 2) * weight_T).sum()


def tensors(T: int, device: str) -> list[Tensor]:
    """Value, old value, return, weight; as log-probabilities the first two serve as well. The first takes a gradient."""
    g = torch.Generator(device).manual_seed(0)
    first, other, return_T = (torch.randn(T, generator=g, device=device) for _ in range(3))
    first, other = 0.2 * first + 0.2 * other, 0.2 * other  # differences that the clip catches now and then
    return [first.requires_grad_(), other, return_T, torch.rand(T, generator=g, device=device) / T]


def kl_provider(name: str, function: Callable[[Tensor, Tensor], Tensor], inputs: Sequence[Tensor], package: str) -> Provider:
    """KL of every token and its gradient, with an upstream gradient that differs from token to token."""
    logprob_T, ref_logprob_T, upstream_T, _ = inputs

    def call(_: object) -> Results:
        kl_T = function(logprob_T, ref_logprob_T)
        return {"value": kl_T.detach(), "d_logprob": torch.autograd.grad(kl_T, logprob_T, upstream_T)[0]}

    return Provider(name, call, package=package)


def value_provider(name: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], package: str) -> Provider:
    """The value loss and its gradient."""

    def call(_: object) -> Results:
        loss = function(*inputs)
        return {"value": loss.detach(), "d_value": torch.autograd.grad(loss, inputs[0])[0]}

    return Provider(name, call, package=package)


def main() -> None:
    args = arguments(__doc__, (16384, 1 << 20, 1 << 24), 50)
    ours = {
        "kl_penalty": lambda logprob_T, ref_logprob_T: kl_penalty(logprob_T, ref_logprob_T, "k3"),
        "value_loss": lambda *inputs: value_loss(*inputs, clip=0.2)[0],
    }
    eager = {"kl_penalty": eager_kl, "value_loss": eager_value_loss}
    compiled = {op: torch.compile(function, dynamic=True) for op, function in eager.items()}
    make = {"kl_penalty": kl_provider, "value_loss": value_provider}
    for T in args.tokens:
        for op, num_bytes in BYTES_A_TOKEN.items():

            def all_of(inputs: Sequence[Tensor], op: str = op) -> list[Provider]:
                functions = (("ours", ours, ""), ("torch eager", eager, "torch"), ("torch.compile", compiled, "torch"))
                return [make[op](name, of[op], inputs, package) for name, of, package in functions]

            full, small = tensors(T, args.device), tensors(SLICE_TOKENS, args.device)
            exact = [x.detach().double() for x in small]
            truth = make[op]("", eager[op], [exact[0].requires_grad_(), *exact[1:]], "").call(None)
            providers = [copy_yardstick(args.device, num_bytes * T), *all_of(full)]
            times = measure(providers, args.device, args.repeats, all_of(small), {"": truth})
            title = f"{op}, forward and backward: {T} tokens, {num_bytes * T / 1e6:.3g} MB"
            case = {"op": op, "dtype": "float32", "tokens": T}
            report("token_losses", title, case, providers, times, num_bytes * T, "GB/s", "copy")


if __name__ == "__main__":
    main()
