"""The kernels under the names of other trainers: `trl.apply()`, `verl.apply()`, `openrlhf.apply()`; each with `revert()`.

Nothing of a trainer is imported before apply() is called.
"""

from rlsp_kernels.patch import openrlhf, trl, verl

__all__ = ["openrlhf", "trl", "verl"]
