"""The results of a study's runs: typed frames, intervals, the frontier, figures, tables and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.errors import AnalysisError

if TYPE_CHECKING:
    from analysis.report.notebook import Study, load_study

__all__ = ["AnalysisError", "Study", "load_study"]


def __getattr__(name: str) -> Any:
    """Import what a notebook needs when it is asked for: matplotlib and pandas take a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analysis.report import notebook

    return getattr(notebook, name)
