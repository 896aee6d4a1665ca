"""`rosa-fx report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rosa_fx.report_page import write_report


def run_report(*, run: Path, page: Path | None, title: str | None) -> None:
    """Options as in `rosa_fx.cli.app.report`. The path of the page goes to standard output."""
    written = write_report(run, page, title)
    Console().print(f"{written} ({written.stat().st_size / 2**20:.2f} MiB)", markup=False, highlight=False, soft_wrap=True)
