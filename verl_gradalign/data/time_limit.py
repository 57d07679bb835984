# SPDX-License-Identifier: Apache-2.0
"""A time limit that works in any thread, for Python code that may not end.

Signals reach the main thread alone, and verl scores responses in others. The limit is an exception raised in the
thread by a timer; a single long call into C (a huge integer power) is not interrupted, it ends first.

    try:
        with time_limit(10.0):
            simplify(expression)
    except TimeLimitExceeded:
        ...
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TimeLimitExceeded", "time_limit"]


class TimeLimitExceeded(BaseException):
    """Not an `Exception`, so that code under the limit which catches those does not swallow it."""


@contextmanager
def time_limit(timeout_s: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in this thread if the body is still running after `timeout_s` seconds."""
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    is_over = False

    def expire() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TimeLimitExceeded))

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        # An exception that was set and not yet raised would otherwise be raised somewhere after the body.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, None)
        timer.cancel()
