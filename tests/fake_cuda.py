"""Tensors "on cuda" without a GPU: they have a shape, a type, strides and a device, but no memory
and no numbers. The project's own code runs on them as it is, as one rank of any grid:

    with rank_of(tp=8, cp=4, dp=8, rank=255) as grid, fake_cuda() as meter:
        with torch.device("cuda:0"):
            model = Llama(config, grid)
        ...
        meter.peak["cuda"]      # bytes of this rank's GPU that were alive at once, at most
        grid.sent["tp"]         # bytes that it has sent to its tensor-parallel group

What would be an error on a GPU is one here: a host tensor that meets one of the device, shapes that
do not fit, a host tensor that NCCL is asked to send. What is real: numbers that the host computes
from its own, such as positions and tokens. What is made up: a number that the host asks of the
device is 2, a comparison False, and no place is found by nonzero. Partners answer at once (torch's
"fake" process group), with nothing.
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
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import Grid, Hop

aten = torch.ops.aten
FORWARDS = {
    aten._scaled_dot_product_flash_attention.default: "flash",
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
}
BACKWARDS = {
    aten._scaled_dot_product_flash_attention_backward.default: "flash",
    aten._scaled_dot_product_cudnn_attention_backward.default: "cudnn",
}
LSE_DIMENSIONS = {"flash": 3, "cudnn": 4}  # that their backward takes
# torch for CPUs lacks these two on cuda, and would take them apart into others
FUSED_ON_CUDA = ("_fused_rms_norm", "silu_backward")


class ShapeOnly(FakeTensorMode):
    """FakeTensorMode for a device that C++ knows as "meta", see `fake_cuda`."""

    avoid_device_init = True  # there is none to start

    def dispatch(self, operator, types, args=(), kwargs=None):
        """C++ may ask for a tensor on "meta" like a given one: it belongs where that one is."""
        kwargs = dict(kwargs or {})
        given = tensors((args, kwargs))
        if given and kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = given[0].device
        return super().dispatch(operator, types, args, kwargs)


class Meter(TorchDispatchMode):
    """Sees every operator, in backward too. By device, "cuda" or "cpu": `live` bytes of storages
    made here and not freed, and their `peak`. `moved` adds up what the device's memory gives and
    takes, see `bytes_moved`. `kernels` are those that attention was computed by; flash's operators
    may be FlashAttention-3's."""

    def __init__(self, fa3: bool) -> None:
        super().__init__()
        self.fa3 = fa3
        self.kernels = set()
        self.live = Counter()
        self.peak = Counter()
        self.moved = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # 0. in inference mode composite operators come whole: their parts are what counts
        if torch.is_inference_mode_enabled():
            with self:
                out = operator.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = tensors((args, kwargs))
        devices = {x.device.type for x in given}
        device = kwargs.get("device")
        # 1. what a GPU refuses, and FakeTensorMode does not
        if operator.namespace == "c10d" and operator is not torch.ops.c10d.barrier.default:
            assert "cpu" not in devices, f"NCCL takes no host tensor: {operator}"
        if operator is aten._fused_adamw_.default:
            assert len(devices) == 1, f"fused AdamW takes one device, not {devices}"
        name = FORWARDS.get(operator) or BACKWARDS.get(operator)
        kernel = "fa3" if self.fa3 and name == "flash" else name
        if kernel:
            self.kernels.add(kernel)
        if operator in BACKWARDS:
            d_out, q, _, _, result, lse = args[:6]
            assert result.shape == q.shape, f"out has shape {result.shape}"
            assert lse.ndim == LSE_DIMENSIONS[name], f"lse has shape {lse.shape}"
            assert lse.is_contiguous(), "the kernels read lse as if it were contiguous"
            assert name == "flash" or layout(d_out) == layout(result), "cuDNN may mix them up"
        # 2. pinned memory, which a machine without CUDA does not have
        if kwargs.pop("pin_memory", False):
            kwargs["device"] = torch.device("cpu")
            return self.count(given, operator(*args, **kwargs))
        # 3. what the host computes from its own numbers
        is_host = device is None or device.type == "cpu"
        if is_host and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        # 4. what it asks of the device
        if operator is aten._local_scalar_dense.default:
            return made_up(args[0])
        if operator is aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        # 5. C++ takes "meta" to "cuda" for a copy
        if operator is aten._to_copy.default and device and device.type == args[0].device.type:
            if kwargs.get("dtype", args[0].dtype) == args[0].dtype:
                return args[0]
        out = self.count(given, operator(*args, **kwargs))
        self.moved += bytes_moved(operator, given, tensors(out))
        if operator in BACKWARDS:
            self.mark("cuda", scratch(kernel, *args[:5]))
        return out

    def count(self, given: list[Tensor], out):
        """Note the storages that an operator has made, until they are freed."""
        for x in made_anew(given, tensors(out)):
            storage = x.untyped_storage()
            size = {x.device.type: storage.nbytes()}
            self.live.update(size)
            weakref.finalize(storage, self.live.subtract, size)
            self.mark(x.device.type)
        return out

    def mark(self, device: str, more: int = 0) -> None:
        self.peak[device] = max(self.peak[device], self.live[device] + more)


def made_anew(given: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """A tensor for each storage of the results that no given one has: not views, not in place."""
    known = {x.untyped_storage()._cdata for x in given}
    new = []
    for x in results:
        identity = x.untyped_storage()._cdata
        if identity not in known:
            known.add(identity)
            new.append(x)
    return new


def bytes_moved(operator, given: list[Tensor], made: list[Tensor]) -> int:
    """What an operator of the device reads and writes; 0 of products, attention, communication."""
    name = operator._overloadpacket.__name__
    if name in ("mm", "bmm", "addmm") or "scaled_dot" in name or operator.namespace == "c10d":
        return 0
    if "empty" in name or all(x.device.type == "cpu" for x in given + made):
        return 0
    new = made_anew(given, made)
    # what is expanded is read once
    size = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in given)
    if new:
        return size + sum(x.nbytes for x in new)
    if not operator._schema.is_mutable:  # a view
        return 0
    return size if name in ("copy_", "zero_", "fill_") else size + given[0].nbytes


def made_up(x: Tensor) -> bool | float | int:
    """The value of one element of the device's."""
    if x.dtype == torch.bool:
        return False
    return 2.0 if x.is_floating_point() else 2


def layout(x: Tensor) -> list[int]:
    """Strides, but of dimensions of one element, which have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def scratch(kernel: str, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> int:
    """Bytes that attention's backward takes for itself on CUDA, beside its results. Of flash and
    cuDNN an H100 has shown them (docs/gpu_probe.txt: 770 and 514 MiB where q has 128), of FA3 its
    source."""
    rows = 4 * q.numel() // q.shape[3]  # a float32 number of each query
    wide_q = 4 * q.numel()  # dQ in float32
    grouped = q.shape[1] // k.shape[1]
    if kernel == "fa3":
        wide_kv = 4 * (k.numel() + v.numel()) if grouped > 1 else 0
        return wide_q + rows + wide_kv
    every_head = grouped * (k.nbytes + v.nbytes) if grouped > 1 else 0  # dK dV of each query head
    if kernel == "cudnn":
        return wide_q + rows + every_head
    # flash wants (B, S, H, D), and copies what does not lie so
    copies = 0
    for x in (d_out, out):
        if not x.transpose(1, 2).is_contiguous():
            copies += x.nbytes
    return wide_q + rows + every_head + copies


class Sending:
    """Tensors on their way: NCCL keeps them until the program waits."""

    def __init__(self, leaving: list[Tensor]) -> None:
        self.leaving = leaving

    def wait(self) -> None:
        self.leaving.clear()


class MeteredGrid(Grid):
    """A grid that counts the bytes `sent` by this rank, by group, as rings of n ranks send them:
    n - 1 parts to gather or to scatter, twice as many to reduce."""

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
        held = [x.contiguous() for x in leaving]
        self.sent["cp"] += sum(x.nbytes for x in held)
        hop = super().send_around(*held, tag=tag)
        return Hop(hop.arriving, [*hop.works, Sending(held)])


@contextmanager
def fake_cuda(fa3: bool = False) -> Iterator[Meter]:
    """Inside `with`, "cuda:0" is there, as said above; flash's operators may be FlashAttention-3's.

    Autograd gives each device a thread that asks the device's driver for its number, and there is
    no driver. So to C++ these tensors are on "meta", a device without memory that torch has
    everywhere, and to Python, the project's code and the checks here, they are on "cuda".
    """
    make = torch.Tensor._make_subclass

    def make_on_meta(*arguments, dispatch_device=None, **more):
        return make(*arguments, **more)  # what dispatch_device would tell C++ is the device

    is_cuda = property(lambda x: x.device.type == "cuda")
    driver = {  # what it would answer
        "is_available": lambda: True,
        "get_device_capability": lambda device: (9, 0),
        "is_current_stream_capturing": lambda: False,
    }
    mode = ShapeOnly(allow_non_fake_inputs=True)
    meter = Meter(fa3)
    with (torch.library._scoped_library("aten", "IMPL") as library,
          mock.patch.object(torch.Tensor, "_make_subclass", make_on_meta),
          mock.patch.object(FakeTensor, "is_cuda", is_cuda, create=True),
          mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
          mock.patch.multiple(torch.cuda, **driver),
          mode, meter):
        for operator in FUSED_ON_CUDA:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CUDA"):
                library.impl(operator, lambda *arguments: None, "CUDA")
        yield meter


@contextmanager
def rank_of(tp: int = 1, cp: int = 1, dp: int = 1, rank: int = 0) -> Iterator[MeteredGrid]:
    """This process as one rank of a grid of tp x cp x dp, by torch's process group without
    partners."""
    world = tp * cp * dp
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        if world > 1:
            dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        grid = MeteredGrid.create(tp, cp, "cuda")
        stack.callback(grid.close)
        yield grid
