"""Everything of the page that is not a curve: the figures at its top, the weights, the settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from rosa_fx.report_page.gather import RunData
from rosa_fx.report_page.layers import Layer
from rosa_fx.report_page.png import mask_uri
from rosa_fx.report_page.svg import bars, compact
from rosa_fx.report_page.training import number

MAP, HISTOGRAM = 256, 48  # pixels of a mask's picture and of the histograms along it


def tiles(data: RunData) -> str:
    """The run in a few figures."""
    steps, found = data.steps, []
    evals = [(row["step"], number(row.get("loss"))) for row in data.evals]
    known = [(step, loss) for step, loss in evals if math.isfinite(loss)]
    if known:
        best = min((loss, step) for step, loss in known)
        note = f"{known[0][1]:.4f} at step {known[0][0]}; best {best[0]:.4f} at step {best[1]}"
        found.append(("Held-out loss", f"{known[-1][1]:.4f}", note))
    losses = [loss for row in steps if math.isfinite(loss := number(row.get("loss")))]
    if losses:
        last = losses[-max(1, min(20, len(losses) // 4)) :]
        note = f"mean of the last {len(last)}; first step {losses[0]:.4f}"
        found.append(("Training loss", f"{statistics.fmean(last):.4f}", note))
    if steps:
        planned = data.run.get("planned")
        done = steps[-1]["step"]
        tokens = sum(row.get("tokens") or 0 for row in steps)
        found.append(("Steps", f"{done:,}", f"of {planned:,}" if isinstance(planned, int) and planned >= done else ""))
        if tokens:
            found.append(("Tokens", f"{tokens:,}" if tokens < 1e6 else compact(tokens), "in these steps"))
        seconds = [s for row in steps if math.isfinite(s := number(row.get("seconds")))]
        found.append(("Time in steps", duration(sum(seconds)), f"longest step {duration(max(seconds))}" if seconds else ""))
        speeds = [s for row in steps if number(row.get("tokens_per_s")) > 0 and (s := number(row.get("tokens_per_s")))]
        if speeds:
            found.append(("Speed", f"{statistics.median(speeds):,.0f}", "tokens per second, median"))
        for key, what in (("device_memory", "on the GPU"), ("rss", "resident")):
            sizes = [s for row in steps if math.isfinite(s := number(row.get(key)))]
            if sizes:
                found.append(("Peak memory", f"{max(sizes) / 2**30:.2f} GiB", f"{what}, seen at steps' ends"))
    parameters = data.run.get("parameters")
    if isinstance(parameters, dict):
        parts = [f"{compact(count)} {name.replace('_', '-')}" for name, count in parameters.items()]
        found.append(("Trained parameters", compact(sum(parameters.values())), ", ".join(parts)))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='note'>{escape(note)}</dd></div>"
        for name, value, note in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def adapter(data: RunData) -> str:
    """The weights: by kind, as a map of blocks, and one row each with its pictures."""
    layers = data.layers
    head = "<section><h2>Adapter</h2>"
    if not layers:
        text = "No adapter has been saved yet: one comes with each checkpoint, and at the end of the run."
        return f'{head}<p class="empty">{text}</p></section>'
    pending = [layer for layer in layers if layer.sparse and layer.nnz and layer.mask is None]
    notes = [f"{len(layers)} rewritten weight{'s' if len(layers) > 1 else ''}, from {data.source}."]
    if pending:
        schedule = _schedule(data)
        why = "makes none" if schedule == "lora_only" else "has not come to them"
        notes.append(f"No masks yet: the schedule {schedule} {why}, so the sparse part is still zero.")
    if not any(layer.sparse for layer in layers):
        notes.append("There is no sparse term (density 0).")
    if not any(layer.rank for layer in layers):
        notes.append("There is no low-rank term (rank 0).")
    key = '<span><i class="key low"></i>low-rank ‖s·BA‖²</span><span><i class="key sparse"></i>sparse ‖S‖²</span>'
    rows = "".join(_row(index, layer) for index, layer in enumerate(layers))
    titles = "".join(
        f'<th data-sort="{kind}"{" aria-sort=none" if kind else ""} class="{_align(title, kind)}" title="{hint}">{title}</th>'
        for title, kind, hint in _COLUMNS
    )
    filter_ = '<label class="filter">Filter <input id="filter" type="search" placeholder="name, e.g. q_proj"></label>'
    table = f'<div class="scroll"><table id="weights"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    return (
        f"{head}<p>{' '.join(notes)}</p>{_kinds(layers)}{_grid(layers)}"
        f'<h3>Every weight</h3><div class="bar">{filter_ if len(layers) > 1 else ""}<p class="legend">{key}</p>'
        f'<p class="hint">Click a row for its mask and its singular values.</p></div>{table}</section>'
    )


def settings(data: RunData) -> str:
    """run.json as tables."""
    if not data.run:
        return '<section><h2>Settings</h2><p class="empty">The run has no run.json.</p></section>'
    groups = [("Spec", data.run.get("spec")), ("Training", data.run.get("config"))]
    groups += [("Versions", data.run.get("versions")), ("Machine", data.run.get("machine"))]
    parts = data.run.get("parts")
    if isinstance(parts, list):
        began = {f"part {i + 1}": f"{p.get('began')}, after step {p.get('after_step')}" for i, p in enumerate(parts[-12:])}
        groups.append(("Begun", began))
    tables = []
    for name, values in groups:
        if isinstance(values, dict) and values:
            rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in values.items())
            tables.append(f"<div><h3>{name}</h3><table class='plain'>{rows}</table></div>")
    summary = "<summary><h2>Settings and versions</h2></summary>"
    return f'<section><details>{summary}<div class="tables">{"".join(tables)}</div></details></section>'


def duration(seconds: float) -> str:
    """Seconds as 7.3 s, 12:05 min or 3:20 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


# Title, how to sort (s: text, n: number, "": not), what it means.
_COLUMNS = (
    ("mask", "", "where the trained entries lie"),
    ("weight", "s", "name in the model"),
    ("kind", "s", "last part of the name"),
    ("shape", "n", "N × K; sorted by size"),
    ("rank", "n", "of A and B"),
    ("entries", "n", "trained by the sparse part"),
    ("‖ΔW‖", "n", "Frobenius norm of s·BA + S"),
    ("‖ΔW‖² by term", "n", "sorted by the sparse part’s share"),
    ("σ₁", "n", "largest singular value of s·BA"),
    ("eff. rank", "n", "exp of the entropy of the singular values"),
    ("top rows", "n", "share of the mask in its fullest tenth of the rows; about 10 % if rows are alike"),
)


def _row(index: int, layer: Layer) -> str:
    size = math.prod(layer.shape) if layer.shape else 0
    shape = " × ".join(map(str, layer.shape)) if layer.shape else "–"
    first = layer.singular_values[0] if layer.singular_values else math.nan
    top = layer.mask.top_rows if layer.mask else math.nan
    picture = f'<img alt="" width="36" height="36" src="{mask_uri(layer.mask.cells)}">' if layer.mask else ""
    cells = [
        ("", picture, "thumb"),
        (layer.name, f"<button>{escape(layer.name)}</button>", "name"),
        (layer.kind, escape(layer.kind), ""),
        (size, shape, "num"),
        (layer.rank, str(layer.rank or "–"), "num"),
        (layer.nnz, f"{layer.nnz:,}" if layer.sparse else "–", "num"),
        (_sortable(layer.delta_norm), compact(layer.delta_norm), "num"),
        (_sortable(layer.sparse_share), share_bar(layer.sparse_share), ""),
        (_sortable(first), compact(first), "num"),
        (_sortable(layer.effective_rank), fixed(layer.effective_rank), "num"),
        (_sortable(top), percent(top), "num"),
    ]
    row = "".join(f'<td class="{style}" data-v="{escape(str(value))}">{shown}</td>' for value, shown, style in cells)
    detail = f'<tr class="detail" hidden><td colspan="{len(cells)}">{_detail(layer)}</td></tr>'
    return f'<tr class="weight" id="w{index}">{row}</tr>{detail}'


def _detail(layer: Layer) -> str:
    return f'<div class="details">{_mask_figure(layer)}{_spectrum(layer)}{_facts(layer)}</div>'


def _mask_figure(layer: Layer) -> str:
    caption = "<figcaption>Mask: columns (inputs) across, rows (outputs) down</figcaption>"
    if not layer.sparse:
        return f'<figure>{caption}<p class="empty">No sparse term (density 0).</p></figure>'
    mask = layer.mask
    if mask is None:
        why = "No mask yet." if layer.nnz else "No entries: the density gives this weight less than one."
        return f'<figure>{caption}<p class="empty">{why}</p></figure>'
    height, width = mask.cells.shape
    columns = bars(mask.columns, "sparse", width=MAP, height=HISTOGRAM, line=1.0)
    rows = bars(mask.rows, "sparse", width=HISTOGRAM, height=MAP, across=True, line=1.0)
    alt = f"mask of {escape(layer.name)} in {height} by {width} cells"
    note = f"{height} × {width} cells, up to {int(mask.cells.max())} entries in one. Line: the mean density"
    return (
        f'<figure>{caption}<div class="map"><div>{columns}</div><i></i><img class="large" alt="{alt}"><div>{rows}</div></div>'
        f'<p class="hint">{note}.</p></figure>'
    )


def _spectrum(layer: Layer) -> str:
    mean = f", mean over {layer.shape[0]}" if layer.shape and len(layer.shape) == 3 else ""
    caption = f"<figcaption>Singular values of s·BA{mean}</figcaption>"
    if not layer.rank:
        return f'<figure>{caption}<p class="empty">No low-rank term (rank 0).</p></figure>'
    if not any(math.isfinite(value) and value > 0 for value in layer.singular_values):
        return f'<figure>{caption}<p class="empty">All zero: B has not been trained yet.</p></figure>'
    drawn = bars(layer.singular_values, "low", width=MAP, height=150)
    first, last = compact(layer.singular_values[0]), compact(layer.singular_values[-1])
    ends = f"<span>σ₁ = {first}</span><span>σ{_low(layer.rank)} = {last}</span>"
    return f'<figure>{caption}<div class="spectrum">{drawn}<p class="ends">{ends}</p></div></figure>'


def _facts(layer: Layer) -> str:
    facts = [
        ("‖ΔW‖", compact(layer.delta_norm)),
        ("‖s·BA‖", compact(layer.low_rank_norm) if layer.rank else "no such term"),
        ("‖S‖", compact(layer.sparse_norm) if layer.sparse else "no such term"),
    ]
    if layer.mask:
        facts += [
            ("fullest tenth of the rows", percent(layer.mask.top_rows) + " of the mask"),
            ("fullest tenth of the columns", percent(layer.mask.top_columns) + " of the mask"),
            ("rows with an entry", percent(layer.mask.used_rows)),
            ("columns with an entry", percent(layer.mask.used_columns)),
        ]
    if layer.rank:
        facts.append(("effective rank", f"{fixed(layer.effective_rank)} of {layer.rank}"))
    rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in facts)
    return f'<figure><figcaption>Figures</figcaption><table class="plain">{rows}</table></figure>'


def _kinds(layers: Sequence[Layer]) -> str:
    """One row for each kind of weight, if several weights share one."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    if len(groups) == len(layers):
        return ""
    titles = ("kind", "weights", "entries", "‖ΔW‖, mean", "‖ΔW‖² by term", "eff. rank, mean", "top rows, mean")
    rows = []
    for kind, group in groups.items():
        low, sparse = (sum(getattr(x, f"{term}_norm") ** 2 for x in group) for term in ("low_rank", "sparse"))
        share = sparse / (low + sparse) if low + sparse > 0 else math.nan
        tops = _mean([x.mask.top_rows if x.mask else math.nan for x in group])
        values = (
            f"<th>{escape(kind)}</th>",
            f"<td class='num'>{len(group)}</td>",
            f"<td class='num'>{sum(x.nnz for x in group):,}</td>",
            f"<td class='num'>{compact(_mean([x.delta_norm for x in group]))}</td>",
            f"<td>{share_bar(share)}</td>",
            f"<td class='num'>{fixed(_mean([x.effective_rank for x in group]))}</td>",
            f"<td class='num'>{percent(tops)}</td>",
        )
        rows.append(f"<tr>{''.join(values)}</tr>")
    head = "".join(f'<th class="{_align(title, "s" if title == "kind" else "n")}">{title}</th>' for title in titles)
    table = f'<table class="kinds"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h3>By kind</h3><div class="scroll">{table}</div>'


_METRICS = ("‖ΔW‖", "sparse share of ‖ΔW‖²", "effective rank", "top rows of the mask")


def _grid(layers: Sequence[Layer]) -> str:
    """Kinds down, blocks across; each cell leads to its weight."""
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    if len(blocks) < 2:
        return ""
    values = [(x.delta_norm, x.sparse_share, x.effective_rank, x.mask.top_rows if x.mask else math.nan) for x in layers]
    tops = [max([v for v in column if math.isfinite(v)], default=0.0) for column in zip(*values)]
    places: dict[str, dict[int, tuple[int, Layer]]] = {}
    for index, layer in enumerate(layers):
        if layer.block is not None:
            places.setdefault(layer.kind, {}).setdefault(layer.block, (index, layer))
    rows = []
    for kind, row in places.items():
        cells = []
        for block in blocks:
            if block not in row:
                cells.append("<td></td>")
                continue
            index, layer = row[block]
            shares = [f"{v / top:.3f}" if top > 0 and math.isfinite(v) else "0" for v, top in zip(values[index], tops)]
            texts = (compact(values[index][0]), percent(values[index][1]), fixed(values[index][2]), percent(values[index][3]))
            cells.append(
                f'<td><a href="#w{index}" style="--p:{shares[0]}" data-p="{"|".join(shares)}" data-t="{"|".join(texts)}" '
                f'aria-label="{escape(layer.name)}"></a></td>'
            )
        rows.append(f"<tr><th>{escape(kind)}</th>{''.join(cells)}</tr>")
    numbers = "".join(f"<th>{block if i % 5 == 0 else ''}</th>" for i, block in enumerate(blocks))
    options = "".join(f"<option>{metric}</option>" for metric in _METRICS)
    return (
        f'<h3>By block</h3><div class="bar"><label class="filter">Show <select id="metric">{options}</select></label>'
        '<p class="hint" id="gridnote">Stronger colour: larger, the strongest is the largest of all.</p></div>'
        f'<div class="scroll"><table class="grid"><thead><tr><th>block</th>{numbers}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def share_bar(share: float) -> str:
    """The two terms' parts of ‖ΔW‖² as a bar, with the sparse one in figures."""
    if not math.isfinite(share):
        return '<span class="dim">zero</span>'
    return f'<span class="share"><span class="split" style="--s:{share:.4f}"></span><span>{percent(share)} sparse</span></span>'


def percent(value: float) -> str:
    return f"{100 * value:.{1 if value >= 0.01 else 2}f} %" if math.isfinite(value) else "–"


def fixed(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"


def _align(title: str, kind: str) -> str:
    return "num" if kind == "n" and title != "‖ΔW‖² by term" else ""


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _low(number_: int) -> str:
    return str(number_).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _schedule(data: RunData) -> str:
    spec = data.run.get("spec")
    return escape(str(spec.get("schedule"))) if isinstance(spec, dict) else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None or value == {} else str(value)
