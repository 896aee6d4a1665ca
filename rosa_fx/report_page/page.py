"""The page itself: put together from its sections, with style and script inside."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from rosa_fx import atomic
from rosa_fx.errors import RosaError
from rosa_fx.report_page.gather import RunData, gather
from rosa_fx.report_page.sections import adapter, settings, tiles
from rosa_fx.report_page.training import charts, hover_data

PAGE = "report.html"


def write_report(folder: Path, page: Path | None = None, title: str | None = None) -> Path:
    """Write one HTML file about the run in `folder`, finished or not, and return its path.

    It refers to nothing outside itself. Curves of loss, rates, gradient norm, speed and memory with the phases; for each
    weight its mask, the singular values of s·B A and how ‖ΔW‖² divides between the terms; settings and versions.

    Args:
        folder: the `out` of `rosa_fx.train`.
        page: the file to write, `folder/report.html` by default; an older one is replaced.
        title: the heading; the folder's name by default.

    Raises:
        RosaError: there is no run in `folder`, or the page cannot be written.
    """
    data = gather(folder)
    page = page or folder / PAGE
    text = render(data, title or folder.resolve().name)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(page, text)
    except OSError as error:
        raise RosaError(f"could not write {page}: {error}; free space or choose another --page") from error
    return page


def render(data: RunData, title: str) -> str:
    """The page as text."""
    here = files("rosa_fx.report_page")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    body = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(data)}</header>",
        f'<ul class="notes">{notes}</ul>' if notes else "",
        tiles(data),
        charts(data),
        adapter(data),
        settings(data),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} – rosa-fx</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f'\n</main>\n<div id="tip" hidden></div>\n<script type="application/json" id="steps">{hover_data(data)}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _subtitle(data: RunData) -> str:
    spec = data.run.get("spec")
    if not isinstance(spec, dict):
        return ""
    words = [
        data.run.get("model"),
        f"base {spec.get('base')}",
        f"rank {spec.get('rank')}",
        f"density {spec.get('density')}",
        f"schedule {spec.get('schedule')}",
    ]
    return f"<p>{escape(' · '.join(str(word) for word in words if word))}</p>"
