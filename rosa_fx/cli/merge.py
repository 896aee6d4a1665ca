"""`rosa-fx merge`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import rosa_fx
from rosa_fx.cli import common
from rosa_fx.errors import RosaError
from rosa_fx.models import load_model


def run_merge(*, model: str, adapter: Path, out: Path, into: str, overwrite: bool, dtype: str, download: bool) -> None:
    """Options as in `rosa_fx.cli.app.merge`. The merged model appears at `out` whole or not at all."""
    if not adapter.is_dir():
        raise RosaError(f"--adapter {str(adapter)!r}: no such folder; a run keeps it in OUT/adapter")
    if out.exists() and not out.is_dir():
        raise RosaError(f"--out {str(out)!r} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise RosaError(f"--out {str(out)!r} is not empty: add --overwrite to replace it, or name another folder")
    if out.resolve() in (Path(model).resolve(), adapter.resolve()):
        raise RosaError(f"--out {str(out)!r} is what is being read: name another folder")
    loaded, tokenizer = load_model(model, common.pick_dtype(dtype), download=download)
    network: Any = rosa_fx.load_adapter(loaded, adapter)
    rows = []
    if into == "same":
        report = rosa_fx.merge(network, into="same")
        worst = max(report.weights, key=lambda weight: weight.error)
        common.console.print(str(report), highlight=False)
        rows = [("largest error", f"{worst.error:.2%} of the weight, {worst.lost:.0%} of its update: {worst.name}")]
    else:
        rosa_fx.merge(network)
    beside = out.with_name(f".{out.name}.new-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        network.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(out, ignore_errors=True)
        beside.rename(out)
    except OSError as error:
        raise RosaError(f"could not write {out}: {error}; free space or choose another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    common.summary(
        [
            ("merged model", str(out)),
            ("size", f"{sum(f.stat().st_size for f in out.iterdir()) / 2**20:,.0f} MiB"),
            *rows,
            ("use it", f'AutoModelForCausalLM.from_pretrained("{out}")'),
        ],
        "rosa-fx merge",
    )
