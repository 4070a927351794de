"""What a long command shows while it works."""

from __future__ import annotations

import io

import pytest

from mpo_core.commands import progress as progress_module
from mpo_core.commands.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def work(shown, clock, seconds=(10, 10, 10, 10)):
    shown("statistics", 0, len(seconds))
    for done, each in enumerate(seconds, 1):
        clock(each)
        shown("statistics", done, len(seconds))


def test_a_terminal_has_one_line_that_is_rewritten(clock):
    stream = Terminal()
    shown = Progress(stream)
    shown.say("loading")
    work(shown, clock)
    lines = stream.getvalue().split("\n")
    assert lines[0] == "\rloading\x1b[K"
    assert lines[1].split("\x1b[K")[:-1] == [
        "\rstatistics: 0 of 4",
        "\rstatistics: 1 of 4, about 30 s left",
        "\rstatistics: 2 of 4, about 20 s left",
        "\rstatistics: 3 of 4, about 10 s left",
        "\rstatistics: 4 in 40 s",
    ]
    assert lines[2:] == [""]
    shown.clear()
    assert stream.getvalue().endswith("\n\r\x1b[K")


def test_elsewhere_a_line_comes_now_and_then(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    work(shown, clock, [2] * 20)
    assert stream.getvalue().splitlines() == [
        "statistics: 8 of 20, about 24 s left",
        "statistics: 16 of 20, about 8 s left",
        "statistics: 20 in 40 s",
    ]
    shown.clear()
    assert stream.getvalue().endswith("40 s\n")


def test_a_stage_begins_when_the_last_one_or_a_line_ended(clock):
    shown = Progress(io.StringIO())
    work(shown, clock)
    clock(5)
    shown("sizes", 1, 1)
    clock(7)
    shown.say("read")
    clock(1)
    shown("fits", 1, 2)
    clock(2)
    shown("fits", 2, 2)
    assert shown.seconds == {"statistics": 40, "sizes": 5, "fits": 3}


def test_durations():
    seconds = (0.4, 59, 60, 200, 599, 690, 3599, 3600, 7500)
    expected = ["0 s", "59 s", "1 min", "3 min 20 s", "9 min 59 s", "12 min", "1 h", "1 h", "2 h 5 min"]
    assert [*map(duration, seconds)] == expected
