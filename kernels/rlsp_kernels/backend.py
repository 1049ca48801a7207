"""Which implementation of an op runs, and the options that every Triton launch shares."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

# ex2(x * c - m) as one fused multiply-add each: Triton 3.10 turns fusion off unless asked.
LAUNCH = {"enable_fp_fusion": True}

CPU_BLOCK = 1 << 20  # bytes of float32 logits; more, and what lies between two operators goes to fresh pages: bench/LOG.md

ROW_ALIGN = 16  # elements: 32 bytes of bf16, a multiple of the 16 bytes of one vector load in every dtype


def runs_triton(backend: Backend, tensor: Tensor) -> bool:
    """Whether the op runs in Triton: "auto" means on a GPU, in float32, float16 and bfloat16. float64 is always plain torch.

    Raises:
        ValueError: on another name.
        RuntimeError: when Triton is asked for by name and cannot run on this tensor.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be auto, torch or triton, got {backend!r}")
    if backend == "auto":
        return tensor.device.type in ("cuda", "xpu") and tensor.dtype != torch.float64
    if backend == "triton":
        if tensor.dtype == torch.float64:
            raise RuntimeError("backend='triton' computes in float32; float64 runs in plain torch (backend='torch')")
        if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "backend='triton' on a CPU tensor needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
            )
    return backend == "triton"


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """One device for all: a kernel would read another's memory."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the others on {like.device}: move them to one device")


def row_blocks(logits_TV: Tensor) -> list[slice]:
    """Rows that plain torch works on at a time: on a CPU few, so that what lies between two operators stays in the caches."""
    T, V = logits_TV.shape
    rows = max(1, CPU_BLOCK // (max(V, 1) * max(logits_TV.itemsize, 4))) if logits_TV.device.type == "cpu" else T
    return [slice(start, min(start + rows, T)) for start in range(0, T, max(1, rows))] or [slice(0, 0)]


def blocks(size: int, most: int, per_warp: int) -> tuple[int, int]:
    """Block for a loop over `size` elements, and its number of warps."""
    block = min(most, max(64, triton.next_power_of_2(size)))
    return block, max(1, block // per_warp)


def tile_shape(V: int, dtype: torch.dtype, most_rows: int, most_threads: int) -> tuple[int, int, int]:
    """(rows, threads, elements of one 16-byte load) of the tiles that a row of V logits is read in."""
    vector = 16 // dtype.itemsize
    loads = triton.next_power_of_2(triton.cdiv(V, vector))
    threads = max(32, min(most_threads, loads))
    return max(1, min(most_rows, loads // threads)), threads, vector


@triton.jit
def _scale_kernel(out_ptr, x_ptr, factor_ptr, out_stride, stride, size, num_blocks, INPLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if (factor != 1) | (not INPLACE):
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        i = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + i, mask=i < size).to(tl.float32)
        tl.store(out_ptr + row * out_stride + i, (x * factor).to(out_ptr.dtype.element_ty), mask=i < size)


def _scale(out: Tensor, x: Tensor, factor: Tensor) -> None:
    rows, size = x.shape
    num_blocks = triton.cdiv(size, 8192)
    _scale_kernel[(rows * num_blocks,)](
        out, x, factor, out.stride(0), x.stride(0), size, num_blocks, INPLACE=out is x, BLOCK=8192, num_warps=8, **LAUNCH
    )


@torch.library.custom_op("rlsp_kernels::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    """x *= factor for (N, M) x and 0-d factor; nothing is read or written where it is 1, as a loss's gradient mostly is."""
    if runs_triton(backend, x):
        _scale(x, x, factor)
    elif x.device.type != "cpu" or factor != 1:  # looking would wait for a GPU
        x.mul_(factor)


@scale_.register_fake
def _(x, factor, backend):
    return None


@torch.library.custom_op("rlsp_kernels::scaled", mutates_args=())
def scaled(x: Tensor, factor: Tensor, backend: str) -> Tensor:
    """x * factor for (N, M) x and 0-d factor, multiplied in float32: torch rounds the factor to bf16 first."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if runs_triton(backend, x):
        _scale(out, x, factor)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        out.copy_(x.to(wide) * factor.to(wide))
    return out


@scaled.register_fake
def _(x, factor, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
