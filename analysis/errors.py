"""The one exception that is meant for the user."""

from __future__ import annotations


class AnalysisError(Exception):
    """What is wrong, where, and what would be right, in one line; the command line prints it and exits with 2."""
