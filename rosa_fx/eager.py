"""A rewritten weight in eager mode: a tensor that is computed where it is read, and never kept.

Autograd keeps the operands of a product for backward. Were the weight an ordinary tensor, a forward pass would leave the
dense weight of every layer behind, and one without gradients, such as the step of a generation, would decode it to multiply
a few rows. `LazyWeight` is a tensor without data that knows base and delta:

- a product with an activation (`F.linear`, `@`, `addmm`, ...; also of the transpose, a block, or cast) is the fused operator,
  which saves the activation and the parameters and forms no dense weight gradient;
- every other operation gets the dense weight for as long as it runs, and autograd keeps the tensor without data. Views
  and casts stay lazy. Its gradient is the dense one, for one use at a time;
- what takes a weight out of the graph (`detach`, `clone`, `numpy`, printing, ...) gets an ordinary tensor.

Compiled graphs never see one: there the graph pass does the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rosa_fx.errors import EagerTrainingWarning, RosaError
from rosa_fx.kernels import direct, ops
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region

aten = torch.ops.aten

# Operations on the weight alone that need no data: the same values in another arrangement, or a part of them.
_ARRANGING = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.alias.default,
    aten._to_copy.default,
}
_FLIPPING = {aten.transpose.int, aten.permute.default}
_FLIPS = {(0, 1), (1, 0)}
_SAME = {aten.alias.default, aten._to_copy.default}

Step = tuple[Any, tuple[Any, ...], dict[str, Any], int | None]
"""Operator, its further arguments, its keywords, and which of its results."""


class Source:
    """What one reading of a weight is made of: base [..], delta [..] and the layout key, and the state they were in."""

    def __init__(self, base: list[Tensor], delta: list[Tensor], key: str) -> None:
        self.base, self.delta, self.key = base, delta, key
        self.layout = Layout.parse(key)
        self._versions = [tensor._version for tensor in delta]

    def dense(self) -> Tensor:
        """W [N, K], differentiable where gradients are on."""
        if [tensor._version for tensor in self.delta] != self._versions:
            raise RuntimeError(
                "a weight that was read before its adapter changed (an optimizer step, loading, merging) is used after it: "
                "read the weight again, or keep weight.detach(), which is a copy"
            )
        return ops.materialize(self.base, self.delta, self.key)


class LazyWeight(Tensor):
    """W, or an arrangement of it, without data. See the module's text."""

    source: Source
    steps: tuple[Step, ...]
    observed: bool

    @staticmethod
    def __new__(cls, source: Source, like: Tensor | None = None, steps: tuple[Step, ...] = ()) -> LazyWeight:
        """W itself, or what `steps` make of it, which is laid out as `like`."""
        make: Any = Tensor._make_wrapper_subclass
        device = source.base[0].device
        if like is None:
            made: LazyWeight = make(cls, source.layout.shape, dtype=source.layout.dtype, device=device)
        else:
            place = {"strides": like.stride(), "storage_offset": like.storage_offset()}
            made = make(cls, like.size(), dtype=like.dtype, device=device, **place)
        made.source, made.steps, made.observed = source, steps, False
        return made

    def plain(self) -> Tensor:
        """The same values as an ordinary tensor."""
        dense = self.source.dense()
        for operator, arguments, keywords, index in self.steps:
            result = operator(dense, *arguments, **keywords)
            dense = result if index is None else result[index]
        return dense

    def part(self) -> tuple[Region, bool] | None:
        """Which rows and columns of W this is, and whether it is their transpose; None for anything else."""
        rows, columns = self.source.layout.shape
        box = [0, rows, 0, columns]
        flipped = stacked = False
        for operator, arguments, _, index in self.steps:
            if operator in _SAME:
                continue
            if stacked:
                chosen = _matrix_of_stack(operator, arguments, index, rows // self.source.layout.stack)
                if chosen is None:
                    return None
                box[0], box[1], stacked = *chosen, False
            elif operator is aten.view.default and box == [0, rows, 0, columns] and not flipped:
                each = rows // self.source.layout.stack
                if tuple(arguments[0]) != (self.source.layout.stack, each, columns):
                    return None
                stacked = True
            elif operator is aten.t.default or (operator in _FLIPPING and _dims(arguments) in _FLIPS):
                flipped = not flipped
            else:
                cut = _cut(operator, arguments, index, [box[1] - box[0], box[3] - box[2]], flipped)
                if cut is None:
                    return None
                axis, start, stop = cut
                box[2 * axis], box[2 * axis + 1] = box[2 * axis] + start, box[2 * axis] + stop
        return None if stacked else ((box[0], box[1], box[2], box[3]), flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None:
            result = product(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _READING:
            args, kwargs = tree_map_only(LazyWeight, LazyWeight.plain, (args, kwargs))
            return func(*args, **kwargs)
        if func in _OBSERVING:
            args[0].observed = True  # the fused operator has no gradient of the weight to show
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _ARRANGING and isinstance(args[0], LazyWeight) and not kwargs.keys() - {"dtype"}:
            return _arranged(func, args[0], args[1:], kwargs)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, LazyWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                # The change would go to a copy and be lost.
                raise RosaError(
                    f"{func} would change a rewritten weight {tuple(value.shape)} in place, which is computed anew where it is "
                    "read: change a copy (weight.detach()), or base and adapter through rosa_fx.adapter(model, name)"
                )
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.plain, (args, kwargs))
        return func(*args, **kwargs)


def _dims(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    dims = arguments[0] if len(arguments) == 1 else arguments
    return tuple(dim % 2 for dim in dims)


def _matrix_of_stack(operator: Any, arguments: tuple[Any, ...], index: int | None, rows: int) -> tuple[int, int] | None:
    """The rows of the matrix that a step takes out of a stack."""
    if operator is aten.select.int and arguments[0] == 0 and arguments[1] >= 0:
        number = arguments[1]
    elif operator is aten.unbind.int and index is not None and not any(arguments):
        number = index
    else:
        return None
    return number * rows, (number + 1) * rows


def _cut(
    operator: Any, arguments: tuple[Any, ...], index: int | None, sizes: list[int], flipped: bool
) -> tuple[int, int, int] | None:
    """(axis of W, start, stop) of what a step leaves of a matrix of `sizes`."""
    if operator is aten.slice.Tensor:
        defaults: list[Any] = [0, None, None, 1]
        dim, start, stop, step = [*arguments, *defaults[len(arguments) :]]
        axis = (dim % 2) ^ flipped
        begin, end, stride = slice(start, stop, step).indices(sizes[axis])
        return (axis, begin, end) if stride == 1 and end > begin else None
    if index is None or operator not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    lengths, dim = arguments[0], arguments[1] if len(arguments) > 1 else 0
    axis = (dim % 2) ^ flipped
    if isinstance(lengths, int):
        start = index * lengths
        return axis, start, min(start + lengths, sizes[axis])
    start = sum(lengths[:index])
    return axis, start, start + lengths[index]


def _arranged(func: Any, weight: LazyWeight, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    shape = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device="meta")
    result = func(shape, *arguments, **keywords)
    if isinstance(result, Tensor):
        return LazyWeight(weight.source, result, (*weight.steps, (func, arguments, keywords, None)))
    return [
        LazyWeight(weight.source, part, (*weight.steps, (func, arguments, keywords, index)))
        for index, part in enumerate(result)
    ]


class _Attach(torch.autograd.Function):
    """The lazy weight as a function of the delta: for uses that are not fused operators, from a dense gradient."""

    @staticmethod
    def forward(ctx: Any, source: Source, *delta: Tensor) -> LazyWeight:
        ctx.source = source
        return LazyWeight(source)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        source: Source = ctx.source
        out: list[Tensor | None] = [None] * len(source.delta)
        # Terms that are frozen as a whole cost nothing.
        layout, positions = source.layout.only(ctx.needs_input_grad[1:])
        if positions:
            found = ops.materialize_backward(grads[0].contiguous(), [source.delta[i] for i in positions], layout.key)
            for position, grad in zip(layout.trainable, found, strict=True):
                out[positions[position]] = grad
        return None, *out


def is_eager() -> bool:
    """Whether Python runs the model here and now: no capture, no transform of `torch.func`."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def lazy_weight(base: list[Tensor], delta: list[Tensor], key: str) -> Tensor:
    """W for eager mode, as `ops.materialize(base, delta, key)` but without data."""
    source = Source(base, delta, key)
    if not torch.is_grad_enabled():
        return LazyWeight(source)
    weight: Tensor = _Attach.apply(source, *delta)
    return weight


_warned = False


def warn_once() -> None:
    """Once in a process: what training without `torch.compile` leaves on the table."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "the model trains without torch.compile: every layer dequantises its weight and adds its adapters in calls of "
            "their own, and activations between them are kept. rosa_fx.compile_blocks(model) (starts sooner) or "
            "torch.compile(model) saves time and memory; the results are the same to rounding",
            EagerTrainingWarning,
            stacklevel=2,
        )


# --- products --------------------------------------------------------------------------------------------------------


def _fused(x: Any, weight: Any, bias: Tensor | None, transposed: bool) -> Any:
    """x Wᵀ + bias, or x W + bias if `transposed`, for `weight` = a part of W or of Wᵀ; NotImplemented if that is none."""
    part = weight.part() if isinstance(weight, LazyWeight) and not weight.observed else None
    plain = isinstance(x, Tensor) and not isinstance(x, LazyWeight) and not isinstance(bias, LazyWeight)
    if part is None or not plain or x.dim() == 0:
        return NotImplemented
    region, flipped = part
    device = x.device.type
    dtype = weight.dtype
    autocast = torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64 and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    source = weight.source
    layout = source.layout.part(region)
    rows, columns = layout.out_shape
    transposed ^= flipped
    # Operands that do not fit are left to torch, which has an error for them.
    fits = x.dtype == dtype and x.shape[-1] == (rows if transposed else columns) and x.device == weight.device
    out = columns if transposed else rows
    if not fits or (bias is not None and (bias.dtype != dtype or tuple(bias.shape) != (out,))):
        return NotImplemented
    product: Any = ops.linear_t if transposed else ops.linear
    if _is_all_there_is(x, bias, *source.base, *source.delta):
        product = direct.linear_t if transposed else direct.linear
    with torch.autocast(device, enabled=False) if autocast else _nothing:
        return product(x, bias, source.base, source.delta, layout.key)


def _is_all_there_is(*tensors: Tensor | None) -> bool:
    """Whether nobody but the kernel has to see a product of these: no gradients, no modes, no kinds of tensors of their own."""
    return (
        not torch.is_grad_enabled()
        and is_eager()
        and not torch._C._len_torch_dispatch_stack()
        and all(type(tensor) in _PLAIN for tensor in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


_nothing = _Nothing()


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return _fused(input, weight, bias, transposed=False)


def _matmul(input: Any, other: Any, **keywords: Any) -> Any:
    return NotImplemented if keywords else _fused(input, other, None, transposed=True)


def _rmatmul(self: Any, other: Any) -> Any:
    return _fused(other, self, None, transposed=True)


def _addmm(input: Any, mat1: Any, mat2: Any, **keywords: Any) -> Any:
    if keywords or not isinstance(input, Tensor) or input.dim() != 1 or not isinstance(mat1, Tensor) or mat1.dim() != 2:
        return NotImplemented
    return _fused(mat1, mat2, input, transposed=True)


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    Tensor.mm: _matmul,
    Tensor.addmm: _addmm,
}

_READING_NAMES: Sequence[str] = (
    *("detach", "clone", "contiguous", "numpy", "tolist", "item", "cpu", "cuda", "data_ptr", "untyped_storage", "storage"),
    *("__deepcopy__", "__reduce_ex__", "__array__", "__dlpack__", "__repr__", "__format__", "__str__", "share_memory_"),
)
_tensor: Any = Tensor
_READING: set[Any] = {getattr(Tensor, name) for name in _READING_NAMES} | {
    _tensor.data.__get__,
    torch.clone,
    torch.detach,
}
_OBSERVING: set[Any] = {Tensor.register_hook, Tensor.retain_grad}
