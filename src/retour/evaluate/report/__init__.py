"""One self-contained HTML page of a bench: tables, plots, and every edit side by side."""

from .page import Report, report

__all__ = ["Report", "report"]
