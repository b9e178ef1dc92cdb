"""Stopping between two steps: Ctrl-C and SIGTERM set a flag, so that no step is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pipeline.store.errors import UserError


class Interrupted(UserError):
    """Training was stopped by the user and can be resumed."""

    exit_code = 130


class Interrupt:
    """Within `with Interrupt() as stop`, a first SIGINT or SIGTERM sets `stop.asked`; a second SIGINT raises at once.

    Does nothing outside the main thread, which gets no signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
