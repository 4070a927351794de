"""The results of a study's runs: typed frames, intervals, the frontier, figures, tables and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.errors import AnalysisError
    from analysis.notebook import Study, load_study

__all__ = ["AnalysisError", "Study", "load_study"]


def __getattr__(name: str) -> Any:
    """Import the notebook's names when they are asked for: matplotlib and pandas take a second."""
    if name == "AnalysisError":
        from analysis.errors import AnalysisError

        return AnalysisError
    if name in __all__:
        from analysis import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
