"""The inline executor: the same units in this process, one after another. For debugging, or one GPU without Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from study.scheduler.queue import Queue
from study.scheduler.unit import OUT_OF_MEMORY, Unit, run_unit


def run_inline(queue: Queue, on_evaluation: Callable[[Unit, int, dict[str, float]], None]) -> None:
    """Run every unit that the queue issues."""
    while isinstance(unit := queue.next_unit(), Unit):
        issued = unit
        queue.note_begin(issued)
        try:
            queue.complete(run_unit(issued, partial(_note_evaluation, queue, on_evaluation, issued), queue.say))
        except OSError as error:
            queue.put_back(issued)
            queue.aborted = str(error)
        except OUT_OF_MEMORY as error:
            queue.note_out_of_memory(issued, f"out of memory: {error}".splitlines()[0])


def _note_evaluation(
    queue: Queue,
    on_evaluation: Callable[[Unit, int, dict[str, float]], None],
    unit: Unit,
    seed: int,
    row: dict[str, float],
) -> None:
    queue.note_progress(unit, seed, row["step"])
    on_evaluation(unit, seed, row)
