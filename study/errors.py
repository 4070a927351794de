"""The errors that are the user's to mend: the command line prints them as one line and exits with 2."""

from __future__ import annotations


class StudyError(Exception):
    """Something a user can put right; the message says what, where, and what is allowed."""
