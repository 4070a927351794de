"""Errors that the user can correct: the command line prints each of their lines and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class StudyError(Exception):
    """An error that a user can correct; the message says what is wrong, where, and what is allowed."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """ " (did you mean X?)", where X is the allowed word nearest to this one; "" if none is near."""
    of_lower = {each.lower(): each for each in allowed}
    near = get_close_matches(str(word)[:64].lower(), of_lower, n=1)
    return f" (did you mean {of_lower[near[0]]}?)" if near else ""
