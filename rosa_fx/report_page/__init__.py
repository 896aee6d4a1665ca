"""`write_report`: one self-contained HTML page of a run."""

from rosa_fx.report_page.page import write_report

__all__ = ["write_report"]
