"""Products with a rewritten weight, and what Inductor generates for them, for files that run interpreted or on a GPU.

Every output and scratch buffer starts as NaN. Results are compared with float64: small shapes, where an RMS is not stable,
element by element under the bound of rounding analysis; larger ones under the error budget of the other operator tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from triton_device import seeded

from rosa_fx.kernels import lowering, ops
from rosa_fx.kernels.bases.base import BaseFormat, base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.registry import term
from rosa_fx.mask import Mask

lowering.register()

FORMATS = {
    "dense": base_format("dense"),
    "int8": base_format("int8"),
    "nf4": base_format("nf4"),
    "nf4 nested": base_format("nf4", blocksize=32, double_quant=True),
    "fp4": base_format("fp4", blocksize=128),
}
SCALE = 1.3


@dataclass
class Layer:
    """Operands of one product and its exact result."""

    form: BaseFormat
    x: Tensor
    weight: tuple[Tensor, ...]
    A: Tensor
    B: Tensor
    values: Tensor
    mask: Mask
    bias: Tensor | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.x.dtype, self.form, (term("low_rank", scale=SCALE), term("sparse")))

    def compiled(self, after: Callable[[Tensor], Tensor] = lambda y: y, **options: Any) -> tuple[Tensor, str]:
        """The result of generated code with `after` as epilogue, and the code."""
        op, key = (ops.linear_t if self.transposed else ops.linear), self.layout.key

        def run(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor]) -> Tensor:
            return after(op(x, bias, base, delta, key))

        torch._dynamo.reset()
        delta = [self.A, self.B, self.values, self.mask.row_offsets, self.mask.cols]
        with torch.no_grad():
            function = torch.compile(run, fullgraph=True, **options)
            out, code = run_and_get_code(function, self.x, self.bias, list(self.weight), delta)
        return out, "\n".join(code)

    def parts(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """x, D(Q), S, A, B as factors of the forward product, in `dtype`."""
        base = self.form.dequantize(self.weight, self.shape, dtype)
        sparse = torch.zeros_like(base).index_put((self.mask.rows(), self.mask.cols.long()), self.values.to(dtype))
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.transposed:
            base, sparse, A, B = base.t(), sparse.t(), B.t(), A.t()
        return self.x.to(dtype), base, sparse, A, B

    def exact(self) -> Tensor:
        x, base, sparse, A, B = self.parts()
        out = x @ (base + sparse + SCALE * (B @ A)).t()
        return out if self.bias is None else out + self.bias.double()

    def plain(self) -> Tensor:
        """What adapter libraries compute in x's dtype."""
        x, base, sparse, A, B = self.parts(self.x.dtype)
        out = F.linear(x, base) + F.linear(x, sparse) + F.linear(F.linear(x, A), B) * SCALE
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def bound(self) -> Tensor:
        """Largest error of each element: roundings times the sum of magnitudes.

        Five roundings to the dtype on the longest way (A, x Aᵀ, B, its scaling, the result), and float32 sums in any order.
        """
        x, base, sparse, A, B = (part.abs() for part in self.parts())
        out = x @ (base + sparse + SCALE * (B @ A)).t()
        out = out if self.bias is None else out + self.bias.double().abs()
        low = torch.finfo(self.x.dtype).eps / 2
        # Decoding and scaling of a weight take a few float32 operations more.
        sums = (base.shape[1] + A.shape[0] + self.values.numel() + 8) * torch.finfo(torch.float32).eps / 2
        return out * (5 * low + sums) + torch.finfo(self.x.dtype).tiny


def build(
    form: BaseFormat,
    rows: int,
    shape: tuple[int, int],
    *,
    rank: int = 4,
    entries: str = "random",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> Layer:
    """Random operands. `entries`: "none", "random" (a fifth), "one row" or "empty rows" (every other)."""
    generator = seeded(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n, k = shape
    chosen = torch.rand(shape, generator=generator) < 0.2
    if entries == "none":
        chosen[:] = False
    elif entries == "one row":
        chosen[:] = False
        chosen[n // 2] = True
    elif entries == "empty rows":
        chosen[::2] = False
    mask = Mask.from_dense(chosen)
    return Layer(
        form,
        randn(rows, n if transposed else k).to(dtype),
        form.quantize((randn(n, k) * k**-0.5).to(dtype)),
        randn(rank, k) * k**-0.5,
        randn(n, rank) * 0.1,
        randn(mask.nnz) * 0.1,
        mask,
        randn(k if transposed else n) if bias else None,
        transposed,
    )


def check(layer: Layer, **options: Any) -> str:
    """Compare with the exact result, element by element; the generated code."""
    out, code = layer.compiled(**options)
    exact = layer.exact()
    assert out.dtype == layer.x.dtype
    assert out.shape == exact.shape
    worst = ((out.double() - exact).abs() / layer.bound()).max().item()
    assert worst <= 1, f"{worst:.3g} times the bound of rounding"
    return code


def kernels(code: str) -> list[str]:
    """Names of the Triton kernels that generated code defines."""
    return re.findall(r"^def (triton_\w+)\(", code, re.MULTILINE)


def operator_calls(code: str) -> list[str]:
    """Names of the operators that generated code calls."""
    return [name.rsplit(".", 1)[0] for name in re.findall(r"torch\.ops\.rosa_fx\.([\w.]*)\(", code)]


def calls(code: str, prefix: str) -> list[str]:
    """What generated code calls of the names that start so."""
    return re.findall(re.escape(prefix) + r"[\w.]*\(", code)
