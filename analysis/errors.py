"""The one exception that is meant for the user."""

from __future__ import annotations


class AnalysisError(Exception):
    """One line that says what is wrong, where, and what would be right. The command line prints it and exits with 2."""
