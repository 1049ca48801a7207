"""What the Triton kernels compile to, with no GPU at hand: registers, spills, shared memory and load widths.

    python bench/cubins.py [--check] [--only NAME]

Compiles every kernel as the launchers would specialise it for a large vocabulary, for sm_80, sm_90 and sm_100, and prints a
table. Without --check it writes bench/cubins.csv; with it it fails where a kernel spills, loads rows narrower than 16 bytes,
or (with the Triton version of bench/cubins.csv) needs over 10 % more registers or any more shared memory than recorded.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from rlsp_kernels.backend import LAUNCH, _scale_kernel, blocks, tile_shape
from rlsp_kernels.kl import _kl_penalty_kernel
from rlsp_kernels.logprob_entropy import (
    GRAD_BLOCK,
    GRAD_PER_WARP,
    MOST_THREADS,
    TILE_ROWS,
    _logprob_entropy_grad_kernel,
    _logprob_entropy_kernel,
)
from rlsp_kernels.ppo_loss import MOST_THREADS as PPO_THREADS
from rlsp_kernels.ppo_loss import TILE_ROWS as PPO_ROWS
from rlsp_kernels.ppo_loss import _ppo_loss_kernel, _reduce_kernel
from rlsp_kernels.value_loss import _value_loss_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing: unset TRITON_INTERPRET"

RECORD = Path(__file__).parent / "cubins.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
LLAMA, QWEN, GPT2 = 128256, 151936, 50257  # the last is odd: its rows begin anywhere


def row_args(dtype: str, V: int, **options: object) -> dict[str, object]:
    """Arguments that the kernels on rows of logits share: a pointer is its type, a number stands for itself."""
    return {
        "logits_ptr": dtype, "token_ptr": "*i64", "temperature_ptr": None, "logits_stride_t": V, "dlogits_stride_t": V, "V": V,
        "temperature": 0.7, "logit_scale": 0.5, "softcap": 1.0, "ALIGNED": V % 16 == 0, "HAS_SOFTCAP": False,
        "NEED_ENTROPY": True, "stats_stride": 16384, "first_token": 0, "stats_ptr": "*fp32", "entropy_ptr": "*fp32",
    } | options  # fmt: skip


def tile(dtype: str, V: int, most_rows: int, most_threads: int) -> tuple[dict[str, object], int]:
    """The constants of a tile, and its warps."""
    shape = tile_shape(V, torch.float32 if dtype == "*fp32" else torch.bfloat16, most_rows, most_threads)
    return dict(zip(("ROWS", "THREADS", "VECTOR"), shape, strict=True)), shape[1] // 32


def forward(dtype: str, V: int, **options: object) -> tuple[object, dict[str, object], int]:
    constants, num_warps = tile(dtype, V, TILE_ROWS, MOST_THREADS)
    args = row_args(dtype, V, logprob_ptr="*fp32") | constants
    return _logprob_entropy_kernel, args | options, num_warps


def grad(dtype: str, V: int, **options: object) -> tuple[object, dict[str, object], int]:
    block, num_warps = blocks(V, most=GRAD_BLOCK, per_warp=GRAD_PER_WARP)
    args = row_args(dtype, V, dlogits_ptr=dtype, dlogprob_ptr="*fp32", dentropy_ptr="*fp32", num_blocks=-(-V // block))
    return _logprob_entropy_grad_kernel, args | {"BLOCK": block} | options, num_warps


def ppo(dtype: str, V: int, **options: object) -> tuple[object, dict[str, object], int]:
    constants, num_warps = tile(dtype, V, 1 if options.get("HAS_SOFTCAP") else PPO_ROWS, PPO_THREADS)
    columns = ("columns", "old_logprob", "advantage", "weight", "importance_weight", "ref_logprob")
    args = row_args(dtype, V, dlogits_ptr=dtype, columns_stride=16384) | {f"{name}_ptr": "*fp32" for name in columns}
    args |= {name: 0.2 for name in ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef")}
    args |= {"HAS_G_ENTROPY": True, "HAS_DUAL": True, "KL_KIND": 3} | constants
    return _ppo_loss_kernel, args | options, num_warps


PLAIN = {"HAS_G_ENTROPY": False, "HAS_DUAL": False, "importance_weight_ptr": None, "ref_logprob_ptr": None}
SOFTCAP = {"HAS_SOFTCAP": True, "softcap": 30.0}
PER_TOKEN = {"temperature_ptr": "*fp32"}
SMALL = {"size": 16384, "BLOCK": 1024}

# Name -> kernel, arguments, warps.
KERNELS = {
    "logprob_entropy bf16": forward("*bf16", LLAMA),
    "logprob_entropy bf16 no entropy": forward("*bf16", LLAMA, NEED_ENTROPY=False),
    "logprob_entropy fp32": forward("*fp32", LLAMA),
    "logprob_entropy bf16 odd V": forward("*bf16", GPT2),
    "logprob_entropy bf16 softcap": forward("*bf16", QWEN, **SOFTCAP, **PER_TOKEN),
    "logprob_entropy_grad bf16": grad("*bf16", LLAMA),
    "logprob_entropy_grad bf16 no entropy": grad("*bf16", LLAMA, dentropy_ptr=None),
    "logprob_entropy_grad fp32": grad("*fp32", LLAMA),
    "logprob_entropy_grad bf16 odd V": grad("*bf16", GPT2),
    "logprob_entropy_grad bf16 softcap": grad("*bf16", QWEN, **SOFTCAP, **PER_TOKEN),
    "ppo_loss bf16": ppo("*bf16", LLAMA),
    "ppo_loss bf16 plain": ppo("*bf16", LLAMA, **PLAIN),
    "ppo_loss fp32": ppo("*fp32", LLAMA),
    "ppo_loss fp32 to bf16": ppo("*fp32", LLAMA, dlogits_ptr="*bf16"),
    "ppo_loss bf16 odd V": ppo("*bf16", GPT2),
    "ppo_loss bf16 softcap": ppo("*bf16", QWEN, **SOFTCAP, **PER_TOKEN),
    "logprob_entropy fp16": forward("*fp16", LLAMA),
    "logprob_entropy fp32 odd V": forward("*fp32", GPT2),
    "logprob_entropy_grad fp16": grad("*fp16", LLAMA),
    "ppo_loss fp16": ppo("*fp16", LLAMA),
    "ppo_loss bf16 V 4096": ppo("*bf16", 4096),
    "ppo_loss bf16 no gradient": ppo("*bf16", LLAMA, dlogits_ptr=None),
    "ppo_loss reduce": (
        _reduce_kernel,
        {"out_ptr": "*fp64", "columns_ptr": "*fp32", "size": 16384, "BLOCK": 1024},
        8,
    ),
    "kl_penalty": (
        _kl_penalty_kernel,
        {"out_ptr": "*fp32", "dkl_ptr": None, "logprob_ptr": "*fp32", "ref_logprob_ptr": "*fp32", "KIND": 3} | SMALL,
        4,
    ),
    "kl_penalty grad": (
        _kl_penalty_kernel,
        {"out_ptr": "*fp32", "dkl_ptr": "*fp32", "logprob_ptr": "*fp32", "ref_logprob_ptr": "*fp32", "KIND": 3} | SMALL,
        4,
    ),
    "value_loss": (
        _value_loss_kernel,
        {f"{name}_ptr": "*fp32" for name in ("partial", "dvalue", "value", "old_value", "return", "weight")}
        | {"clip": 0.2, "HAS_CLIP": True}
        | SMALL,
        4,
    ),
    "scale_ bf16": (
        _scale_kernel,
        {"out_ptr": "*bf16", "x_ptr": "*bf16", "factor_ptr": "*fp32", "out_stride": LLAMA, "stride": LLAMA, "size": LLAMA}
        | {"num_blocks": 16, "INPLACE": False, "BLOCK": 8192},
        8,
    ),
}  # fmt: skip


def compile_kernel(kernel: object, args: dict[str, object], num_warps: int, architecture: int) -> dict[str, object]:
    """Its figures on one architecture."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = args[parameter.name]
        if parameter.is_constexpr or value is None or value is True or (value == 1 and isinstance(value, int)):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, str):
            signature[parameter.name], attributes[(i,)] = value, [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, **LAUNCH}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout))
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(numbers["REG"]),
        "stack_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),  # spills live there
        "shared_bytes": compiled.metadata.shared,
        "loads_16_bytes": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "loads_2_or_4_bytes": len(re.findall(r"ld\.global(?!\S*\.v[248])\S*\.b(?:16|32)", ptx)),
        "stores_16_bytes": len(re.findall(r"st\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "warps": num_warps,
    }


def complaints(name: str, now: dict[str, object], recorded: dict[str, str] | None) -> list[str]:
    """What is wrong with the figures of one kernel on one architecture."""
    wrong = []
    if now["stack_bytes"]:
        wrong.append(f"{now['stack_bytes']} bytes of stack: it spills")
    if not now["loads_16_bytes"]:
        wrong.append("no 16-byte loads")
    if name.startswith("ppo_loss bf16") and now["stores_16_bytes"] and now["warps"] == 32 and now["registers"] <= 32:
        wrong.append("two rows fit an SM: twice as many in flight as L2 is meant to hold")
    if recorded is not None and recorded["triton"] == triton.__version__:
        if now["registers"] > 1.1 * int(recorded["registers"]):
            wrong.append(f"{now['registers']} registers, {recorded['registers']} recorded")
        if now["shared_bytes"] > int(recorded["shared_bytes"]):
            wrong.append(f"{now['shared_bytes']} bytes of shared memory, {recorded['shared_bytes']} recorded")
        if now["loads_16_bytes"] < int(recorded["loads_16_bytes"]):
            wrong.append(f"{now['loads_16_bytes']} 16-byte loads, {recorded['loads_16_bytes']} recorded")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with bench/cubins.csv instead of writing it")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    args = parser.parse_args()
    recorded = {}
    if RECORD.exists():
        with RECORD.open() as file:
            recorded = {(row["kernel"], row["architecture"]): row for row in csv.DictReader(file)}
    rows, failed = [], 0
    for name, (kernel, arguments, num_warps) in KERNELS.items():
        if not name.startswith(args.only):
            continue
        for architecture in ARCHITECTURES:
            now = compile_kernel(kernel, arguments, num_warps, architecture)
            key = {"kernel": name, "architecture": f"sm_{architecture}"}
            wrong = complaints(name, now, recorded.get(tuple(key.values())) if args.check else None)
            failed += bool(wrong)
            print(f"{name:38} sm_{architecture:<4}", *(f"{k} {v}" for k, v in now.items()), *wrong, flush=True)
            rows.append(key | now | {"triton": triton.__version__})
    if not args.check and not args.only:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(rows)} compiled, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
