"""The parametrisation that stands for one rewritten weight: frozen base, low-rank part, sparse part.

A module whose weight is rewritten computes `module.weight` from here, so that every spelling of a linear reads the
right dense weight in eager mode. Inside `torch.compile` the graph pass replaces weight and
consumer by a fused operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx import eager
from rosa_fx.distributed.tensors import local, whole, write
from rosa_fx.kernels import ops
from rosa_fx.kernels.bases.base import BaseFormat
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Term
from rosa_fx.kernels.terms.collect import CollectGradient, CollectReceived, CollectTopK
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.mask import Mask
from rosa_fx.reading import Reading

PHASES = ("low_rank", "collect", "joint")


class FrozenBase(nn.Module):
    """The tensors of D(Q) as buffers. Their dtypes belong to the format: `.to(dtype)` moves devices only."""

    def __init__(self, form: BaseFormat, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.format = form
        self.dtype = dtype
        for name, tensor in zip(form.tensor_names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.format.tensor_names]

    def make_parameters(self) -> None:
        """Turn what is worth sharding, the codes or the dense weight, from buffers into frozen parameters of the same names.

        Scales stay: a data-parallel wrapper casts floating-point parameters if told so, and D(Q) would be another one.
        """
        for name in self.format.tensor_names:
            tensor = self._buffers.get(name)
            if tensor is not None and tensor.dim() and (self.format.kind == "dense" or not tensor.is_floating_point()):
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenBase:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        buffers, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)  # parameters, if there are any: codes are integers, and keep their dtype anyway
        self._buffers = buffers
        for name, tensor in self._buffers.items():
            if tensor is None:
                continue
            moved = fn(tensor)
            keep = moved.dtype == tensor.dtype or self.format.kind == "dense"
            self._buffers[name] = moved if keep else tensor.to(moved.device)
        return self


class LowRankParameters(nn.Module):
    """A [R, K] and B [N, R], or A [E, R, K] and B [E, N, R] for a stack of E matrices. `seed` makes the initial A again."""

    def __init__(self, reading: Reading, rank: int, init: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.init = init
        self.seed = int(torch.randint(2**62, (), device="cpu").item())
        stack = () if reading.stack == 1 else (reading.stack,)
        self.A = nn.Parameter(torch.empty(*stack, rank, reading.columns, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(*stack, reading.rows, rank, dtype=dtype, device=device))
        self.reset()

    @property
    def rank(self) -> int:
        """R, of each matrix."""
        return self.A.shape[-2]

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial state: A as drawn at the transform, B zero."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        rank, columns = self.A.shape[-2:]
        start = torch.empty(self.A.shape, device="cpu")
        if self.init == "kaiming":
            # Kaiming-uniform with a = sqrt(5), as LoRA does: bound = sqrt(6 / ((1 + a²) fan_in)) = 1 / sqrt(K).
            start.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
        else:
            start.normal_(0, 1 / rank, generator=generator)
        write(self.A, start)
        local(self.B).zero_()


class SparseParameters(nn.Module):
    """`values` [nnz], frozen zeros until a mask of `shape` (N, K) is set, and the mask as int32 CSR buffers."""

    row_offsets: Tensor
    cols: Tensor

    def __init__(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(torch.zeros(nnz, dtype=dtype, device=device), requires_grad=False)
        self.register_buffer("row_offsets", torch.zeros(shape[0] + 1, dtype=torch.int32, device=device))
        self.register_buffer("cols", torch.zeros(nnz, dtype=torch.int32, device=device))
        self.has_mask = False

    @property
    def mask(self) -> Mask | None:
        """The mask, or None before there is one."""
        return Mask(self.row_offsets, self.cols, self.shape) if self.has_mask else None

    def set_mask(self, mask: Mask) -> None:
        self.row_offsets.copy_(mask.row_offsets)
        self.cols.copy_(mask.cols)
        self.has_mask = True


class RosaWeight(nn.Module):
    """Base + low-rank + sparse for one weight of `shape`, [N, K] or with more dimensions, see `reading`.

    `phase` says which terms are in the graph: "low_rank", "collect" (low-rank, and gradients are collected) or "joint".
    """

    _is_rosa_weight = True

    def __init__(
        self,
        base: FrozenBase,
        shape: tuple[int, ...],
        low_rank: LowRankParameters | None,
        sparse: SparseParameters | None,
        *,
        reading: Reading,
        scale: float,
        dropout: float,
        strict: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.low_rank = low_rank
        self.sparse = sparse
        self.shape = shape
        self.reading = reading
        self.matrix = reading.matrix
        self.scale = scale
        self.dropout = dropout
        self.strict = strict
        self.phase = "low_rank"
        self.paths: tuple[str, ...] = ()
        self.probe: Tensor | None = None
        self.topk_probe: Tensor | None = None
        self.receiver: Tensor | None = None
        self.refresh()
        self.register_load_state_dict_post_hook(_follow_loaded_mask)
        self.register_forward_pre_hook(_no_fast_path)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without probes, whose hooks belong to the schedule of this very model."""
        return super().__getstate__() | {"probe": None, "topk_probe": None, "receiver": None}

    # --- the weight ----------------------------------------------------------------------------------------------

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """No original is kept by torch's parametrisation: the base is held here, in its own format."""
        return ()

    def forward(self) -> Tensor:
        delta = self.delta_tensors()
        if self.low_rank is not None and self.dropout > 0 and self.training:
            # Dropout of input features in weight space: (x ∘ m) Aᵀ = x (A ∘ m)ᵀ with one mask for all rows of x.
            A = self.low_rank.A
            delta[0] = A * nn.functional.dropout(A.new_ones((*A.shape[:-2], 1, A.shape[-1])), self.dropout)
        key = self.layout_key
        if self.phase == "collect" and torch.is_grad_enabled():
            # Eager mode hands over the dense gradient of all uses summed, one layer at a time anyway. In a compiled
            # graph gradients leave together at the end, so there the mask itself leaves if one backward is all, and
            # else a count: the factors of the gradient go to its receiver on the way.
            if self.topk_probe is not None and torch.compiler.is_compiling():
                delta += [self.topk_probe] if self.receiver is None else [self.topk_probe, self.receiver]
                key = self.topk_key
            elif self.probe is not None:
                delta.append(self.probe)
                key = self.collect_key
        if eager.is_eager():
            if self.training and torch.is_grad_enabled():
                eager.warn_once()
            dense = eager.lazy_weight(self.base.tensors(), delta, key)
        else:
            dense = ops.materialize(self.base.tensors(), delta, key)
        return dense if len(self.shape) == 2 else dense.view(self.shape)

    def terms(self) -> tuple[Term, ...]:
        """The terms of the current phase that contribute to the weight."""
        terms: list[Term] = []
        if self.low_rank is not None:
            terms.append(LowRank(self.scale))
        if self.sparse is not None and self.phase == "joint":
            terms.append(Sparse())
        return tuple(terms)

    def layout(self) -> Layout:
        return Layout(self.matrix, self.base.dtype, self.base.format, self.terms(), self.strict, stack=self.reading.stack)

    def delta_tensors(self) -> list[Tensor]:
        """The tensors of `terms()`, in order, without dropout."""
        delta: list[Tensor] = []
        if self.low_rank is not None:
            delta += [self.low_rank.A, self.low_rank.B]
        if self.sparse is not None and self.phase == "joint":
            delta += [self.sparse.values, self.sparse.row_offsets, self.sparse.cols]
        return delta

    def refresh(self) -> None:
        """Recompute the layout keys that the graph sees. Strings, so that a compiled graph is guarded on one value."""
        layout = self.layout()
        self.layout_key = layout.key
        self.collect_key = self._with(layout, CollectGradient())
        self.topk_key = self._with(layout, CollectTopK() if self.receiver is None else CollectReceived())

    @staticmethod
    def _with(layout: Layout, extra: Term) -> str:
        return replace(layout, terms=(*layout.terms, extra)).key

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RosaWeight:
        super()._apply(fn, recurse)
        self.refresh()
        return self

    # --- phases --------------------------------------------------------------------------------------------------

    def set_phase(self, phase: str) -> None:
        """Switch terms on and off. Sparse values train in "joint" only."""
        self.phase = phase
        if self.sparse is not None:
            self.sparse.values.requires_grad_(phase == "joint")
        if phase != "collect":
            self.probe = self.topk_probe = self.receiver = None
        self.refresh()

    def follow_mask(self) -> None:
        """After tensors were loaded: a mask that came along is in force; without one the sparse part waits for its mask."""
        if self.sparse is not None:
            self.sparse.has_mask = self.sparse.values.numel() == 0 or int(self.sparse.row_offsets[-1]) > 0
            self.set_phase("joint" if self.sparse.has_mask else "low_rank")

    def start_probes(
        self, hook: Callable[[Tensor], Any], topk_hook: Callable[[Tensor], Any] | None, receiver: int | None = None
    ) -> None:
        """Arm collection: `hook` gets the probe after each backward; `topk_hook` is for graphs that return the mask, or that
        give the gradient to a receiver of that number (`CollectReceived`)."""
        if self.sparse is None:
            return
        device = self.sparse.values.device
        self.probe = torch.zeros((), device=device).expand(self.matrix).requires_grad_()
        self.probe.register_post_accumulate_grad_hook(hook)
        self.topk_probe = None
        self.receiver = None if receiver is None else torch.tensor([receiver], device="cpu")
        self.refresh()
        if topk_hook is not None:
            size = 1 + 2 * self.sparse.values.numel() if receiver is None else 1
            self.topk_probe = torch.zeros(size, device=device, requires_grad=True)
            self.topk_probe.register_post_accumulate_grad_hook(topk_hook)

    # --- inspection ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dense_base(self) -> Tensor:
        """D(Q) in the shape and the dtype of the weight."""
        tensors = [whole(tensor) for tensor in self.base.tensors()]
        return self.base.format.dequantize(tensors, self.matrix, self.base.dtype).view(self.shape)

    @torch.no_grad()
    def dense_delta(self) -> Tensor:
        """ΔW in the shape of the weight, float32."""
        out = torch.zeros(self.matrix, dtype=torch.float32, device=self.base.tensors()[0].device)
        for item, tensors in self.layout().split([whole(tensor) for tensor in self.delta_tensors()]):
            item.fold_(out, tensors)
        return out.view(self.shape)

    def extra_repr(self) -> str:
        rank = 0 if self.low_rank is None else self.low_rank.rank
        nnz = 0 if self.sparse is None else self.sparse.values.numel()
        return f"shape={list(self.shape)}, base={self.base.format.kind}, rank={rank}, nnz={nnz}, phase={self.phase}"


def _follow_loaded_mask(module: nn.Module, incompatible: object) -> None:
    """After `load_state_dict`: a mask that came with the values is in force."""
    assert isinstance(module, RosaWeight)
    module.follow_mask()


def _no_fast_path(module: nn.Module, args: object) -> None:
    """A hook is what keeps `nn.TransformerEncoderLayer` off its one opaque kernel, which would need the dense weights."""
