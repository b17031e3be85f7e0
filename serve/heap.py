"""The heap of a server's process, which serves for weeks: two ways in which it would grow although nothing is kept.

Threads that encode, record and make blocks each get a part of glibc's heap, and what is freed in one part serves no
thread of another. Cyclic garbage of Python, such as a closed connection, waits for a full collection, which comes
only once a quarter as many objects are new as are old; after a model was loaded, hundreds of thousands are old.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_ARENA_MAX = -8  # a parameter of glibc's mallopt
ARENAS = 2


def limit_arenas() -> bool:
    """Have all threads share `ARENAS` parts of the heap; to be called before threads begin, to have full effect.

    Returns False where the C library has no such setting, or MALLOC_ARENA_MAX is set, which goes before.
    """
    if os.name != "posix" or "MALLOC_ARENA_MAX" in os.environ:  # elsewhere a program has no table of all symbols
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_ARENA_MAX, ARENAS) == 1


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no cyclic garbage meanwhile, for imports and loading: they leave little of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def freeze() -> None:
    """Have full collections follow what comes from now on; what is there now is for good."""
    gc.collect()  # garbage of loading is not for good
    gc.freeze()
    gc.collect()  # counts what is old, which is nothing now
