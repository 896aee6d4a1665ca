"""`merge_adapters`: a weighted sum of saved adapters as one adapter."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_fx import adapter_format
from rosa_fx.adapter_files import check_fits
from rosa_fx.adapter_format import AdapterFiles
from rosa_fx.adapters import set_masks
from rosa_fx.attach import transform
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask
from rosa_fx.spec import RosaSpec
from rosa_fx.state import is_transformed, weight_of
from rosa_fx.targets import Target


def merge_adapters(
    model: nn.Module, adapters: Sequence[tuple[str | os.PathLike[str], float]], *, strict: bool = False
) -> nn.Module:
    """Put Σ weight · ΔW of several saved adapters onto a plain model as one adapter, in place; returns the same object.

    The low-rank terms are set side by side (ranks add up, to min(N, K) at most), and the sparse
    term has the union of the masks. The sum is exact but for one rounding of B and of the values, which are float32 here
    unless all adapters have one other dtype. Save it with `save_adapter`, or `merge` it into the base.

    Args:
        model: the base model that all of them were trained on, plain.
        adapters: (directory, weight) pairs; weights are any finite numbers.
        strict: as for `rosa_fx.transform`.

    Raises:
        RosaError: nothing given, a weight that is not finite, a damaged adapter, one for another model, or bases of different
            formats. The model is then untouched.
    """
    if not adapters:
        raise RosaError("adapters is empty: give (directory, weight) pairs")
    if is_transformed(model):
        raise RosaError("the model is transformed: merge_adapters takes the plain base model")
    for folder, share in adapters:
        if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
            raise RosaError(f"the weight of the adapter {folder} is {share!r}: use a finite number")
    plain = getattr(model, "_orig_mod", model)
    parts: list[tuple[AdapterFiles, float, dict[str, Tensor], dict[str, Target]]] = []
    for folder, share in adapters:
        files = adapter_format.read(Path(folder))
        targets, tensors = check_fits(plain, files)
        parts.append((files, float(share), tensors, {target.name: target for target in targets}))
    sums = {name: _sum(name, parts) for name in _names(parts)}
    transform(plain, _spec(parts, sums), strict=strict)
    with torch.no_grad():
        for name, total in sums.items():
            weight = weight_of(plain, name)
            if total.low_rank is not None:
                assert weight.low_rank is not None
                weight.low_rank.A.copy_(total.low_rank[0])
                weight.low_rank.B.copy_(total.low_rank[1])
            if total.mask is not None:
                assert weight.sparse is not None
                assert total.values is not None
                set_masks(plain, {name: total.mask})
                weight.sparse.values.copy_(total.values)
    return model


@dataclasses.dataclass(frozen=True)
class _Sum:
    """Of one weight, read as the matrix `shape`: A [.., R, K] and B [.., N, R] with scale 1, the union of the masks, values."""

    shape: tuple[int, int]
    base: str
    low_rank: tuple[Tensor, Tensor] | None
    mask: Mask | None
    values: Tensor | None


Part = tuple[AdapterFiles, float, dict[str, Tensor], dict[str, Target]]


def _names(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(name for _, _, _, targets in parts for name in targets))


def _sum(name: str, parts: Sequence[Part]) -> _Sum:
    A, B, rows, cols, values, bases = [], [], [], [], [], {}
    shape = (0, 0)
    for files, share, tensors, targets in parts:
        if name not in targets:
            continue
        target = targets[name]
        shape = target.reading.matrix
        bases[target.base] = files.folder
        if target.rank:
            A.append(tensors[f"{name}.low_rank.A"].double())
            B.append(tensors[f"{name}.low_rank.B"].double() * (share * target.scale))
        if target.density > 0 and files.weights[name].has_mask:
            mask = Mask(tensors[f"{name}.sparse.row_offsets"], tensors[f"{name}.sparse.cols"], shape)
            rows.append(mask.rows())
            cols.append(mask.cols.long())
            values.append(tensors[f"{name}.sparse.values"].double() * share)
    if len(bases) > 1:
        found = ", ".join(f"{base} in {folder}" for base, folder in bases.items())
        raise RosaError(f"{name}: the adapters have different bases ({found}): a sum needs one")
    low_rank = _joined(torch.cat(A, dim=-2), torch.cat(B, dim=-1)) if A else None
    union, total = None, None
    if rows:
        flat, places = torch.unique(torch.cat(rows) * shape[1] + torch.cat(cols), return_inverse=True)
        total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device).index_add_(0, places, torch.cat(values))
        union = Mask.from_indices(flat // shape[1], flat % shape[1], shape)
    return _Sum(shape, next(iter(bases)), low_rank, union, total)


def _joined(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with at most min(N, K) columns of B."""
    rows, columns = B.shape[-2], A.shape[-1]
    if A.shape[-2] <= min(rows, columns):
        return A, B
    product = B @ A
    one = torch.eye(min(rows, columns), dtype=A.dtype, device=A.device).expand(*A.shape[:-2], -1, -1)
    return (one, product) if columns <= rows else (product, one)


def _spec(parts: Sequence[Part], sums: dict[str, _Sum]) -> RosaSpec:
    first = parts[0][0].spec
    for files, *_ in parts[1:]:
        for field in ("blocksize", "double_quant"):
            here, there = getattr(files.spec, field), getattr(first, field)
            if here != there:
                raise RosaError(
                    f"{field} is {there} in the adapter {parts[0][0].folder} and {here} in {files.folder}: a sum needs one base"
                )
    overrides = {}
    for name, total in sums.items():
        rank = 0 if total.low_rank is None else total.low_rank[0].shape[-2]
        # Between the densities of this number of entries and of one more.
        density = 0.0 if total.mask is None else min(1.0, (total.mask.nnz + 0.5) / (total.shape[0] * total.shape[1]))
        scale_one = float(math.sqrt(rank) if first.rank_stabilized else rank) or 1.0
        overrides[name] = {"rank": rank, "alpha": scale_one, "density": density, "base": total.base}
    dtypes = {files.spec.torch_adapter_dtype for files, *_ in parts}
    sparse = any(total.mask is not None for total in sums.values())
    return dataclasses.replace(
        first,
        targets=tuple(sums),
        exclude=(),
        overrides=overrides,
        adapter_dtype=str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32",
        rank=1,  # every weight has its own
        density=0.0,
        dropout=0.0,
        schedule="wl0" if sparse else "lora_only",
    )
