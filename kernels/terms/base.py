"""What a delta term is: the one interface behind which low-rank, sparse and every later PEFT method live.

The delta of a weight is a sum of terms. A term is a frozen description without tensors of its own: the tensors travel
beside it, in the order of `tensor_names`, so that the same description serves eager mode, fake tensors, compiled graphs
and the float64 oracle. To add a term write one new file with a subclass and list it in `rosa_fx.kernels.terms`.

Symbols: weight as stored [N, K]; x [M, K] with y = x Wᵀ [M, N]. `transposed=True` means the product with the weight
itself, out = dy W with dy [M, N] and out [M, K], which is both grad-input and the forward of weights stored [in, out].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.cpu.gradient import add_weight_gradient

Shape = tuple[int, int]
Region = tuple[int, int, int, int]
"""[row start, row stop) and [column start, column stop) of a weight."""


class Term(ABC):
    """One summand of the delta. Subclasses are frozen dataclasses whose fields are JSON values."""

    kind: ClassVar[str]
    tensor_names: ClassVar[tuple[str, ...]]
    """Names of the term's tensors, in the order in which they travel."""
    trainable: ClassVar[tuple[str, ...]]
    """The tensors that receive a gradient, in the order in which `grads` returns them."""
    folds: ClassVar[bool]
    """True if kernels add the term into the dequantised tile before the GEMM, False if its product is added after."""
    contributes: ClassVar[bool] = True
    """False for terms that only observe: nothing is added to the weight."""
    additive: ClassVar[bool] = True
    """True if the gradients of a sum of weight gradients are the sum of their gradients."""

    @abstractmethod
    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor | None:
        """The definition: the term as a dense [N, K] tensor of `dtype`; None if it adds nothing to the weight."""

    @abstractmethod
    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients from the factors dy [M, N] and x [M, K] of the weight gradient dyᵀ x, which is never formed.

        One fresh tensor of the parameter's shape and dtype for each name in `trainable`.
        """

    @abstractmethod
    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same gradients from a dense weight gradient [N, K] (eager mode and consumers that were not fused)."""

    def fold_(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        """Add the term into the dense `weight` [N, K] in place (terms with `folds`, and materialisation)."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dense = self.dense(tensors, (weight.shape[0], weight.shape[1]), dtype)
        if dense is not None:
            weight.copy_(weight.to(dtype) + dense)

    def split(self, tensors: Sequence[Tensor], stack: int) -> Callable[[int], Sequence[Tensor]]:
        """The tensors of the term for a matrix of a stack, by the matrix's number; views where possible."""
        assert not self.contributes, f"term {self.kind!r} is not defined for stacks"
        return lambda index: tensors

    def grads_of_stack(
        self, pieces: Sequence[tuple[int, Tensor, Tensor]], tensors: Sequence[Tensor], shape: Shape, stack: int
    ) -> list[Tensor]:
        """As `grads` for a stack of matrices that lie in [N, K] one below the other.

        A piece (e, dy, x) is a summand dyᵀ x of the gradient of matrix e. By default the dense gradient is formed.
        """
        rows, (_, first, _) = shape[0] // stack, pieces[0]
        dW = first.new_zeros(shape, dtype=torch.promote_types(first.dtype, torch.float32))
        for index, dy, x in pieces:
            part = dW[index * rows : (index + 1) * rows]
            if part.device.type == "cpu" and part.dtype == torch.float32:
                add_weight_gradient(part, dy, x, squared=False)
            else:
                part.addmm_(dy.t().to(dW.dtype), x.to(dW.dtype))
        return self.grads_from_dense(dW, tensors)

    def csr(self, tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """(values, row_offsets, cols) where the term is a sparse matrix: kernels then add it to rows as they decode them."""
        return None

    def pair(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float] | None:
        """(A [R, K], B [N, R], s) where the term is s·B A: kernels then add its product to theirs."""
        return None

    def thin(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """The left factor of `factors` [M, R] where it is among the tensors, so that nobody has to compute it."""
        return None

    def cut(self, tensors: Sequence[Tensor], region: Region) -> Sequence[Tensor]:
        """The tensors of the term for that part of the weight, as views (terms without `folds`)."""
        raise AssertionError(f"term {self.kind!r} folds into the weight and is cut with it")

    def factors(self, x: Tensor, tensors: Sequence[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
        """(left [M, R], right [R, ·]) in x's dtype with x termᵀ = left @ right, or x term = left @ right if `transposed`.

        For terms without `folds`; kernels add the product in the accumulator of the main one.
        """
        raise AssertionError(f"term {self.kind!r} folds into the weight and has no product of its own")

    def grad_shapes(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Empty tensors like those that `grads` returns, for fake tensors."""
        by_name = dict(zip(self.tensor_names, tensors, strict=True))
        return [by_name[name].new_empty(by_name[name].shape) for name in self.trainable]

    def fields(self) -> dict[str, Any]:
        return dict(vars(self))
