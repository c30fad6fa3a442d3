"""Tensors "on cuda" without a GPU: a shape, a type, strides and a device, but no memory and no numbers. The
project's own code runs on them as it is, one rank of any grid, in seconds.

    with rank_of(Grid...) as ...
"""
from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from allocations import tensors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import Grid, Hop

aten = torch.ops.aten
NO_CPU_TWIN = ("_fused_rms_norm", "silu_backward")


class NoDevice(FakeTensorMode):
    avoid_device_init = True

    def dispatch(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = tensors((args, kwargs))
        if str(kwargs.get("device")) == "meta" and given:
            kwargs["device"] = given[0].device
        return super().dispatch(operator, types, args, kwargs)


class Meter(TorchDispatchMode):
    def __init__(self, kernel: str = "flash") -> None:
        super().__init__()
        self.kernel = kernel
        self.live = Counter()
        self.peak = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = tensors((args, kwargs))
        kinds = {x.device.type for x in given}
        device = kwargs.get("device")
        if operator.namespace == "c10d" and "cpu" in kinds and "barrier" not in operator.__name__:
            raise RuntimeError(f"NCCL cannot send host tensors: {operator}")
        if kwargs.pop("pin_memory", False):
            kwargs["device"] = torch.device("cpu")
            return self.note(given, operator(*args, **kwargs))
        if not any(isinstance(x, FakeTensor) for x in given) and (device is None or device.type == "cpu"):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        if operator is aten._local_scalar_dense.default:
            x = args[0]
            return False if x.dtype == torch.bool else 2.0 if x.is_floating_point() else 2
        if operator is aten._to_copy.default:
            x = args[0]
            if kwargs.get("device") == x.device and kwargs.get("dtype", x.dtype) == x.dtype:
                return x
        if operator is aten._fused_adamw_.default and len(kinds) > 1:
            raise RuntimeError("mixed devices in fused adamw")
        out = self.note(given, operator(*args, **kwargs))
        if operator is aten._scaled_dot_product_flash_attention_backward.default:
            self.mark("cuda", scratch(self.kernel, *args[:5]))
        return out

    def note(self, given, out):
        old = {x.untyped_storage()._cdata for x in given}
        for x in tensors(out):
            storage = x.untyped_storage()
            if storage._cdata in old:
                continue
            old.add(storage._cdata)
            where = x.device.type
            self.live[where] += storage.nbytes()
            weakref.finalize(storage, self.live.subtract, {where: storage.nbytes()})
            self.mark(where)
        return out

    def mark(self, where, more=0):
        self.peak[where] = max(self.peak[where], self.live[where] + more)


def scratch(kernel, d_out, q, k, v, out) -> int:
    rows = 4 * q.numel() // q.shape[3]
    wide_q = 4 * q.numel()
    if kernel == "flash":
        grouped = 2 * k.nbytes // k.shape[1] * q.shape[1] if k.shape[1] != q.shape[1] else 0
        copies = sum(x.nbytes for x in (d_out, out) if not x.transpose(1, 2).is_contiguous())
        return wide_q + rows + grouped + copies
    raise NotImplementedError


class Sent:
    def __init__(self, kept) -> None:
        self.kept = kept

    def wait(self) -> None:
        self.kept.clear()


class MeteredGrid(Grid):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.sent = Counter()

    def all_reduce(self, x, group, *operation):
        self.sent[group] += 2 * x.nbytes * (1 - 1 / self.size(group))
        return super().all_reduce(x, group, *operation)

    def all_gather(self, x, group):
        self.sent[group] += x.nbytes * (self.size(group) - 1)
        return super().all_gather(x, group)

    def reduce_scatter(self, x, group):
        self.sent[group] += x.nbytes * (1 - 1 / self.size(group))
        return super().reduce_scatter(x, group)

    def send_around(self, *leaving, tag=0):
        if self.cp == 1:
            return super().send_around(*leaving, tag=tag)
        kept = [x.contiguous() for x in leaving]
        self.sent["cp"] += sum(x.nbytes for x in kept)
        hop = super().send_around(*kept, tag=tag)
        return Hop(hop.arriving, [*hop.works, Sent(kept)])


@contextmanager
def fake_cuda(kernel="flash") -> Iterator[Meter]:
    mode = NoDevice(allow_non_fake_inputs=True)
    make = torch.Tensor._make_subclass

    def make_meta(*arguments, dispatch_device=None, **more):
        return make(*arguments, **more)

    is_cuda = property(lambda x: x.device.type == "cuda")
    meter = Meter(kernel)
    with (torch.library._scoped_library("aten", "IMPL") as library,
          mock.patch.object(torch.Tensor, "_make_subclass", make_meta),
          mock.patch.object(FakeTensor, "is_cuda", is_cuda, create=True),
          mode, meter, mock.patch.object(torch.cuda, "is_available", lambda: True)):
        for operator in NO_CPU_TWIN:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CUDA"):
                library.impl(operator, lambda *arguments: None, "CUDA")
        yield meter


@contextmanager
def rank_of(tp, cp, dp, rank) -> Iterator[MeteredGrid]:
    world = tp * cp * dp
    with ExitStack() as stack:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        if world > 1:
            dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        grid = MeteredGrid.create(tp, cp, "cuda")
        stack.callback(grid.close)
        yield grid
