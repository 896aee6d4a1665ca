"""Scatter, SDDMM and top-k on the CPU: against float64, against plain torch, and bit for bit over threads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_layouts import laid_out
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels import topk
from rosa_fx.kernels.cpu import sparse
from rosa_fx.kernels.cpu.sparse import scatter_add_, sddmm, select_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
layouts = st.sampled_from(["rows", "columns", "strided", "expanded"])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_mask(rows: int, columns: int, density: float, clustered: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chance = torch.full((rows, columns), density)
    if clustered and rows:
        chance *= 0.1
        chance[rows // 2] = 1.0
    dense = torch.rand(rows, columns, generator=generator) < chance
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = dense.sum(1).cumsum(0)
    return offsets, dense.nonzero()[:, 1].to(torch.int32)


def plain_sddmm(dy: Tensor, x: Tensor, offsets: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())
    return (dy.to(dtype)[:, rows] * x.to(dtype)[:, cols.long()]).sum(0)


def reference_topk(score: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    kept = torch.sort(score.clamp(min=0).flatten(), descending=True, stable=True).indices[:nnz].sort().values
    columns = max(1, score.shape[1])
    offsets = torch.zeros(score.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(kept // columns, minlength=score.shape[0]).cumsum(0)
    return offsets, (kept % columns).to(torch.int32)


def with_threads(threads: int, offsets: Tensor, cols: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    torch.set_num_threads(threads)
    return sddmm(dy, x, offsets, cols)


def test_library_is_compiled() -> None:
    assert sparse.native(torch.empty(0)) is not None, "the test machine needs a C++ compiler"
    assert sparse.native(torch.empty(0, device="meta")) is None
    assert sparse.native(torch.empty(0, dtype=torch.float64)) is None


@FUZZ
@given(
    st.sampled_from([0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 97, 127, 128, 129, 200, 1030]),
    st.integers(0, 140),
    st.integers(0, 140),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.booleans(),
    dtypes,
    dtypes,
    layouts,
    layouts,
    seeds,
)
def test_sddmm(
    M: int, N: int, K: int, density: float, clustered: bool, dy_t: torch.dtype, x_t: torch.dtype, dy_l: str, x_l: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets, cols = random_mask(N, K, density, clustered, generator)
    dy = laid_out(torch.randn(M, N, generator=generator).to(dy_t), dy_l)
    x = laid_out(torch.randn(M, K, generator=generator).to(x_t), x_l)
    out = sddmm(dy, x, offsets, cols)
    exact = plain_sddmm(dy, x, offsets, cols, torch.float64)
    plain = plain_sddmm(dy, x, offsets, cols, torch.float32)
    assert out.dtype == torch.float32
    assert out.shape == cols.shape
    size = plain_sddmm(dy.abs(), x.abs(), offsets, cols, torch.float64)
    ours, theirs = (out - exact).norm(), (plain - exact).norm()
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * size.norm()
    # One value: a bound that holds for every order of summation with at most 64 roundings on any path.
    assert bool(((out - exact).abs() <= 64 * torch.finfo(torch.float32).eps * size).all())
    one = with_threads(1, offsets, cols, dy, x)
    assert torch.equal(one, with_threads(3, offsets, cols, dy, x))
    assert torch.equal(one, out)
    fallback = sparse._sddmm_torch(dy, x, offsets, cols)
    assert (fallback - exact).norm() <= 2 * theirs + torch.finfo(torch.float32).eps * size.norm()
    assert torch.equal(sddmm(dy, x, offsets, cols, torch.bfloat16), out.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(700, 257, 1031), (4, 3, 40009), (130, 37, 9001)])
def test_sddmm_is_as_exact_as_torch_and_deterministic(M: int, N: int, K: int, clustered: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(M)
    offsets, cols = random_mask(N, K, 0.05, clustered, generator)
    dy, x = torch.randn(M, N, generator=generator).to(dtype), torch.randn(M, K, generator=generator).to(dtype)
    exact = sparse._sddmm_torch(dy.double(), x.double(), offsets, cols)
    rows = torch.repeat_interleave(torch.arange(N), offsets.diff().long())
    gemm = (dy.float().t() @ x.float())[rows, cols.long()]
    out = with_threads(1, offsets, cols, dy, x)
    # For a handful of rows the chain of fused multiply-adds in a GEMM rounds less often than products and their sum do.
    plain = gemm if M > 16 else plain_sddmm(dy, x, offsets, cols, torch.float32)
    assert (out - exact).norm() <= 1.1 * (plain - exact).norm()
    assert all(torch.equal(out, with_threads(threads, offsets, cols, dy, x)) for threads in (2, 3, 5))


def test_sddmm_overwrites_whatever_memory_held_and_ignores_unused_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets, cols = torch.tensor([0, 2, 2, 3], dtype=torch.int32), torch.tensor([0, 40, 7], dtype=torch.int32)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for M in (0, 1, 70, 300):
        dy, x = torch.ones(M, 3), torch.ones(M, 64)
        x[:, 41:] = float("nan")
        dy[:, 1] = float("inf")
        assert sddmm(dy, x, offsets, cols).tolist() == [M] * 3


def test_sddmm_carries_inf_and_nan_to_their_entries_only() -> None:
    offsets, cols = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    for dtype in DTYPES:
        dy, x = torch.ones(65, 1, dtype=dtype), torch.ones(65, 3, dtype=dtype)
        x[64, 0], x[3, 1] = float("inf"), float("nan")
        out = sddmm(dy, x, offsets, cols)
        assert out[0] == float("inf")
        assert out[1].isnan()
        assert out[2] == 65


def test_every_half_precision_value_is_read_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    cols, offsets = torch.arange(2**16, dtype=torch.int32), torch.tensor([0, 2**16], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)[None]
        for x in (values, values.t().contiguous().t(), values.expand(17, -1)):
            dy = torch.zeros(x.shape[0], 1)
            dy[-1] = 1
            finite = values[0].isfinite()
            assert torch.equal(sddmm(dy, x, offsets, cols)[finite], values[0].float()[finite])


@FUZZ
@given(st.integers(0, 70), st.integers(0, 300), st.sampled_from([0.0, 0.1, 1.0]), st.booleans(), dtypes, dtypes, seeds)
def test_scatter_add(N: int, K: int, density: float, clustered: bool, w_t: torch.dtype, v_t: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets, cols = random_mask(N, K, density, clustered, generator)
    weight = torch.randn(N, K, generator=generator).to(w_t)
    values = torch.randn(2 * len(cols), generator=generator).to(v_t)[::2]
    rows = torch.repeat_interleave(torch.arange(N), offsets.diff().long())
    expected = weight.clone()
    expected[rows, cols.long()] = (weight[rows, cols.long()].float() + values.float()).to(w_t)
    fallback = weight.clone()
    sparse._scatter_add_torch(fallback, values, offsets, cols)
    scatter_add_(weight, values, offsets, cols)
    assert torch.equal(weight, expected)
    assert torch.equal(fallback, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_add_rounds_like_torch(dtype: torch.dtype) -> None:
    """Halfway cases, subnormals, overflow, infinities and NaN, over the whole range of fp32 bit patterns."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    halfway = (torch.arange(2**16) << 16 | 0x8000).to(torch.int32)  # ties of bf16
    subnormal = ((torch.arange(2**16) + 0.5) * 2.0**-26).float()  # around fp16's subnormals, with ties
    top = 65504 + torch.arange(0, 64.0)
    values = torch.cat([bits.view(torch.float32), halfway.view(torch.float32), subnormal, -top, top])
    n = len(values)
    weight = torch.zeros(1, n, dtype=dtype)
    scatter_add_(weight, values, torch.tensor([0, n], dtype=torch.int32), torch.arange(n, dtype=torch.int32))
    expected = (values + 0.0).to(dtype)
    assert torch.equal(weight[0].isnan(), expected.isnan())
    assert torch.equal(weight[0].nan_to_num(1.0), expected.nan_to_num(1.0))


@FUZZ
@given(
    st.integers(0, 40),
    st.sampled_from([0, 1, 7, 31, 32, 33, 1023, 1024, 1025, 1100]),
    st.floats(0, 1),
    st.sampled_from(["uniform", "ties", "tiny", "zeros", "huge", "signed"]),
    layouts,
    seeds,
)
def test_select_topk(N: int, K: int, share: float, kind: str, layout: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(N, K, generator=generator)
    if kind == "ties":
        score = (score * 4).floor()
    elif kind == "tiny":
        score = (score * 2**20).int().view(torch.float32)  # subnormals: only the low bits differ
    elif kind == "zeros":
        score = torch.where(score > 0.9, score, torch.zeros(()))
    elif kind == "huge":
        score = torch.where(score > 0.9, torch.full((), torch.finfo(torch.float32).max), score)
    elif kind == "signed":
        score = (score - 0.5).where(score > 0.4, torch.full((), -0.0))
    score = laid_out(score, layout)
    nnz = round(share * score.numel())
    offsets, cols = select_topk(score, nnz)
    expected_offsets, expected_cols = reference_topk(score, nnz)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(cols, expected_cols)
    assert offsets.dtype == cols.dtype == torch.int32
    fallback_offsets, fallback_cols = topk.select_topk(score, nnz)
    assert torch.equal(fallback_offsets, expected_offsets)
    assert torch.equal(fallback_cols, expected_cols)
    assert fallback_offsets.dtype == fallback_cols.dtype == torch.int32


@pytest.mark.parametrize("shape", [(700, 1201), (3, 40_001)])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_select_topk_over_several_batches_and_threads(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_LEAST", 5000)
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        score = (score * 8).floor()
    for nnz in (score.numel() // 17, score.numel()):
        expected = reference_topk(score, nnz)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for result in (select_topk(score, nnz), topk.select_topk(score, nnz)):
                assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_select_topk_without_a_kernel_needs_a_tenth_of_the_scores_and_never_waits() -> None:
    """What a GPU runs: peak of all that lives beside the result. Under fake tensors reading a value raises."""
    score = torch.rand(2048, 2100, generator=torch.Generator().manual_seed(0))
    nnz = score.numel() // 150
    with Allocations() as made:
        topk.select_topk(score, nnz)
    result = 4 * (2 * nnz + 2048)
    assert 0 < made.peak - result <= score.nbytes / 10
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.empty(300, 1000)
        offsets, cols = topk.select_topk(fake, 5000)
        assert (offsets.shape, cols.shape) == ((301,), (5000,))
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            fake.max().item()


@pytest.mark.parametrize("kind", ["random", "ties", "two values", "rows", "columns", "sampled rows", "mostly zero"])
@pytest.mark.parametrize(("N", "K", "nnz"), [(300, 1201, 5000), (8192, 16, 2048), (1, 90_001, 1), (90_001, 1, 700)])
def test_select_topk_of_few_among_many(N: int, K: int, nnz: int, kind: str) -> None:
    """Large scores, of which a sample tells where to look: whatever it misses."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(N, K, generator=generator)
    if kind == "ties":
        score = (score * 300).floor()
    elif kind == "two values":
        score = (score > 0.5).float()
    elif kind == "rows":
        score[:: max(1, N // 7)] += 1
    elif kind == "columns":
        score[:, :: max(1, K // 7)] += 1
    elif kind == "sampled rows":  # of [8192, 16]: too few reach what the sample says
        score[::32] += 1
    elif kind == "mostly zero":
        score = score.where(torch.rand(N, K, generator=generator) < nnz / (2 * N * K), torch.zeros(()))
    expected = reference_topk(score, nnz)
    for view in (score, laid_out(score, "columns")):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(select_topk(view, nnz), expected))
    score[N // 2, K // 2] = float("nan")
    assert bool((select_topk(score, nnz)[1] == -1).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_select_topk_reports_what_is_not_finite(bad: float) -> None:
    for position in ((0, 0), (4, 32), (4, 31), (2, 7)):
        score = torch.rand(5, 33)
        score[position] = bad
        for nnz in (0, 11):
            for offsets, cols in (select_topk(score, nnz), topk.select_topk(score, nnz)):
                assert cols.tolist() == [-1] * nnz
                assert offsets.tolist() == [0] + [nnz] * 5


def test_errors_name_what_is_wrong() -> None:
    offsets, cols = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(RosaError, match="contiguous"):
        scatter_add_(torch.zeros(3, 2).t(), torch.zeros(2), offsets, cols)
    with pytest.raises(RosaError, match=r"\[3\] values for 2"):
        scatter_add_(torch.zeros(2, 3), torch.zeros(3), offsets, cols)
    with pytest.raises(RosaError, match="row_offsets has 3 entries, 4 rows need 5"):
        sddmm(torch.zeros(8, 4), torch.zeros(8, 3), offsets, cols)
    with pytest.raises(RosaError, match="share M"):
        sddmm(torch.zeros(8, 2), torch.zeros(9, 3), offsets, cols)
    with pytest.raises(RosaError, match="cols must be a 1-D int32"):
        sddmm(torch.zeros(8, 2), torch.zeros(8, 3), offsets, cols.long())
    with pytest.raises(RosaError, match="ends at 0, but cols has 2 entries"):
        sddmm(torch.zeros(8, 2), torch.zeros(8, 3), torch.zeros_like(offsets), cols)
    with pytest.raises(RosaError, match="nnz=7"):
        select_topk(torch.zeros(2, 3), 7)
    with pytest.raises(RosaError, match="float32 matrix"):
        select_topk(torch.zeros(2, 3, dtype=torch.bfloat16), 1)


def test_float64_stays_float64() -> None:
    offsets, cols = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    weight = torch.zeros(2, 3, dtype=torch.float64)
    scatter_add_(weight, torch.tensor([1e-30, 1.0]).double() + 1, offsets, cols)
    assert weight.tolist() == [[0, 1, 0], [0, 0, 2]]
    tiny = torch.full((1, 3), 1 + 2.0**-40, dtype=torch.float64)
    assert sddmm(tiny[:, :2], tiny, offsets, cols, torch.float64).tolist() == [(1 + 2.0**-40) ** 2] * 2


def test_without_a_compiler_torch_takes_over_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from rosa_fx.kernels import inductor

    def no_compiler(source: str) -> None:
        raise RuntimeError("No working C++ compiler found")

    offsets, cols = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    monkeypatch.setattr(inductor, "load_cpp", no_compiler)
    sparse._compile.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="No working C\\+\\+ compiler found.*C\\+\\+ compiler"):
            out = sddmm(torch.ones(8, 2), torch.ones(8, 3), offsets, cols)
        assert out.tolist() == [8, 8]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select_topk(torch.ones(2, 3), 2)[1].tolist() == [0, 1]
    finally:
        sparse._compile.cache_clear()


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom rosa_fx.kernels.cpu import sparse\n"
        "assert sparse._compile() is not None\n"
        "print(sparse.select_topk(torch.ones(2, 3), 2)[1].tolist())"
    )
    paths = [str(Path(sparse.__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["[0, 1]"] * 2
    assert len(list(tmp_path.glob("*/*.so"))) == 1
