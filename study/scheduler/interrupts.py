"""Interrupts by a user, or by a system that ends its jobs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts(act: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM call a function; a second one has its usual effect.

    Does nothing outside the main thread, the only one that receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def interrupt(*_: Any) -> None:
        try:
            act()
        finally:
            restore()

    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()
