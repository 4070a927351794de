"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Give freed memory back to the operating system, where the C library can do so (glibc).

    Its allocator keeps freed places of tensors below 32 MB for later ones. After the compression of a large model these
    are gigabytes, which the worker beside this one may need.
    """
    with suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        ctypes.CDLL(None).malloc_trim(0)
