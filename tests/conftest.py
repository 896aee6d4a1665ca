"""Shared by the tests of operators and terms: random layers, poisoned memory, a clean compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.gradients import Gradient
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.collect import receivers
from rosa_fx.kernels.terms.registry import term
from rosa_fx.mask import Mask

# Tests are imported by path, which leaves their folder out; the modules that they share are imported by name.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite(
    "adapter_models",
    "allocations",
    "captured_models",
    "chat_models",
    "interpreter",
    "reference_rosa",
    "rewritten_models",
    "target_models",
    "trainer_models",
    "training_models",
    "two_processes",
)


@pytest.fixture(autouse=True)
def _no_earlier_breaks() -> None:
    """Dynamo counts graph breaks for the whole process; a test looks at its own."""
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters["graph_break"].clear()


class Nobody:
    """Takes the gradients of a `collect_received` term whose number is 0."""

    def take(self, gradient: Gradient) -> None:
        gradient.dense().fill_(torch.nan)


NOBODY = receivers[0] = Nobody()


@dataclass
class Case:
    """A rewritten weight with random operands. `names` are those of `delta`."""

    layout: Layout
    base: list[Tensor]
    delta: list[Tensor]
    names: list[str]
    x: Tensor
    dy: Tensor
    bias: Tensor

    def leaves(self, delta: list[Tensor] | None = None) -> list[Tensor]:
        """`delta` with floating tensors that require gradients."""
        chosen = self.delta if delta is None else delta
        return [t.detach().requires_grad_() if t.is_floating_point() else t for t in chosen]

    @property
    def base64(self) -> Tensor:
        """The exact D(Q) [N, K] in float64."""
        return self.layout.base.dequantize(self.base, self.layout.shape, torch.float64)

    @property
    def layout64(self) -> Layout:
        return self.layout.with_dtype(torch.float64)

    @property
    def delta64(self) -> list[Tensor]:
        return [tensor.double() if tensor.is_floating_point() else tensor for tensor in self.delta]

    @property
    def rows_cols(self) -> tuple[Tensor, Tensor]:
        offsets, cols = (self.delta[self.names.index(name)] for name in ("row_offsets", "cols"))
        return Mask(offsets, cols, self.layout.shape).rows(), cols.long()


def build_case(
    shape: tuple[int, int] = (12, 16),
    base: str = "dense",
    *,
    double_quant: bool = False,
    terms: Sequence[str] = ("low_rank", "sparse"),
    rank: int = 3,
    mask: Tensor | float = 0.2,
    m: int = 5,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    scale: float = 1.3,
    step: float = 0.02,
    seed: int = 0,
) -> Case:
    """Random operands: unit-variance x and dy, a weight of variance 1/K, B and sparse values of size `step`.

    `mask` is bool [N, K], or the density of a random one.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    N, K = shape
    fields = {"double_quant": double_quant} if base in ("nf4", "fp4") else {}
    form = base_format(base, **fields)
    if not isinstance(mask, Tensor):
        chosen = torch.randperm(N * K, generator=generator)[: int(mask * N * K)]
        mask = torch.zeros(N * K, dtype=torch.bool).index_fill_(0, chosen, True).view(shape)
    csr = Mask.from_dense(mask)
    tensors: dict[str, list[Tensor]] = {
        "low_rank": [(randn(rank, K) * K**-0.5).to(adapter_dtype), (randn(N, rank) * step).to(adapter_dtype)],
        "sparse": [(randn(csr.nnz) * step).to(adapter_dtype), csr.row_offsets, csr.cols],
        "collect_gradient": [torch.zeros(()).expand(shape)],
        "collect_topk": [torch.zeros(1 + 2 * csr.nnz)],
        "collect_received": [torch.zeros(1), torch.zeros(1, dtype=torch.int64)],
    }
    tensors["low_rank_given"] = [*tensors["low_rank"], torch.empty(0)]  # the product with x follows below
    described = tuple(term(kind, **({"scale": scale} if "low_rank" in kind else {})) for kind in terms)
    weight_dtype = weight_dtype or dtype
    case = Case(
        layout=Layout(shape, weight_dtype, form, described),
        base=list(form.quantize((randn(N, K) * K**-0.5).to(weight_dtype))),
        delta=[tensor for kind in terms for tensor in tensors[kind]],
        names=[name for item in described for name in item.tensor_names],
        x=randn(m, K).to(dtype),
        dy=randn(m, N).to(dtype),
        bias=randn(N).to(adapter_dtype),
    )
    if "product" in case.names:
        case.delta[case.names.index("product")] = case.x @ case.delta[case.names.index("A")].to(dtype).t()
    return case


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return build_case


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN (floats) or the largest value (integers), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled graph of another test counts, and none is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_caches(fresh_compiler: None) -> Iterator[None]:
    """Every graph is compiled anew, whatever caches hold."""
    # Imported here: most tests do without Inductor.
    import torch._inductor.config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
