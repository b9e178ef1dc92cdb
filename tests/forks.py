"""Work in a fork of this process: a process of its own at a hundredth of the price of a new one, which loads torch."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest

needed = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: what takes a second process not tested")


def begun(work: Callable[[], int]) -> int:
    """The id of a process that does `work`, whose value is its exit status; 1 where it raises."""
    child = os.fork()
    if child:
        return child
    signal.alarm(100)  # Waiting for ever ends here.
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit status of a process, waited for; that of one which a signal ended is minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def value_of(work: Callable[[], Any]) -> Any:
    """What `work` returns, done in a process of its own."""
    reading, writing = os.pipe()

    def send() -> int:
        with os.fdopen(writing, "wb") as file:
            pickle.dump(work(), file)
        return 0

    child = begun(send)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        sent = file.read()
    assert ended(child) == 0, "the process failed: see what it wrote"
    return pickle.loads(sent)
