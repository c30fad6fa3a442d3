"""Watches what torch does: which operators run and how often, the largest tensor made, the bytes
that are alive at once."""
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree) -> list[torch.Tensor]:
    """All tensors in lists and dictionaries of whatever."""
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Allocations(TorchDispatchMode):
    """Inside `with`: `elements` of the largest tensor made, `live` bytes of storages made here and
    not freed, their `peak`.

    Sees every operator's results, in backward too; not the scratch memory inside an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for x in tensors(out):
            if x.untyped_storage()._cdata not in given:  # neither a view nor in place
                self.note(x)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.elements = max(self.elements, storage.nbytes() // tensor.itemsize)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


class Operators(TorchDispatchMode):
    """Inside `with`: how often each operator ran, by its name without its overload ("mm"), in
    backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
