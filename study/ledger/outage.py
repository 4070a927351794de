"""Writing to a ledger that may be unreachable for a while: a database server restarts, or a network is down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from study.errors import StudyError
from study.ledger.database import LEDGER_ERRORS, is_away, reason
from study.ledger.ledger import Ledger
from study.ledger.lock import Hold

PATIENCE_SECONDS = 900.0
"""Longest time that the study waits for an unreachable ledger; workers' reports wait too."""

_PAUSE_SECONDS = 1.0

T = TypeVar("T")


class LedgerGone(StudyError):
    """The ledger stayed unreachable, or belongs to another driver now."""


class Patience:
    """Acts on a ledger while its hold is held, and waits while it is unreachable, which a ledger in a file never is.

    Args:
        say: receives one line when the ledger becomes unreachable, and when it is reachable again.
    """

    def __init__(self, ledger: Ledger, hold: Hold, say: Callable[[str], None]) -> None:
        self._ledger, self._hold, self._say = ledger, hold, say
        self._given_up: LedgerGone | None = None
        self.is_over = False
        """True: stop waiting; may be set by a signal during the wait."""

    def act(self, act: Callable[[], T]) -> T:
        """Result of an act on the ledger. The act may be done twice, since only its answer may have been lost.

        Raises:
            LedgerGone: the ledger cannot be written; the message gives the reason.
        """
        if self._given_up is not None:
            raise self._given_up
        why = None if self._hold.is_held() else "the connection was lost"
        deadline = None
        while True:
            if why is None:
                try:
                    done = act()
                except LEDGER_ERRORS as error:
                    why = reason(error)
                    if not (self._hold.may_be_lost and is_away(error)):
                        raise LedgerGone(f"the ledger cannot be written: {why}") from None
                else:
                    if deadline is not None:
                        self._say("the ledger is reachable again")
                    return done
            if deadline is None:
                deadline = time.monotonic() + PATIENCE_SECONDS
                self._say(f"the ledger is unreachable, waiting at most {PATIENCE_SECONDS / 60:g} minutes: {why}")
            if self.is_over or time.monotonic() > deadline:
                self._give_up(f"the ledger is unreachable: {why}")
            time.sleep(_PAUSE_SECONDS)
            why = self._regain()

    def _regain(self) -> str | None:
        """Take the hold again and catch up with the ledger; returns why that is not possible yet, or None."""
        try:
            if not self._hold.is_held():
                self._hold.take()
            self._ledger.catch_up()
        except LEDGER_ERRORS as error:
            return reason(error)
        except StudyError as refusal:
            self._give_up(f"the ledger was unreachable for a while, and now: {refusal}")
        return None

    def _give_up(self, why: str) -> NoReturn:
        self._given_up = LedgerGone(why)
        raise self._given_up
