"""What test_plan.py measures on one rank, two, and the first of eight: bytes of real models in training beside the plan's.

Run as: [torchrun --nproc-per-node 2] python tests/plan_ranks.py FOLDER [8], which prints the table of ratios plan / measured.
With 8 this process is rank 0 of eight whose peers are not there: collectives move nothing, and every buffer is as large as it
would be. (gloo's own reduce-scatter copies its input, which NCCL's does not: peaks of two ranks say nothing about a GPU.)
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import tiny
import torch
from live_bytes import LiveBytes
from rlsp_kernels import linear_ppo_loss, value_loss
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlsp_fast import dist, model, plan, shapes
from rlsp_fast.model import Critic, Policy
from rlsp_fast.optim import Optimizer
from rlsp_fast.packing import pack

MODELS = {  # sizes that two ranks cannot share evenly are among them
    "llama": LlamaConfig(
        vocab_size=1009, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=False,
    ),
    "qwen2, tied": Qwen2Config(
        vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        vocab_size=997, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
    ),
    "smollm2, a third as wide": LlamaConfig(
        vocab_size=16384, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True,
    ),
}  # fmt: skip
LENGTH, NUM_SEQUENCES = 128, 4  # equal lengths: SDPA pads nothing
T = LENGTH * NUM_SEQUENCES


def measure(name: str, folder: Path, device: torch.device, *, dtype: str, checkpointing: bool) -> dict[str, dict]:
    """{kind: {what: (planned, measured)}} in bytes, of a policy, a critic and a reference."""
    path = folder / name.replace(", ", "-").replace(" ", "-")
    if not (path / "config.json").exists():
        raise FileNotFoundError(path)
    config = tiny.recipe(
        str(path),
        model={"path": str(path), "dtype": dtype, "activation_checkpointing": checkpointing, "attention": "sdpa"},
        data={"max_prompt_length": LENGTH // 2},
        rollout={"max_response_length": LENGTH // 2},
        train={"max_tokens_per_micro_batch": T, "batch_size": 64, "mini_batch_size": 64},
    )
    job = plan.Job(config=config, shapes=shapes.read(str(path)), num_gpus=dist.world_size())
    found = {}
    for kind, build in {"policy": Policy, "critic": Critic, "reference": Policy}.items():
        trained = kind != "reference"
        module = model.build(build, config.model, str(path), device, dist.mesh(device), trained=trained)
        states = plan.states(job.shapes, kind, dist.world_size(), job.dtype_bytes)
        found[kind] = {"weights": (states.weights, bytes_of(module.parameters()))}
        if trained:
            found[kind] |= _train(module, kind, job, states)
    return found


def _train(module: Policy | Critic, kind: str, job: plan.Job, states: plan.States) -> dict:
    """Two micro-batches and an optimizer step; the second micro-batch finds gradients already there, as most do."""
    batch = pack([(tuple(range(LENGTH // 2)), tuple(range(LENGTH // 2 + 1))) for _ in range(NUM_SEQUENCES)])
    ones_T = torch.ones(T)
    weight_T = batch.mask_T / batch.mask_T.sum()

    def loss() -> torch.Tensor:
        if kind == "critic":
            return value_loss(module(batch), 0 * ones_T, ones_T, weight_T)[0]
        return module(
            batch,
            lambda hidden_TD, weight_VD, **head: linear_ppo_loss(
                hidden_TD, weight_VD, batch.token_T, -ones_T, ones_T, weight_T, **head
            )[0],
        )

    optimizer = Optimizer(module, job.config.optim, 1e-4, 10)
    gc.collect()
    gc.disable()  # what it would free in the middle was not the plan's to foresee
    with LiveBytes() as live:
        for parameter in module.parameters():
            live.add(parameter)
        loss().backward()
        gc.collect()
        standing = settled(live)
        kept = loss()
        behind_forward = settled(live) - standing
        live.peak = 0
        kept.backward()
        update_peak = live.peak - standing
        live.peak = 0
        with torch.no_grad():
            loss()
        annotate_peak = live.peak - standing
    gc.enable()
    module.reshard()  # parameters are the shards again
    gradients = bytes_of(p.grad for p in module.parameters())
    optimizer.step()
    adam = bytes_of(x for state in optimizer.adamw.state.values() for x in state.values())
    c, D = job.dtype_bytes, job.shapes.hidden_size
    root = c * plan._root(job.shapes, kind)  # gathered until backward ends
    of_loss = c * (job.shapes.head_parameters + T * D) if kind == "policy" else 4 * T * D
    return {
        "gradients": (states.gradients, gradients),
        "adam": (states.adam, adam),
        "kept for backward": (plan.activations(job, T), behind_forward - root - of_loss),
        "peak of an update": (plan.update_peak(job, kind).total, max(update_peak, behind_forward)),
        "peak of annotating": (plan.annotate_peak(job, kind).total, annotate_peak),
    }


def settled(live: LiveBytes) -> int:
    """Bytes alive once gloo's threads have let go of what they sent: the least within a moment."""
    if torch.distributed.get_backend() != "gloo" or dist.world_size() == 1:
        return live.now()
    dist.barrier()
    return min(live.now() for _ in range(25) if time.sleep(0.02) is None)


def bytes_of(tensors) -> int:
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in local)


def save_models(folder: Path) -> None:
    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name.replace(", ", "-").replace(" ", "-"))


def everything(folder: Path, device: torch.device) -> dict[str, dict]:
    """Every model in both dtypes, with and without recomputing; on several ranks two of the four."""
    settings = [("bfloat16", True), ("float32", False)]
    settings += [("bfloat16", False), ("float32", True)] if dist.world_size() == 1 else []
    return {
        f"{name}, {dtype}{', recomputed' if checkpointing else ''}": measure(
            name, folder, device, dtype=dtype, checkpointing=checkpointing
        )
        for name in MODELS
        for dtype, checkpointing in settings
    }


def pretend(num_ranks: int) -> torch.device:
    """Makes this process rank 0 of a group that is not there. Instead of dist.setup, whose gloo waits for peers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks)}
    torch.distributed.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    return torch.device("cpu")


def main() -> None:
    folder = Path(sys.argv[1])
    device = pretend(int(sys.argv[2])) if len(sys.argv) > 2 else dist.setup(timeout_s=120)
    torch.set_num_threads(1)
    if dist.rank() == 0:
        save_models(folder)
    dist.barrier()
    plan.LOGITS_BUDGET = 0  # inside the loss op, where LiveBytes does not see
    results = everything(folder, device)
    if dist.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
        for name, kinds in results.items():
            for kind, rows in kinds.items():
                ratios = "  ".join(f"{what} {planned / measured:.3f}" for what, (planned, measured) in rows.items())
                print(f"{name:46s} {kind:10s} {ratios}")
    dist.cleanup()


if __name__ == "__main__":
    main()
