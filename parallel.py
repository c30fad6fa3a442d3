"""The process grid, causal attention over it, and the optimizer whose state is spread over it.

Everything the rest of the project needs to know about *where* a computation happens goes through this file:
`Grid` says which part of the work this process holds, `ring_attention` is the only place where one token looks
at another, and `ShardedAdamW` owns the float32 weights, gradients and moments. This version runs one process;
a grid of several is refused with a clear message.
"""
from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Coordinates of this process in a dp x cp x tp grid (data, context, tensor parallel; tp fastest)."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0

    @classmethod
    def create(cls, tp: int = 1, cp: int = 1) -> Grid:
        """The grid of this job: world size = dp x cp x tp. One process needs no torch.distributed.

        Raises ValueError for a grid this version cannot run: only tp = cp = 1 in one process.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
        if tp != 1 or cp != 1 or world != 1:
            raise ValueError(f"a grid of tp {tp} x cp {cp} in {world} processes is not supported: "
                             "this version runs one process, so use tp 1, cp 1 without torchrun")
        return cls()


def document_segments(document_ids: Tensor) -> list[list[int]]:
    """Where documents begin and end: ids (B, S) -> for each row the borders [0, ..., S], on the host."""
    rows = []
    for row in document_ids:
        starts = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
        rows.append([0, *starts, row.numel()])
    return rows


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the causal mask; q (B, H, S, D), k and v (B, Hkv, S, D).

    K and V keep their own number of heads: grouped-query attention never repeats them in memory.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def ring_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid, segments: list[list[int]] | None = None) -> Tensor:
    """Causal attention over the whole sequence; q (B, H, S, D), k and v (B, Hkv, S, D) -> (B, H, S, D).

    `segments` (from `document_segments`) is the cross-document mask of the ablation: each document attends
    to itself only, one causal block a document, so no S x S mask is ever built. The recipe itself leaves it
    out (arXiv 2504.06214, section 3.1).
    """
    if segments is None:
        return causal_attention(q, k, v)
    rows = []
    for row, borders in enumerate(segments):
        blocks = [causal_attention(*(x[row:row + 1, :, start:end] for x in (q, k, v)))
                  for start, end in zip(borders, borders[1:])]
        rows.append(torch.cat(blocks, dim=2))  # (1, H, S, D)
    return torch.cat(rows)  # (B, H, S, D)


class ShardedAdamW:
    """AdamW (arXiv 1711.05101) on float32 master weights and gradients, all of it in flat buffers.

    Every parameter owns one aligned range, the same in each of four flat tensors: master weights, gradients and
    the two moments. `parameter.grad` *is* its range of the gradient buffer, float32 whatever the parameter's
    dtype, so micro-batches accumulate in float32 and an update, a norm or a reset is one kernel over one tensor.
    Float32 parameters are themselves views of the master weights; others are refreshed from them each step.
    Matrices decay; vectors (norms and biases) do not.

    Args: model (its parameters move into the flat buffers), grid; betas, eps and weight_decay as in torch.
    """

    ALIGNMENT = 64  # elements: every view starts on a 256-byte border, so kernels round alike in every run

    def __init__(self, model: nn.Module, grid: Grid, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1) -> None:
        ordered = sorted(model.named_parameters(), key=lambda item: item[1].ndim < 2)  # stable: matrices first
        self.parameters = dict(ordered)
        self._ranges, total, matrices = {}, 0, 0
        for name, parameter in ordered:
            self._ranges[name] = slice(total, total + parameter.numel())
            total += -(-parameter.numel() // self.ALIGNMENT) * self.ALIGNMENT
            matrices = total if parameter.ndim >= 2 else matrices
        first = ordered[0][1]
        dtype = torch.promote_types(first.dtype, torch.float32)  # float64 models (tests) keep float64
        self.master, self.gradient, *moments = (torch.zeros(total, dtype=dtype, device=first.device) for _ in range(4))
        self._saved = {"master": self.master, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        for name in self.parameters:
            self._adopt(name)
        parts = [(slice(0, matrices), weight_decay), (slice(matrices, total), 0.0)]
        self._adamw = torch.optim.AdamW([{"params": [self.master[part]], "weight_decay": decay}
                                         for part, decay in parts], lr=0.0, betas=betas, eps=eps, fused=True)
        for (part, _), group in zip(parts, self._adamw.param_groups):
            group["params"][0].grad = self.gradient[part]
            self._adamw.state[group["params"][0]] = {
                "step": torch.zeros((), device=first.device), "exp_avg": moments[0][part], "exp_avg_sq": moments[1][part]}

    def _view(self, flat: Tensor, name: str) -> Tensor:
        return flat[self._ranges[name]].view(self.parameters[name].shape)

    def _adopt(self, name: str) -> None:
        """Move one parameter and its gradient into the flat buffers."""
        parameter, master = self.parameters[name], self._view(self.master, name)
        master.copy_(parameter.detach())
        if parameter.dtype == master.dtype:
            parameter.data = master
        parameter.grad_dtype = master.dtype
        parameter.grad = self._view(self.gradient, name)

    def zero_gradients(self) -> None:
        """Forget the accumulated gradients: call before the first backward of a step."""
        self.gradient.zero_()

    def gradient_norm(self) -> Tensor:
        """Euclidean norm over every parameter's gradient (a scalar tensor)."""
        return torch.linalg.vector_norm(self.gradient)

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float = 0.0) -> float:
        """One AdamW update from the accumulated gradients, clipped to `max_norm` (0: no clipping).

        Returns the gradient norm before clipping. Raises ArithmeticError, with nothing updated, if it is not finite.
        """
        norm = self.gradient_norm().item()
        if not norm < float("inf"):
            raise ArithmeticError(f"the gradient norm is {norm}")
        if 0 < max_norm < norm:
            self.gradient.mul_(max_norm / norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._publish()
        return norm

    def _publish(self) -> None:
        """Round the master weights into the parameters that are not views of them."""
        rest = [(p.data, self._view(self.master, n)) for n, p in self.parameters.items() if p.dtype != self.master.dtype]
        for parameter, master in rest:
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs: `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and `step`."""
        state = {f"{kind}.{name}": self._view(flat, name) for kind, flat in self._saved.items() for name in self.parameters}
        return state | {"step": next(iter(self._adamw.state.values()))["step"]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError, with nothing changed, if a tensor does not fit."""
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"optimizer state {name}: expected shape {tuple(tensor.shape)}, found {found}; "
                                 "resume with the model this checkpoint was written for")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for part in self._adamw.state.values():
            part["step"].copy_(state["step"])
        self._publish()
