"""Bytes of all tensors alive at any moment, seen from below autograd and FSDP; memory inside a custom op is not seen."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return while it is on, and those of tensors handed to `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        """The most at any moment since it was last set to 0."""

    def add(self, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        total = 0
        for key, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()  # asked anew: FSDP shrinks a storage to nothing and keeps it
        return total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        self.peak = max(self.peak, self.now())
        return out
