"""``fastmim report``: a run, or several side by side, as one HTML page that needs nothing beside it."""

from fastmim.report.page import write_report

__all__ = ["write_report"]
