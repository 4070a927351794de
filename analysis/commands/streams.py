"""Standard output and error of our commands: no character, closed pipe or full disk stops a command."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class _Lasting(io.FileIO):
    """A stream that drops its output after a write has failed."""

    trouble: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        if self.trouble is None:
            try:
                return super().write(data)
            except OSError as error:
                self.trouble = error
        return len(data)


@contextmanager
def lasting_streams(command: str) -> Iterator[None]:
    """Let a command continue, whatever happens to its output.

    A character that the streams' encoding lacks is written as its escape (χ as \\u03c7). Once a stream cannot be
    written to, output to it is dropped. A reader that closed the pipe has what it wanted. Any other trouble, such as a
    full disk, is reported in one line on standard error at the end, and an exit code of 0 becomes 1.
    """
    # A stream that a test has put in place is not the process's own: it stays as it is.
    raw = [_replace(name) for name in ("stdout", "stderr") if getattr(sys, name) is getattr(sys, f"__{name}__")]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        lost = [stream.trouble for stream in raw if stream.trouble and stream.trouble.errno != errno.EPIPE]
        if lost:
            print(f"{command}: cannot write the output: {lost[0].strerror}", file=sys.stderr, flush=True)
            end = sys.exc_info()[1]
            if end is None or (isinstance(end, SystemExit) and not end.code):
                raise SystemExit(1) from None


def _replace(name: str) -> _Lasting:
    stream: TextIO | None = getattr(sys, name)
    if stream is None:  # it was closed before the command began
        raw, encoding = _Lasting(os.open(os.devnull, os.O_WRONLY), "w"), "utf-8"
    else:
        stream.flush()
        raw, encoding = _Lasting(stream.fileno(), "w", closefd=False), stream.encoding
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)
    setattr(sys, name, text)
    return raw
