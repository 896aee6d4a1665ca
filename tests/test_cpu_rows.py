"""Rows of D(Q) + S decoded by the CPU kernels: the same bits as the codecs', wherever a part of the weight begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels import composition, ops, tiles
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.cpu import gemm, rows
from rosa_fx.kernels.layout import Layout
from rosa_fx.mask import Mask

MakeCase = Callable[..., Any]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
BASES: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": True}),
    ("fp4", {"blocksize": 32}),
    ("nf4", {"blocksize": 4096}),
    ("int8", {}),
    ("dense", {}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.sampled_from([1, 2, 3, 7, 16, 31, 33, 64, 65, 97, 128, 1025])


def random_csr(N: int, K: int, density: float, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    mask = Mask.from_dense(torch.rand(N, K, generator=generator) < density)
    return [torch.randn(mask.nnz, generator=generator).to(dtype), mask.row_offsets, mask.cols]


@FUZZ
@given(
    sizes, sizes, st.sampled_from(BASES), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 9)
)
def test_rows_are_the_codecs_bits_and_sparse_values(
    N: int, K: int, base: tuple[str, dict[str, Any]], weight_t: torch.dtype, out_t: torch.dtype, cut: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    form = base_format(base[0], **base[1])
    tensors = form.quantize(torch.randn(N, K, generator=generator).to(weight_t))
    csr = random_csr(N, K, 0.1, weight_t, generator)
    row, column = int(cut * (N - 1)), int((1 - cut) * (K - 1))
    region = (row, N, column, K)
    for sparse in (None, csr):
        source = rows.source((N, K), form.stored(tensors), sparse)
        assert source is not None
        wide = form.dequantize(tensors, (N, K), torch.float32)
        if sparse is not None:
            mask = Mask(csr[1], csr[2], (N, K))
            wide[mask.rows(), mask.cols.long()] += csr[0].float()
        expected = wide.to(out_t)[row:, column:]
        held = torch.full((N - row, K - column + 3), float("nan"), dtype=out_t)
        source.write(region, held[:, : K - column])
        assert torch.equal(held[:, : K - column], expected)
        assert bool(held[:, K - column :].isnan().all())
        panels = torch.full((-((K - column) // -7), N - row + 1, 7), float("nan"), dtype=out_t)
        source.write(region, panels)
        assert torch.equal(torch.cat([panel[: N - row] for panel in panels], 1)[:, : K - column], expected)
        assert bool(panels[:, N - row].isnan().all())


@FUZZ
@given(sizes, sizes, st.sampled_from(BASES), st.sampled_from([0, 1, 2, 3, 4, 5, 8, 33]), st.floats(0, 1), st.integers(0, 9))
def test_few_rows(N: int, K: int, base: tuple[str, dict[str, Any]], M: int, cut: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    form = base_format(base[0], **base[1])
    tensors = form.quantize(torch.randn(N, K, generator=generator))
    csr = random_csr(N, K, 0.1, torch.float32, generator)
    row, column = int(cut * (N - 1)), int((1 - cut) * (K - 1))
    source = rows.source((N, K), form.stored(tensors), csr)
    assert source is not None
    weight = torch.empty(N - row, K - column)
    source.write((row, N, column, K), weight)
    x = torch.randn(M, K - column, generator=generator)
    outputs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            held = torch.full((M, N - row + 2), float("nan"))
            source.few((row, N, column, K), x, held[:, : N - row])
            outputs.append(held[:, : N - row])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    # A bound for every order of summation with at most 80 roundings on any path (1025 columns in at least 16 sums or less).
    paths = max(80, (K - column) // 4 + 8)
    assert bool(((outputs[0] - exact).abs() <= paths * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.parametrize("values_t", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "region"), [((300, 4096), None), ((257, 704), (3, 250, 64, 700))], ids=str)
def test_one_row_and_rows_of_very_different_length(
    shape: tuple[int, int], region: tuple[int, int, int, int] | None, values_t: torch.dtype
) -> None:
    """Of S: none, one, as many as two vectors hold and one more, all of a row. The same bits by one thread and by three."""
    N, K = shape
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(N, K, dtype=torch.bool)
    for i in range(0, N, 2):
        length = [1, 15, 16, 17, 31, 32, 33, 48, 300, K][i // 2 % 10]
        chosen[i, torch.randperm(K, generator=generator)[:length]] = True
    mask = Mask.from_dense(chosen)
    csr = [torch.randn(mask.nnz, generator=generator).to(values_t), mask.row_offsets, mask.cols]
    form = base_format("nf4")
    tensors = form.quantize(torch.randn(N, K, generator=generator))
    source = rows.source((N, K), form.stored(tensors), csr)
    assert source is not None
    weight = form.dequantize(tensors, (N, K), torch.float64)
    weight[mask.rows(), mask.cols.long()] += csr[0].double()
    row, row_stop, column, column_stop = region or (0, N, 0, K)
    weight = weight[row:row_stop, column:column_stop]
    x = torch.randn(1, column_stop - column, generator=generator)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = torch.full((1, row_stop - row), torch.nan)
            source.few((row, row_stop, column, column_stop), x, out, None)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    bound = (x.double().abs() @ weight.abs().t()) * (K + 2) * 2.0**-24
    assert ((results[0].double() - x.double() @ weight.t()).abs() <= bound).all()
    assert torch.equal(*results)


@FUZZ
@given(
    N=st.sampled_from([1, 2, 7, 31, 33, 65]),
    K=st.sampled_from([8, 64, 120, 128, 136, 192, 1000, 1024, 1032, 2176]),
    base=st.sampled_from(
        [("nf4", {"blocksize": 2**exponent}) for exponent in (5, 6, 7, 8, 12)] + [("fp4", {"double_quant": True})]
    ),
    M=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    cut=st.floats(0, 1),
    x_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_few_rows_of_codes_that_begin_at_words(
    N: int, K: int, base: tuple[str, dict[str, Any]], M: int, dtype: torch.dtype, cut: float, x_dtype: torch.dtype, seed: int
) -> None:
    """What processors with AVX-512 decode in registers, in float32 and in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    form = base_format(base[0], **base[1])
    stored = form.stored(form.quantize(torch.randn(N, K, generator=generator)))
    assert stored is not None
    assert stored.scales is not None
    poison = float("nan")
    if stored.nested is not None:  # a code of no block stands for NaN
        poison = 0
        stored.scales.clamp_(min=1)
        table = stored.nested.table.clone()
        table[0] = float("nan")
        stored = stored._replace(nested=stored.nested._replace(table=table))
    assert stored.scales is not None
    csr = random_csr(N, K, 0.1, dtype, generator) if seed % 3 else None
    row, column = int(cut * (N - 1)), int((1 - cut) * (K - 1)) // 8 * 8
    row_stop, column_stop = N - int(cut * (N - row - 1)), K - int(cut * (K - column - 8)) // 8 * 8
    source = rows.source((N, K), stored, csr)
    base_only = rows.source((N, K), stored, None)
    assert source is not None
    assert base_only is not None
    region = (row, row_stop, column, column_stop)
    weight, plain = (torch.empty(row_stop - row, column_stop - column) for _ in range(2))
    source.write(region, weight)
    base_only.write(region, plain)
    # Scales of other rows are not to be touched.
    scales = stored.scales.clone()
    blocksize = stored.blocksize
    stored.scales[: row * K // blocksize] = poison
    stored.scales[-(-row_stop * K // blocksize) :] = poison
    x = torch.randn(M, column_stop - column + 5, generator=generator).to(x_dtype)[:, : column_stop - column]
    held = torch.full((M, row_stop - row + 2), float("nan"))
    low = seed % 2 == 1
    source.few(region, x, held[:, : row_stop - row], low=low)
    for out_dtype in DTYPES[1:]:
        narrow = torch.full(held.shape, float("nan"), dtype=out_dtype)
        source.few(region, x, narrow[:, : row_stop - row], low=low)
        assert torch.equal(narrow[:, : row_stop - row], held[:, : row_stop - row].to(out_dtype))
        assert bool(narrow[:, row_stop - row :].isnan().all())
    stored.scales.copy_(scales)
    assert bool(held[:, row_stop - row :].isnan().all())
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ (plain.double().abs() + (weight - plain).abs()).t()
    # A rounding of each base weight to 8 bits where it may be, and of x; and as for any order of summation in at least 4 sums.
    rounding = 2.0**-8 if x_dtype == torch.bfloat16 else 2.0**-7 if low and x_dtype == torch.float32 else 0
    bound = (rounding + max(80, K // 4 + 8) * torch.finfo(torch.float32).eps) * size
    assert bool(((held[:, : row_stop - row] - exact).abs() <= bound).all())


def test_non_finite_sparse_values_stay_where_they_are() -> None:
    form = base_format("nf4")
    tensors = form.quantize(torch.ones(1, 64))
    csr = [torch.tensor([float("nan"), float("inf")]), torch.tensor([0, 2], dtype=torch.int32)]
    source = rows.source((1, 64), form.stored(tensors), [*csr, torch.tensor([3, 40], dtype=torch.int32)])
    assert source is not None
    for dtype in DTYPES:
        out = torch.empty(1, 64, dtype=dtype)
        source.write((0, 1, 0, 64), out)
        assert out.isnan().nonzero().tolist() == [[0, 3]]
        assert out.isinf().nonzero().tolist() == [[0, 40]]


def test_what_the_kernels_cannot_read_is_left_to_the_codecs() -> None:
    form = base_format("dense")
    stored = form.stored([torch.ones(4, 4)])
    assert rows.source((4, 4), None, None) is None
    assert rows.source((4, 4), form.stored([torch.ones(4, 4).double()]), None) is None
    assert rows.source((4, 4), form.stored([torch.ones(4, 4).t()[:, ::2]]), None) is None
    assert rows.source((4, 4), form.stored([torch.ones(4, 4, device="meta")]), None) is None
    offsets, cols = torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    assert rows.source((4, 4), stored, [torch.ones(1).double(), offsets, cols]) is None
    with pytest.raises(RosaError, match="4 rows need 5"):
        rows.source((4, 4), stored, [torch.ones(1), offsets[:-1], cols])
    with pytest.raises(RosaError, match="ends at 0, but cols has 1 entries"):
        rows.source((4, 4), stored, [torch.ones(1), torch.zeros_like(offsets), cols])


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["nf4", "int8", "dense"])
def test_tiles_few_rows_and_the_whole_weight_agree(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, base: str, dtype: torch.dtype, native: bool
) -> None:
    """On CPUs that multiply low precision natively and on others, with tiles of a few outputs, for whole and cut weights."""
    case = make_case((97, 130), base, dtype=dtype, m=11)
    monkeypatch.setattr(composition, "native", lambda dtype: native or dtype == torch.float32)
    for region in (None, (5, 60, 7, 130)):
        layout: Layout = case.layout if region is None else case.layout.part(region)
        N, K = layout.out_shape
        x, dy = case.x[:, -K:], case.dy[:, -N:]
        bias, bias_t = case.bias[-N:], torch.linspace(-1, 1, K)
        results = []
        for how in ("whole", "tiled", "few"):
            with monkeypatch.context() as patch:
                if how == "whole":
                    patch.setattr(composition, "_source", lambda *a: None)
                patch.setattr(composition, "FEW_ROWS", 64 if how == "few" else 0)
                patch.setattr(tiles, "_TILE_BYTES", 1)
                patch.setattr(tiles, "_TILE_OUTPUTS", 13)
                patch.setattr(tiles, "_PANEL", 5)
                y = ops.linear(x, bias, case.base, case.delta, layout.key)
                results.append((y, ops.linear_t(dy, bias_t, case.base, case.delta, layout.key)))
        wide = case.layout64 if region is None else case.layout64.part(region)
        inputs = (
            (x, bias, ops.linear, plain_weights(case, layout)),
            (dy, bias_t, ops.linear_t, plain_weights(case, layout, True)),
        )
        for results_of_one, (operand, b, call, weights) in zip(zip(*results, strict=True), inputs, strict=True):
            exact = call(operand.double(), b.double(), [case.base64] if base == "dense" else case.base, case.delta64, wide.key)
            # The products of an adapter library, each rounded, and added.
            plain = F.linear(operand, weights[0], b.to(dtype)) + F.linear(operand, weights[1])
            plain = plain + F.linear(F.linear(operand, weights[2]), weights[3]) * case.layout.terms[0].scale
            allowed = 1.1 * (plain.double() - exact).square().mean().sqrt() + 2**-24 * exact.square().mean().sqrt()
            for ours in results_of_one:
                assert ours.dtype == dtype
                assert (ours.double() - exact).square().mean().sqrt() <= allowed


def plain_weights(case: Any, layout: Layout, transposed: bool = False) -> list[Tensor]:
    """D(Q), S, A and B of that part of the weight in its dtype, or what takes their places where the weight is multiplied."""
    dtype, shape = layout.dtype, layout.shape
    named = dict(zip(case.names, case.delta, strict=True))
    W = layout.base.dequantize(case.base, shape, dtype)
    S = torch.zeros(shape, dtype=dtype).index_put(case.rows_cols, named["values"].to(dtype))
    row, row_stop, column, column_stop = layout.region or (0, shape[0], 0, shape[1])
    W, S = (matrix[row:row_stop, column:column_stop] for matrix in (W, S))
    A, B = named["A"][:, column:column_stop].to(dtype), named["B"][row:row_stop].to(dtype)
    return [W.t(), S.t(), B.t(), A.t()] if transposed else [W, S, A, B]


def test_scratch_memory_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiles.scratch("test", (3, 5), torch.float32)
    assert tiles.scratch("test", (2, 4), torch.bfloat16).data_ptr() == first.data_ptr()
    assert tiles.scratch("test", (3, 5), torch.float32) is first
    large = tiles.scratch("test", (30, 50), torch.float32)
    assert tiles.scratch("test", (3, 5), torch.float32).data_ptr() == large.data_ptr(), "the small block is still held"
    for size in range(1, 200):
        assert tiles.scratch("test", (size,), torch.float32).shape == (size,)
    assert len(tiles._kept.views) <= tiles._MOST_VIEWS
    monkeypatch.setattr(tiles, "_KEPT_BYTES", 8)
    assert tiles.scratch("test", (5, 5), torch.float32).data_ptr() != large.data_ptr()
    with torch.inference_mode():
        tiles.scratch("test inference", (2,), torch.float32)
    tiles.scratch("test inference", (2,), torch.float32).add_(1)


@FUZZ
@given(
    sizes,
    sizes,
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 15, 64, 65, 200]),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([0, 1, 6, 16]),
    st.booleans(),
    st.integers(0, 9),
)
def test_terms_from_which_a_product_starts(
    N: int,
    K: int,
    dtype: torch.dtype,
    value_t: torch.dtype,
    M: int,
    cut: float,
    transposed: bool,
    R: int,
    thin: bool,
    seed: int,
) -> None:
    """S, the low-rank term, or both; `thin`: its product with x is given."""
    generator = torch.Generator().manual_seed(seed)
    form = base_format("dense")
    csr = random_csr(N, K, 0.0 if R and seed % 3 == 0 else 0.1, value_t, generator)
    row, column = int(cut * (N - 1)), int((1 - cut) * (K - 1))
    source = rows.source((N, K), form.stored([torch.zeros(N, K)]), csr)
    assert source is not None
    mask, S = Mask(csr[1], csr[2], (N, K)), torch.zeros(N, K, dtype=torch.float64)
    S[mask.rows(), mask.cols.long()] = csr[0].double()
    part = S[row:, column:] if transposed else S[row:, column:].t()
    x = torch.randn(part.shape[0], M, generator=generator).to(dtype).t()
    x = x if seed % 2 else x.contiguous()
    exact, size = x.double() @ part, x.double().abs() @ part.abs()
    A, B = torch.randn(R, K, generator=generator)[:, column:], torch.randn(N, R, generator=generator).to(value_t)[row:]
    inner, outer = (B.double(), A.double()) if transposed else (A.double().t(), B.double().t())
    left = ((0.3 if transposed else 1) * (x.double() @ inner)).to(dtype) if thin else None
    product = x.double() @ inner * 0.3 if left is None else left.double() * (1 if transposed else 0.3)
    exact += product @ outer
    low_rank = (x.double().abs() @ inner.abs() if left is None else product.abs()) @ outer.abs()
    size += low_rank
    outputs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            held = torch.full((M, part.shape[1] + 2), float("nan"), dtype=dtype)
            source.terms((row, N, column, K), x, held[:, :-2], transposed, (A, B, 0.3), left)
            assert bool(held[:, -2:].isnan().all())
            outputs.append(held[:, :-2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)
    roundings = torch.finfo(torch.float32).eps * (part.shape[0] + R + 2) * size + torch.finfo(dtype).eps * exact.abs()
    if dtype == torch.bfloat16:
        roundings += 2 * torch.finfo(dtype).eps * low_rank  # its two factors and its thin product may be rounded to that
    assert bool(((outputs[0].double() - exact).abs() <= roundings + torch.finfo(dtype).smallest_normal).all())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("preferred", [False, True])
def test_gemm_of_both_libraries(monkeypatch: pytest.MonkeyPatch, preferred: bool, transposed: bool) -> None:
    """Float32 in full precision by either library, into given memory or new, with and without bias, and with nothing to sum."""
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: preferred)
    monkeypatch.setattr(gemm, "_LONGEST_SUM", 100)
    for M, K, N in ((33, 257, 65), (1, 64, 3), (0, 4, 4), (4, 0, 4)):
        x, right = torch.randn(M, K), torch.randn(N, K).t() if transposed else torch.randn(K, N)
        bias = torch.randn(N)
        exact = x.double() @ right.double()
        out = torch.full((M, N + 2), float("nan"))
        results = [gemm.product(x, right), gemm.product(x, right, out=out[:, 1:-1])]
        results += [result - bias for result in (gemm.product(x, right, bias), gemm.product(x, right, bias, torch.empty(M, N)))]
        results += [gemm.product(x, [right[start:stop] for start, stop in gemm.blocks(K)])] if K else []
        size = x.double().abs() @ right.double().abs() + bias.abs()
        for result in results:
            assert bool(((result - exact).abs() <= (K + 2) * torch.finfo(torch.float32).eps * size).all())
        assert bool(out[:, [0, -1]].isnan().all())


def test_the_library_is_chosen_by_the_processor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    for maker in ("GenuineIntel", "AuthenticAMD", ""):
        gemm._prefers_onednn.cache_clear()
        monkeypatch.setattr(gemm, "_maker", lambda maker=maker: maker)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        chosen[maker] = gemm.onednn_is_faster()
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            assert not gemm.onednn_is_faster()
    gemm._prefers_onednn.cache_clear()
    assert chosen == {"GenuineIntel": False, "AuthenticAMD": torch.backends.mkl.is_available(), "": False}
