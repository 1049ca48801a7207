"""How near to one read and one write of the logits does ppo_loss come?

    python bench/bench_ppo_loss.py [--device cpu|cuda] [--tokens 16384] [--vocab 128256 151936] [--repeats 20]

The loss and its gradient with respect to the logits, from logits (T, V) of `size` bytes an element: policy gradient with low,
high and dual clip, k3 KL to a reference, entropy bonus, a weight per token. 8 sequences; advantages are equal within one,
because Liger's are.

  bytes     2 T V size: the logits read once, the gradient written once. A provider that reads them again for the gradient moves
            3 T V size, so it cannot come above 67 % of the copy bandwidth in this table.

Providers:
  ours                          everything, the gradient over the logits
  ours, no entropy              entropy_coef 0 and no entropy metric: what Liger's loss computes
  ours, into new memory         inplace=False
  ours, logprob_entropy + torch the swappable unit: 2 reads and 1 write, the loss on (T,) tensors by torch.compile
  liger triton_grpo_loss        Liger's whole loss
  quack cross_entropy_fwd, dx   cross entropy and its gradient, the row kept on chip: 1 read and 1 write, but no policy gradient
  others                        their log-probabilities, then the loss on (T,) tensors by torch.compile
"share" is of what torch's copy_ reaches in the same run. Errors are against float64 on 256 tokens of the same vocabulary: for
each provider against its own task.
"""

from collections.abc import Callable

import torch
from peers import LmHead, Peer, PPOSettings, eager_logprob_entropy, logits_peers, losses, need_gpu, ppo_of_logprob
from rlsp_kernels import logprob_entropy, ppo_loss
from timing import SLICE_TOKENS, Provider, Results, Target, arguments, copy_yardstick, describe, judge, measure, report
from torch import Tensor

SETTINGS = PPOSettings()
SEQUENCES = 8
TWO_OPS = Peer(
    "ours, logprob_entropy + torch", "", "both", "", lambda logits, token, inplace: logprob_entropy(
        logits, token, inplace_backward=inplace
    ),
)  # fmt: skip


class Inputs:
    """Logits (T, V) and what the loss needs beside them; ratios that the clips catch on both sides."""

    def __init__(self, T: int, V: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.logits_TV = torch.empty(T, V, dtype=dtype, device=device)
        self.token_T = torch.randint(V, (T,), generator=g, device=device)
        logprobs = []
        for rows, token in zip(self.logits_TV.split(1024), self.token_T.split(1024), strict=True):
            rows.copy_(3 * torch.randn(rows.shape, generator=g, device=device))
            logprobs.append(eager_logprob_entropy(rows, token)[0])
        logprob_T = torch.cat(logprobs)
        self.old_logprob_T = logprob_T + 0.3 * torch.randn(T, generator=g, device=device)
        self.ref_logprob_T = logprob_T + 0.3 * torch.randn(T, generator=g, device=device)
        self.advantage_S = torch.randn(SEQUENCES, generator=g, device=device)
        self.advantage_T = self.advantage_S.repeat_interleave(T // SEQUENCES)
        self.weight_T = torch.full((T,), 1 / T, device=device)
        self.head = LmHead(self.logits_TV.clone())

    def restore(self) -> None:
        """Undoes what a provider wrote over the logits."""
        self.head.d_logits = None
        self.head.logits.copy_(self.logits_TV)


def ours(name: str, inputs: Inputs, entropy: bool = True, inplace: bool = True) -> Provider:
    """The fused loss."""

    def call(_: object) -> Results:
        loss, _ = ppo_loss(
            inputs.head.forward(),
            inputs.token_T,
            inputs.old_logprob_T,
            inputs.advantage_T,
            inputs.weight_T,
            ref_logprob_T=inputs.ref_logprob_T,
            kl_kind="k3",
            **SETTINGS.ours(entropy),
            inplace=inplace,
        )
        loss.backward()
        return {"value": loss.detach(), "d_logits": inputs.head.d_logits}

    return Provider(name, call, "" if entropy else "no entropy", before=inputs.restore)


def of_peer(peer: Peer, inputs: Inputs, compiled_ppo: Callable[..., Tensor]) -> Provider:
    """A peer's log-probabilities, then the loss on (T,) tensors."""

    def call(_: object) -> Results:
        results = peer.op(inputs.head.forward(), inputs.token_T, True)
        logprob_T, entropy_T = results if peer.gives == "both" else (results, None)
        loss = compiled_ppo(
            logprob_T,
            entropy_T,
            inputs.old_logprob_T,
            inputs.ref_logprob_T,
            inputs.advantage_T,
            inputs.weight_T,
            SETTINGS,
        )
        loss.backward()
        return {"value": loss.detach(), "d_logits": inputs.head.d_logits}

    return Provider(
        peer.name, call, "" if peer.gives == "both" else "no entropy", peer.lacks, peer.package, before=inputs.restore
    )


def liger(device: str) -> Callable[[Inputs], Provider]:
    """triton_grpo_loss on logits (sequences, length + 1, V): one more row a sequence than it uses."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    need_gpu(device)

    def provider(inputs: Inputs) -> Provider:
        T, V = inputs.logits_TV.shape
        L = T // SEQUENCES
        head = LmHead(inputs.logits_TV.new_zeros(SEQUENCES, L + 1, V))

        def before() -> None:
            head.d_logits = None
            head.logits[:, :-1].copy_(inputs.logits_TV.view(SEQUENCES, L, V))

        def call(_: object) -> Results:
            loss, _ = triton_grpo_loss(
                head.forward(),
                inputs.old_logprob_T.view(SEQUENCES, L),
                inputs.ref_logprob_T.view(SEQUENCES, L),
                inputs.token_T.view(SEQUENCES, L),
                inputs.advantage_S,
                torch.ones(SEQUENCES, L, device=device),
                temperature=1.0,
                beta=SETTINGS.kl_coef,
                eps_low=SETTINGS.clip_ratio_low,
                eps_high=SETTINGS.clip_ratio_high,
                inplace=True,
                loss_type="bnpo",
                reduce=True,
                delta=SETTINGS.dual_clip,
            )
            loss.backward()
            return {"value": loss.detach(), "d_logits": head.d_logits[:, :-1]}

        lacks = "no entropy, no KL but k3, one advantage a sequence, padded (S, L + 1, V), compiles anew for each L"
        return Provider("liger triton_grpo_loss", call, "no entropy", lacks, "liger-kernel", before)

    return provider


def quack(device: str) -> Callable[[Inputs], Provider]:
    """The cross entropy of every token and its gradient, in one launch."""
    from quack.cross_entropy import cross_entropy_fwd

    need_gpu(device)

    def provider(inputs: Inputs) -> Provider:
        def call(_: object) -> Results:
            nll_T, d_logits = cross_entropy_fwd(inputs.head.logits, inputs.token_T, return_dx=True, inplace_backward=True)
            return {"value": nll_T, "d_logits": d_logits}

        lacks = "no weight, advantage or ratio a token, no KL, no entropy, no temperature"
        return Provider("quack cross_entropy_fwd, dx", call, "sum of NLL", lacks, "quack-kernels", inputs.restore)

    return provider


def truths(inputs: Inputs) -> dict[str, Results]:
    """Loss and gradient in float64, with and without the entropy bonus."""
    found = {}
    for computes in ("", "no entropy"):
        x_TV = inputs.logits_TV.double().requires_grad_()
        logprob_T, entropy_T = eager_logprob_entropy(x_TV, inputs.token_T)
        others = (inputs.old_logprob_T, inputs.ref_logprob_T, inputs.advantage_T, inputs.weight_T)
        loss = ppo_of_logprob(logprob_T, None if computes else entropy_T, *(x.double() for x in others), SETTINGS)
        loss.backward()
        found[computes] = {"value": loss.detach(), "d_logits": x_TV.grad}
    x_TV = inputs.logits_TV.double().requires_grad_()
    nll_T = torch.nn.functional.cross_entropy(x_TV, inputs.token_T, reduction="none")
    nll_T.sum().backward()
    return found | {"sum of NLL": {"value": nll_T.detach(), "d_logits": x_TV.grad}}


def main() -> None:
    args = arguments(__doc__, (16384,), 20, (128256, 151936))
    peers = [TWO_OPS, *logits_peers(args.device, args.providers)]
    compiled_ppo = torch.compile(ppo_of_logprob)

    whole_losses = losses([liger, quack], args.device, args.providers)

    def all_of(inputs: Inputs) -> list[Provider]:
        return [
            ours("ours", inputs),
            ours("ours, no entropy", inputs, entropy=False),
            ours("ours, into new memory", inputs, inplace=False),
            *(of_peer(peer, inputs, compiled_ppo) for peer in peers),
            *(provider(inputs) for provider in whole_losses),
        ]

    describe(all_of(Inputs(SLICE_TOKENS, 128, args.torch_dtype, args.device)))
    for T in args.tokens:
        for V in args.vocab:
            num_bytes = 2 * T * V * torch.empty((), dtype=args.torch_dtype).element_size()
            full, small = (Inputs(n, V, args.torch_dtype, args.device) for n in (T, SLICE_TOKENS))
            providers = [copy_yardstick(args.device, num_bytes), *all_of(full)]
            times = measure(providers, args.device, args.repeats, all_of(small), truths(small))
            title = f"ppo_loss, loss and gradient: {T} tokens of {V}, {args.dtype}, {num_bytes / 1e9:.2f} GB"
            case = {"dtype": args.dtype, "tokens": T, "vocab": V}
            shares = report("ppo_loss", title, case, providers, times, num_bytes, "GB/s", "copy")
            one_read = ("copy", "quack cross_entropy_fwd, dx")
            others = {name: share for name, share in shares.items() if name not in one_read and not name.startswith("ours")}
            fastest = max(others, key=others.__getitem__)
            judge(
                [
                    Target(f"time over the 1-read-1-write floor, V = {V}", 1 / shares["ours"], 1.15),
                    Target(f"times as fast as {fastest}, V = {V}", shares["ours"] / others[fastest], 1.3, at_most=False),
                ]
            )


if __name__ == "__main__":
    main()
