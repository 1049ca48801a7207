"""Resumable state (torch.distributed.checkpoint, any number of ranks) and Hugging Face folders.

checkpoints/step_40/   sharded state, and in pending.json the responses begun; complete.json is written last, so a folder
                       without it is a save cut short
huggingface/step_40/   what transformers, vLLM and `rlsp train model.path=...` load
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedTokenizerBase

from rlsp_fast import dist
from rlsp_fast.config import Config
from rlsp_fast.model import DTYPES, Policy
from rlsp_fast.optim import Optimizer

_KEEP = 2  # the newest, and one to fall back on


def save(
    folder: Path, step: int, trained: dict[str, tuple[torch.nn.Module, Optimizer]], pending: Mapping[str, Any] | None = None
) -> Path:
    """Writes checkpoints/step_N under folder: weights, Adam moments and schedules of each trained module.

    Args:
        step: steps done; a resumed run starts at this step.
        trained: name -> (module, optimizer), e.g. actor and critic.
        pending: Pending.state(), the same on every rank.
    """
    path = folder / "checkpoints" / f"step_{step}"
    dcp.save(_state(trained), checkpoint_id=path)
    if dist.rank() == 0:
        num_updates = {name: optimizer.num_updates for name, (_, optimizer) in trained.items()}
        if pending is not None:
            (path / "pending.json").write_text(json.dumps(pending))
        partial = path / "complete.json.partial"
        partial.write_text(json.dumps({"step": step, "num_updates": num_updates}))
        partial.rename(path / "complete.json")
        for old in sorted(complete(folder))[:-_KEEP]:
            shutil.rmtree(folder / "checkpoints" / f"step_{old}")
    dist.barrier()
    return path


def load(folder: Path, step: int, trained: dict[str, tuple[torch.nn.Module, Optimizer]]) -> None:
    """Restores what save wrote, onto any number of ranks. Learning rates and betas stay those of the optimizers given."""
    path = folder / "checkpoints" / f"step_{step}"
    state = _state(trained)
    dcp.load(state, checkpoint_id=path)
    meta = json.loads((path / "complete.json").read_text())
    for name, (module, optimizer) in trained.items():
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.adamw.param_groups]
        set_state_dict(module, optimizer.adamw, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optim"])
        for group, ours in zip(optimizer.adamw.param_groups, settings, strict=True):
            group |= ours
        optimizer.skip_to(meta["num_updates"][name])


def load_pending(folder: Path, step: int) -> dict[str, Any] | None:
    """The pending state that save was given, None if it was given none. Every rank reads it, whatever their number."""
    path = folder / "checkpoints" / f"step_{step}" / "pending.json"
    return json.loads(path.read_text()) if path.exists() else None


def complete(folder: Path) -> list[int]:
    """Steps with a complete checkpoint under folder, ascending."""
    return sorted(json.loads(p.read_text())["step"] for p in (folder / "checkpoints").glob("step_*/complete.json"))


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, path: Path, config: Config) -> Path:
    """Writes the policy as a Hugging Face folder in model.dtype: config, safetensors, tokenizer, chat template."""
    policy.reshard()
    weights = get_model_state_dict(policy.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.rank() == 0:
        dtype = DTYPES[config.model.dtype]
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        policy.lm.save_pretrained(partial, state_dict=weights)
        policy.lm.config.dtype = dtype  # save_pretrained has written that of the float32 master weights
        policy.lm.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)  # a folder by this name is always whole
    dist.barrier()
    return path


def _state(trained: dict[str, tuple[torch.nn.Module, Optimizer]]) -> dict[str, Any]:
    state = {}
    for name, (module, optimizer) in trained.items():
        unused = not optimizer.adamw.state
        model, optim = get_state_dict(module, optimizer.adamw)
        if unused:  # get_state_dict has made the moments by a step with zero gradients, and counted it
            for moments in optimizer.adamw.state.values():
                moments["step"].zero_()
        state[name] = {"model": model, "optim": optim}
    return state
