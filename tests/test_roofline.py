"""The roofline table: predictions from bytes and FLOPs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_fx.kernels.report import roofline

HIDDEN = roofline.Pressures(few=1.0, many=0.9)


def test_floor_by_hand() -> None:
    """7B's q on an A100: one row is bound by 9.4 MB + adapters over 2.04 TB/s, 8192 rows by FLOPs over 312 TFLOP/s."""
    one = roofline.predict(4096, 4096, 1, "A100", HIDDEN)
    weights = 4096 * 4096
    assert one.moved == pytest.approx(weights * 0.5625 + 16 * 8192 * 4 + 0.006 * weights * 8 + 4097 * 4 + 2 * 8192)
    assert one.floor == pytest.approx(one.moved / 2.04e12)
    many = roofline.predict(4096, 4096, 8192, "A100", HIDDEN)
    assert many.flops == pytest.approx(2 * 8192 * (weights * 1.006 + 16 * 8192))
    assert many.floor == pytest.approx(many.flops / 312e12)


@given(
    st.sampled_from([shape for shapes in roofline.SHAPES.values() for shape in shapes.values()]),
    st.integers(1, 20000),
    st.sampled_from(["A100", "H100"]),
    st.floats(0.1, 4),
)
def test_nothing_is_below_the_floor(shape: tuple[int, int], rows: int, device: str, pressure: float) -> None:
    found = roofline.predict(*shape, rows, device, roofline.Pressures(2 * pressure, pressure))
    assert found.fused >= found.floor
    assert found.materialise >= found.floor
    assert found.wins == ("fused" if found.fused <= found.materialise else "materialise")
    assert found.why


def test_who_wins() -> None:
    slow = roofline.Pressures(few=17.6, many=2.0)
    assert roofline.predict(4096, 4096, 1, "H100", HIDDEN).why.startswith("bound by bytes")
    few = roofline.predict(4096, 4096, 1, "H100", slow)
    assert few.wins == "fused"
    assert few.why.startswith("bound by issuing")
    assert few.fused == pytest.approx(17.6 * 2 * 16 * 4096 * 4096 / 989e12)
    assert roofline.predict(4096, 4096, 8192, "H100", slow).wins == "materialise"


@pytest.mark.parametrize(
    ("shape", "rows", "wins"),
    [((28672, 8192), 64, "fused"), ((4096, 4096), 256, "materialise"), ((4096, 4096), 2048, "materialise")],
)
def test_the_sparse_part_decides_for_many_rows(shape: tuple[int, int], rows: int, wins: str) -> None:
    """What decoding hides, gathering does not: it grows with the rows and with the longest row of S."""
    found = roofline.predict(*shape, rows, "H100", HIDDEN)
    n, k = shape
    gather = rows * (0.006 * n * k * 2 / 2 + 4 * (n + k)) / 3.35e12 + 87 * 0.006 * k / 32 * 1e-6
    assert found.fused == pytest.approx(max(found.flops / 989e12 / 0.95, found.moved / 3.35e12) + gather)
    assert found.wins == wins
    assert "costs less than" in found.why


def test_the_table_has_every_shape() -> None:
    slow = roofline.Pressures(few=17.6, many=2.0)
    lines = list(roofline.table({"A100": HIDDEN, "H100": slow}))
    assert len(lines) == (3 + 4) * 2 * 5
    assert all(len(line) == len(roofline.HEAD) for line in lines)
