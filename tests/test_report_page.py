"""`rosa-fx report`: the page says what the run was, refers to nothing outside itself, and bears with incomplete runs."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_models import config, make_data, make_model
from typer.testing import CliRunner

import rosa_fx
from rosa_fx import RosaError, train
from rosa_fx.cli import app
from rosa_fx.mask import Mask
from rosa_fx.report_page import write_report
from rosa_fx.report_page.gather import gather
from rosa_fx.report_page.layers import layers_of
from rosa_fx.report_page.png import mask_uri
from rosa_fx.report_page.svg import Line, compact, line_chart, nice_ticks, thinned

VOID = {"meta", "input", "img", "br", "rect", "path", "circle"}


class Page(HTMLParser):
    """What stands on a page: texts, tags with attributes, and the JSON for its script; checks that tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str, style: str) -> int:
        return sum(name == tag and style in (a.get("class") or "").split() for name, a in self.tags)

    def assert_alone(self) -> None:
        """Nothing is loaded or linked from elsewhere."""
        for tag, attributes in self.tags:
            assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
            for name in ("src", "href", "srcset", "action", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#w", "data:image/png;base64,")), (tag, name, value)
            assert not [name for name in attributes if name.startswith("on")]
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", self.source)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Any]:
    out = tmp_path_factory.mktemp("runs") / "a <run> & more"
    model = make_model()
    result = train(model, make_data(), config(max_steps=12, eval_every=4), eval_batches=make_data(2, seed=1), out=out)
    return out, model, result


def test_the_page_shows_what_the_run_had(run: tuple[Path, nn.Module, Any]) -> None:
    out, model, result = run
    path = write_report(out)
    assert path == out / "report.html"
    page = Page(path)
    page.assert_alone()
    assert "a <run> & more" in page.texts
    assert f"{result.evals[12]:.4f}" in page.text
    assert f"{result.evals[0]:.4f} at step 0" in page.text
    assert "low-rank + sparse" in page.text
    assert "collecting for the masks" in page.text
    assert "2 rewritten weights, from the checkpoint after step 12." in page.text
    assert "warmup_steps" in page.text
    assert torch.__version__ in page.text
    assert [a["data-v"] for tag, a in page.tags if tag == "td" and a.get("class") == "name"] == ["down.weight", "up.weight"]
    assert page.count("svg", "chart") == 5
    assert page.count("rect", "band") == 5 * 3
    assert page.count("circle", "held") == 4
    rows = json.loads(page.scripts[0])
    assert [row[0] for row in rows["rows"]] == list(range(1, 13))
    losses = [row[rows["names"].index("loss")] for row in rows["rows"]]
    assert losses == pytest.approx(result.losses, rel=1e-4)
    # The figures of a weight are those of its ΔW.
    delta = rosa_fx.delta(model, "up.weight").double()
    terms = rosa_fx.adapter(model, "up.weight")
    values = [a["data-v"] for tag, a in page.tags if tag == "td" and "data-v" in a]
    name = values.index("up.weight")
    assert float(values[name + 5] or 0) == pytest.approx(float(delta.norm()), rel=1e-5)
    low = (terms.low_rank.B.double() @ terms.low_rank.A.double()).detach() * terms.scale
    sparse = terms.sparse.values.detach().double().norm() ** 2
    share = float(sparse / (sparse + low.norm() ** 2))
    assert float(values[name + 6] or 0) == pytest.approx(share, rel=1e-5)
    assert float(values[name + 7] or 0) == pytest.approx(float(torch.linalg.svdvals(low)[0]), rel=1e-5)


def test_the_picture_of_a_mask_is_its_mask() -> None:
    dense = torch.zeros(96, 80, dtype=torch.bool)
    dense[:6, :] = True  # four cells' height
    mask = Mask.from_dense(dense)
    state = {"w.sparse.values": torch.ones(mask.nnz), "w.sparse.row_offsets": mask.row_offsets, "w.sparse.cols": mask.cols}
    layer = layers_of(state, {"w": (96, 80)}, {})[0]
    assert layer.mask is not None
    assert layer.mask.cells.shape == (64, 64)
    assert int(layer.mask.cells.sum()) == mask.nnz
    assert layer.mask.rows == [16.0] * 4 + [0.0] * 60
    assert layer.mask.columns == [1.0] * 64
    assert (layer.mask.top_rows, layer.mask.used_rows) == (1.0, 6 / 96)
    assert layer.mask.top_columns == 8 / 80
    data = base64.b64decode(mask_uri(layer.mask.cells).partition(",")[2])
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + size]
        assert zlib.crc32(data[at + 4 : at + 8 + size]) == struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]
        at += 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (64, 64)
    lines = zlib.decompress(chunks[b"IDAT"])
    painted = [any(lines[i * 33 + 1 : (i + 1) * 33]) for i in range(64)]
    assert painted == [True] * 4 + [False] * 60


def test_norms_and_singular_values_are_those_of_the_dense_delta() -> None:
    """Of a matrix and of a stack of three, each of which has factors of its own."""
    generator = torch.Generator().manual_seed(1)
    for stack in ((), (3,)):
        A, B = torch.randn(*stack, 4, 10, generator=generator), torch.randn(*stack, 12, 4, generator=generator)
        rows = 12 * math.prod(stack)
        mask = Mask.from_dense(torch.rand(rows, 10, generator=generator) > 0.7)
        values = torch.randn(mask.nnz, generator=generator)
        state = {"e.low_rank.A": A, "e.low_rank.B": B, "e.sparse.values": values}
        state |= {"e.sparse.row_offsets": mask.row_offsets, "e.sparse.cols": mask.cols}
        layer = layers_of(state, {"e": (rows, 10)}, {"e": 0.5})[0]
        low = 0.5 * (B.double() @ A.double())
        dense = low.reshape(rows, 10).clone()
        dense[mask.to_dense()] += values.double()
        assert layer.shape == (*stack, 12, 10)
        assert layer.delta_norm == pytest.approx(float(dense.norm()), rel=1e-12)
        assert layer.low_rank_norm == pytest.approx(float(low.norm()), rel=1e-12)
        expected = torch.linalg.svdvals(low).reshape(-1, 10)[:, :4].square().mean(0).sqrt()
        assert layer.singular_values == pytest.approx(expected.tolist(), rel=1e-10)
        assert 1 < layer.effective_rank <= 4


def test_two_hundred_weights_make_a_small_page(tmp_path: Path) -> None:
    """As many, and of such shapes, as a model of thirty blocks has."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for block in range(30):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{block}.{kind}.weight"
            score = torch.rand(128, 128, generator=generator)
            mask = Mask.from_dense(score > 0.9)
            tensors |= {f"{name}.low_rank.A": torch.randn(16, 128, generator=generator)}
            tensors |= {f"{name}.low_rank.B": torch.randn(128, 16, generator=generator)}
            tensors |= {f"{name}.sparse.values": torch.ones(mask.nnz), f"{name}.sparse.row_offsets": mask.row_offsets}
            tensors |= {f"{name}.sparse.cols": mask.cols}
    from rosa_fx.training import checkpoint as checkpoints

    spec = json.loads(rosa_fx.RosaSpec().to_json())
    checkpoints.save(tmp_path / "checkpoints", checkpoints.Checkpoint(3, {"adapter": tensors}, {"spec": spec}), keep=1)
    path = write_report(tmp_path)
    assert path.stat().st_size < 4 * 2**20
    page = Page(path)
    page.assert_alone()
    assert page.count("tr", "weight") == page.count("tr", "detail") == 210
    assert sum(tag == "a" and "data-p" in a for tag, a in page.tags) == 210
    assert "No step has been made yet." in page.text


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"schedule": "wl30"}, "No masks yet: the schedule wl30 has not come to them"),
        ({"schedule": "lora_only"}, "No masks yet: the schedule lora_only makes none"),
        ({"density": 0.0}, "There is no sparse term (density 0)."),
        ({"rank": 0, "schedule": "spa_only"}, "There is no low-rank term (rank 0)."),
        ({"targets": ("up.weight",)}, "1 rewritten weight, from"),
        ({"density": 0.001}, "No entries: the density gives this weight less than one."),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, spec: dict[str, Any], said: str) -> None:
    train(make_model(**spec), make_data(), config(max_steps=6), out=tmp_path)
    page = Page(write_report(tmp_path))
    page.assert_alone()
    assert said in page.text
    assert "nan" not in page.text.lower().split()


def test_a_run_with_gaps_and_figures_that_are_not_finite(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss_fn(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return called(**batch)["loss"] * (math.nan if len(calls) in (3, 4) else 1.0)

    train(make_model(), make_data(), config(max_steps=9, on_nonfinite="skip"), out=tmp_path, loss_fn=loss_fn)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(
            '{"event": "step", "step": 10, "phase": "other", "loss": NaN}\n{"event": "eval", "step": 10}\n{"event": "st'
        )
    (tmp_path / "run.json").write_text("{ damaged")
    newest = tmp_path / "checkpoints" / "step-9" / "adapter.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    page = Page(write_report(tmp_path))
    page.assert_alone()
    assert "2 skipped, not finite: step 3, 4" in page.text
    assert "run.json cannot be read" in page.text
    assert "adapter.safetensors is damaged" in page.text
    assert "No adapter has been saved yet" in page.text
    assert json.loads(page.scripts[0], parse_constant=pytest.fail)["rows"][-1][2] is None


def test_an_adapter_with_nan_still_has_a_page() -> None:
    state = {"w.low_rank.A": torch.full((2, 8), math.nan), "w.low_rank.B": torch.ones(8, 2)}
    layer = layers_of(state, {}, {})[0]
    assert all(map(math.isnan, [layer.low_rank_norm, layer.delta_norm, layer.sparse_share, layer.effective_rank]))


def test_where_the_adapter_is_looked_for(run: tuple[Path, nn.Module, Any], tmp_path: Path) -> None:
    out, model, _ = run
    rosa_fx.save_adapter(model, tmp_path / "adapter")
    saved, kept = gather(tmp_path), gather(out)
    assert saved.source == "the saved adapter"
    assert [layer.delta_norm for layer in saved.layers] == [layer.delta_norm for layer in kept.layers]
    assert saved.layers[0].low_rank_norm > 0


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(RosaError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RosaError, match="holds no run"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_command(run: tuple[Path, nn.Module, Any], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run[0]), "--page", str(tmp_path / "x" / "p.html"), "--title", "Mine"])
    assert done.exit_code == 0, done.output
    assert "p.html" in done.output
    assert "Mine" in Page(tmp_path / "x" / "p.html").texts
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "x")])
    assert failed.exit_code == 1
    assert "holds no run" in " ".join(failed.output.split())


# Drawing


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.2, 0.3), (-5.0, 1e6), (3.0, 3.0), (0.0, 0.0), (1e-9, 2e-9), (999.0, 1001.0)]
)
def test_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low
    assert ticks[-1] >= high - 1e-9 * abs(high)


def test_numbers_are_short() -> None:
    values = [0, 0.00012, 0.5, 12.3456, 9999, 12345, 7.1e7, 3.2e9, math.nan, -0.04]
    assert [compact(v) for v in values] == ["0", "0.00012", "0.5", "12.35", "9999", "12.3k", "71M", "3.2G", "–", "-0.04"]


def test_charts_bear_with_anything() -> None:
    assert line_chart("x", [Line("a", "raw", [(1.0, math.nan), (2.0, math.inf)])], [], width=300, height=100) == ""
    one = line_chart("x", [Line("a", "raw", [(1.0, 2.0)])], [], width=300, height=100)
    assert "<circle" in one
    assert "nan" not in one
    many = [(float(i), math.sin(i / 50) + (100.0 if i == 7777 else 0.0)) for i in range(20_000)]
    kept = thinned(many)
    assert len(kept) <= 900
    assert (7777.0, many[7777][1]) in kept
    assert kept == sorted(kept)
