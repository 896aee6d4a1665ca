"""The kernels that the report compiles. A new kernel is one more entry in `KERNELS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rosa_fx.kernels import cost, ops
from rosa_fx.kernels import inductor_offline as offline
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.product import AMD, DECODE_ROWS
from rosa_fx.kernels.report.architectures import Architecture
from rosa_fx.kernels.terms.registry import term

# Rows of the shapes compiled: one token, the largest decode batch, a training batch. Weights are [SIDE, SIDE].
ONE, DECODE, TRAINING = 1, 16, 2048
SIDE = 4096
RANK = 16
DENSITY = 0.006

Graph = tuple[Callable[..., Any], Callable[[], list[Tensor]]]


@dataclass(frozen=True)
class Kernel:
    """A graph whose one template kernel is measured, or a kernel that Python launches.

    `graph(architecture)` gives a function and what makes its arguments on "cuda"; `lowering` is entered while it is lowered.
    `launched(architecture)`, if it is set, gives the kernel itself.
    product: its name in Inductor's choices begins so. packed: pointers of stored weights, of `bits` each. traffic: bytes per
    weight that must move, without and with the adapters. matches_dense: compare with Inductor's own product. pressure_bar:
    whether the bars on issue pressure hold for it. rows: M of the example. marker: part of the kernel's source, where the graph
    has more than one template. every_config: False where configs beside the default would repeat another kernel's.
    """

    name: str
    phase: str
    graph: Callable[[Architecture], Graph] | None
    product: str = ""
    lowering: Callable[[], AbstractContextManager[Any]] = nullcontext
    packed: tuple[str, ...] = ()
    bits: int = 16
    traffic: Callable[[torch.dtype], tuple[float, float]] | None = None
    matches_dense: bool = False
    pressure_bar: bool = False
    rows: int = 0
    marker: str = ""
    every_config: bool = True
    launched: Callable[[Architecture], offline.Kernel] | None = None


_BITS = {"nf4": 4, "fp4": 4, "int8": 8, "dense": 16}


def operand_dtype(architecture: Architecture) -> torch.dtype:
    return torch.bfloat16 if architecture.bfloat16 else torch.float16


def _product(kind: str, rows: int, transposed: bool, sparse: bool, dtype: torch.dtype, **fields: Any) -> Graph:
    """relu(y) + residual, so that an epilogue is part of the kernel, with adapters in float32 as they are by default."""
    form = base_format(kind, **fields)
    terms = [term("low_rank", scale=1.3)] + ([term("sparse")] if sparse else [])
    layout = Layout((SIDE, SIDE), dtype, form, tuple(terms))
    key = layout.key
    nnz = int(DENSITY * SIDE * SIDE)
    op = ops.linear_t if transposed else ops.linear

    def make() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device="cuda")

        base = [empty(*part.shape, dtype=part.dtype) for part in form.layout(layout.shape, dtype)]
        delta = [empty(RANK, SIDE), empty(SIDE, RANK)]
        if sparse:
            delta += [empty(nnz), empty(SIDE + 1, dtype=torch.int32), empty(nnz, dtype=torch.int32)]
        return empty(rows, SIDE, dtype=dtype), empty(rows, SIDE, dtype=dtype), base, delta

    def run(x: Tensor, residual: Tensor, base: list[Tensor], delta: list[Tensor]) -> Tensor:
        return torch.relu(op(x, None, base, delta, key)) + residual

    with torch.device("meta"), torch._subclasses.fake_tensor.FakeTensorMode():
        spec = pytree.tree_structure(make())
    return (lambda *flat: run(*pytree.tree_unflatten(list(flat), spec))), (lambda: pytree.tree_leaves(make()))


def _way(fused: bool) -> Callable[[], AbstractContextManager[Any]]:
    """The lowering that decodes in the loop, or that writes a scratch buffer, whatever the cost model thinks of the size."""
    return lambda: mock.patch.object(cost, "fuse", return_value=fused)


def _traffic(kind: str, rows: int, sparse: bool, **fields: Any) -> Callable[[torch.dtype], tuple[float, float]]:
    def count(dtype: torch.dtype) -> tuple[float, float]:
        weights = SIDE * SIDE
        activations = 2 * rows * SIDE * dtype.itemsize
        base = base_format(kind, **fields).nbytes((SIDE, SIDE), dtype) + activations
        entries = int(DENSITY * weights) * 8 + (SIDE + 1) * 4 if sparse else 0
        return base / weights, (base + 2 * RANK * SIDE * 4 + entries) / weights

    return count


def _linear(label: str, kind: str, rows: int, transposed: bool, sparse: bool, **fields: Any) -> Kernel:
    phase = "decode" if rows <= DECODE_ROWS else "training"
    direction = "grad input" if transposed else "forward"
    return Kernel(
        f"{direction} {label}, M = {rows}",
        phase,
        lambda architecture: _product(kind, rows, transposed, sparse, operand_dtype(architecture), **fields),
        "rosa_linear_t" if transposed else "rosa_linear",
        _way(True),
        packed=("W",) if kind == "dense" else ("Q",),
        bits=_BITS[kind],
        traffic=_traffic(kind, rows, sparse, **fields) if phase == "decode" else None,
        matches_dense=kind == "dense" and phase == "training",
        pressure_bar=kind == "nf4" and phase == "training",
        rows=rows,
        # Beside S xᵀ, a kernel of its own.
        marker="arg_SPARSE_PART" if sparse and phase == "training" else "",
        # FP4 is NF4 with another table, double quantisation two loads more per block, one row a mask of 16.
        every_config=label in ("nf4", "nf4 + sparse", "int8", "dense") and rows != ONE,
    )


def _sparse() -> Kernel:
    """S xᵀ, which the fused kernel for many rows adds."""
    return Kernel(
        "sparse part of forward",
        "training",
        lambda architecture: _product("nf4", TRAINING, False, True, operand_dtype(architecture)),
        "rosa_linear",
        _way(True),
        rows=TRAINING,
        marker="arg_XT",
        every_config=False,
    )


def _scratch(label: str, kind: str, transposed: bool, **fields: Any) -> Kernel:
    direction = "grad input" if transposed else "forward"
    return Kernel(
        f"scratch for {direction} {label}",
        "training",
        lambda architecture: _product(kind, TRAINING, transposed, True, operand_dtype(architecture), **fields),
        "rosa_scratch",
        _way(False),
        packed=("Q",),
        bits=_BITS[kind],
        rows=TRAINING,
    )


def _gradient(name: str, kind: str, product: str, nnz: int) -> Kernel:
    """The gradient that a term alone asks for; with `nnz` entries where it is sparse."""

    def graph(architecture: Architecture) -> Graph:
        dtype = operand_dtype(architecture)
        key = Layout((SIDE, SIDE), dtype, base_format("dense"), (term(kind),)).key

        def make() -> list[Tensor]:
            factors = [torch.empty(TRAINING, SIDE, dtype=dtype, device="cuda") for _ in range(2)]
            mask = [torch.empty(size, dtype=torch.int32, device="cuda") for size in (SIDE + 1, nnz)]
            if kind != "sparse":
                return [*factors, torch.empty((), device="cuda").expand(SIDE, SIDE)]
            return [*factors, torch.empty(nnz, device="cuda"), *mask]

        return (lambda dy, x, *delta: ops.linear_grads(dy, x, list(delta), key)[0]), make

    return Kernel(name, "training", graph, product, nullcontext, packed=("DY", "X"), rows=TRAINING)


def _accumulate(architecture: Architecture) -> offline.Kernel:
    """total += (dyᵀ x)² in place, as Triton specialises it for contiguous factors of the size compiled."""
    from rosa_fx.kernels import triton_accumulate

    dtype = operand_dtype(architecture)
    capability = AMD if architecture.amd else architecture.device.capability
    constants = triton_accumulate.constants_of(SIDE, SIDE, TRAINING, dtype, capability)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    values = {"SQUARED": True, "dy_n": 1, "x_k": 1, **constants}
    pointers = {"TOTAL": "*fp32", **dict.fromkeys(("DY", "X"), "*bf16" if dtype == torch.bfloat16 else "*fp16")}
    function = triton_accumulate.rosa_add_weight_gradient
    kinds = {name: "constexpr" if name in values else pointers.get(name, "i32") for name in function.arg_names}
    tile = (constants["BLOCK_N"], constants["BLOCK_K"], constants["BLOCK_M"])
    return offline.Launched(
        "rosa_add_weight_gradient",
        Path(triton_accumulate.__file__).read_text(encoding="utf-8"),
        (-(SIDE // -tile[0]) * -(SIDE // -tile[1]), 1, 1),
        function=function,
        signature=kinds,
        values=values,
        divisible=frozenset(name for name, kind in kinds.items() if kind != "constexpr"),
        options=options,
        tile=tile,
    )


_FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("nf4", "nf4", {}),
    ("nf4 double quant", "nf4", {"double_quant": True}),
    ("fp4", "fp4", {}),
    ("int8", "int8", {}),
    ("dense", "dense", {}),
)


def _all() -> tuple[Kernel, ...]:
    found: list[Kernel] = []
    for label, kind, fields in _FORMATS:
        # A sparse part goes with few rows; grad-input kernels of few rows have none (cost.fuse).
        for rows in (TRAINING, DECODE, ONE):
            found.append(_linear(label, kind, rows, False, rows <= DECODE_ROWS, **fields))
        found += [_linear(label, kind, rows, True, False, **fields) for rows in (TRAINING, DECODE)]
    # With so many rows it is only for an autotuner to choose.
    found += [_linear("nf4 + sparse", "nf4", TRAINING, transposed, True) for transposed in (False, True)]
    found.append(_sparse())
    for label, kind, fields in _FORMATS[:4]:
        found += [_scratch(label, kind, transposed, **fields) for transposed in (False, True)]
    found.append(_gradient("gradient of sparse values", "sparse", "rosa_sddmm", int(DENSITY * SIDE * SIDE)))
    found.append(_gradient("collected weight gradient", "collect_gradient", "rosa_weight_gradient", 0))
    found.append(
        Kernel(
            "square of a weight gradient added in place",
            "training",
            None,
            packed=("DY", "X"),
            rows=TRAINING,
            every_config=False,
            launched=_accumulate,
        )
    )
    return tuple(found)


KERNELS: Sequence[Kernel] = _all()
