"""The inline executor: the same units in this process, one after another. For debugging, or one GPU without Ray."""

from __future__ import annotations

from collections.abc import Callable

from study.scheduler.interrupts import interrupts
from study.scheduler.queue import Queue
from study.training.unit import OUT_OF_MEMORY, Unit, run_unit


def run_inline(queue: Queue, on_evaluation: Callable[[Unit, int, dict[str, float]], None]) -> None:
    """Run every unit that the queue issues.

    Raises:
        KeyboardInterrupt: at once; at the next evaluation if the interpreter dropped it (in a destructor).
    """
    is_interrupted = False

    def interrupt() -> None:
        nonlocal is_interrupted
        is_interrupted = True
        raise KeyboardInterrupt

    def note_evaluation(unit: Unit, seed: int, row: dict[str, float]) -> None:
        if is_interrupted:
            raise KeyboardInterrupt
        queue.note_progress(unit, seed, row["step"])
        on_evaluation(unit, seed, row)

    with interrupts(interrupt):
        while isinstance(unit := queue.next_unit(), Unit):
            _run(queue, unit, note_evaluation)


def _run(queue: Queue, unit: Unit, note_evaluation: Callable[[Unit, int, dict[str, float]], None]) -> None:
    queue.note_begin(unit)
    try:
        queue.complete(run_unit(unit, lambda seed, row: note_evaluation(unit, seed, row), queue.say))
    except OSError as error:
        queue.put_back(unit)
        queue.aborted = str(error)
    except OUT_OF_MEMORY as error:
        queue.note_out_of_memory(unit, f"out of memory: {error}".splitlines()[0])
