"""A polite end: SIGTERM (a pod that is moved, a spot node that goes) becomes a checkpoint and exit status 75.

Kubernetes sends SIGTERM and, after the grace period of 30 seconds by default, SIGKILL. The trainers ask between steps
whether they should stop, so the grace period must cover one step and the writing of a checkpoint; what does not fit
costs the work since the last checkpoint, nothing else.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process has been asked to stop; calling it says so."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """True once a stop was asked for."""
        return self.asked


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Within the context SIGTERM is a request to stop, not the end of the process.

    Outside the main thread, where Python handles no signals, the request is simply never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
