"""vLLM as the workers of bench/compare.py use it."""

import torch


def keep_loadable() -> None:
    """On a CPU vLLM multiplies with a linear layer's own weights, in every trainer alike.

    Its CPU build packs them anew after loading and throws them away, so that model.load_weights, by which TRL pushes, fails:
    `'Parameter' object has no attribute 'weight_loader'` (vLLM 0.30 and 0.32).
    """
    if torch.cuda.is_available():
        return
    from vllm.model_executor.layers import utils

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
