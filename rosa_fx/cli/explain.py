"""`rosa-fx explain`."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rosa_fx
from rosa_fx.cli import common
from rosa_fx.data import encode_rows, make_batches, pad_length, read_jsonl
from rosa_fx.models import load_model
from rosa_fx.report_picture import check_ending

_STYLES = {"fused": "green", "dense": "yellow", "unused": "dim"}


def run_explain(
    *,
    model: str,
    data: Path | None,
    base: str,
    rank: int,
    density: float,
    target: list[str] | None,
    exclude: list[str] | None,
    batch: int,
    max_length: int,
    json: bool,
    picture: Path | None,
    dtype: str,
    device: str,
    download: bool,
) -> None:
    """Options as in `rosa_fx.cli.app.explain`. The table, or JSON, goes to standard output."""
    if picture is not None:
        check_ending(picture)  # before a model is loaded for it
    spec = rosa_fx.RosaSpec(
        base=base,
        rank=rank,
        density=density,
        targets=target or "all-linear",
        exclude=exclude or (),
    )
    rows = read_jsonl(data)[:batch] if data else []
    chosen_device = common.pick_device(device)
    network, tokenizer = load_model(model, common.pick_dtype(dtype), download=download)
    if rows:
        encoded = encode_rows(rows, tokenizer, max_length)
        common.check_vocabulary(network, encoded)
        example = make_batches(encoded.rows, batch, pad_length(encoded.rows, max_length), common.pad_token(tokenizer))[0]
    else:
        ids = torch.zeros(batch, max_length, dtype=torch.int64)  # token 0 is in every vocabulary
        example = {"input_ids": ids, "labels": ids.clone()}
    network = rosa_fx.transform(network.to(chosen_device), spec)
    network.train()
    arguments = {name: tensor.to(chosen_device) for name, tensor in example.items()}
    report = rosa_fx.explain(network, **arguments, use_cache=False)
    if picture is not None:
        report.picture(picture)
    if json:
        print(json_module.dumps(report.to_dict(), indent=1))
        return
    out = Console()
    if not out.is_terminal:
        print(report)
        return
    table = Table(box=None)
    for name in ("weight", "shape", "base", "rank", "nnz", "status", "reason"):
        table.add_column(name, overflow="fold")
    for row in report.targets:
        style = _STYLES.get(row.status, "")
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            row.base,
            str(row.rank),
            f"{row.nnz:,}",
            f"[{style}]{row.status}[/]" if style else row.status,
            escape(row.reason),
        )
    out.print(table)
    out.print("\n".join(report.summary()), highlight=False, markup=False)
