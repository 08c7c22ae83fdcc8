"""Ctrl-C that waits for the end of a step, so that what is saved then is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NOTICE = b"\nInterrupted: the step under way is finished and saved; Ctrl-C again ends at once.\n"


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; the second one raises `KeyboardInterrupt` as ever.

    Outside the main thread, and where somebody else handles the signal, it stays as it is.
    """
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, _NOTICE)  # print may be what was interrupted

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
