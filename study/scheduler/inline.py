"""The inline executor: the same units in this process, one after another. For debugging, or one GPU without Ray."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from study.scheduler.queue import Queue
from study.scheduler.unit import OUT_OF_MEMORY, Unit, run_unit


def run_inline(queue: Queue, on_evaluation: Callable[[Unit, int, dict[str, float]], None]) -> None:
    """Run every unit that the queue issues."""
    with _interrupts() as check_interrupt:
        while isinstance(unit := queue.next_unit(), Unit):
            _run(queue, unit, on_evaluation, check_interrupt)


def _run(
    queue: Queue,
    unit: Unit,
    on_evaluation: Callable[[Unit, int, dict[str, float]], None],
    check_interrupt: Callable[[], None],
) -> None:
    def note_evaluation(seed: int, row: dict[str, float]) -> None:
        check_interrupt()
        queue.note_progress(unit, seed, row["step"])
        on_evaluation(unit, seed, row)

    queue.note_begin(unit)
    try:
        queue.complete(run_unit(unit, note_evaluation, queue.say))
    except OSError as error:
        queue.put_back(unit)
        queue.aborted = str(error)
    except OUT_OF_MEMORY as error:
        queue.note_out_of_memory(unit, f"out of memory: {error}".splitlines()[0])


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C acts at once, as ever; where the interpreter drops it (in a destructor), the function given raises it."""
    is_interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if is_interrupted:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
