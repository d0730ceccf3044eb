"""End a run on request: SIGTERM and Ctrl-C let it save a checkpoint first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reprotune.process import die_with_parent
from reprotune.training import distributed

GRACE = 600
"""Seconds from the request until the process is killed: time for the step under way and a checkpoint."""


class StopRequest:
    """Whether SIGTERM or Ctrl-C came inside `listening`."""

    def __init__(self) -> None:
        self.received = False

    def receive(self, *_: Any) -> None:
        """Note the request; a second one, or GRACE seconds, end the process at once."""
        self.received = True
        # the parent is often asked too, and its end would count as a second request
        die_with_parent(0)
        if distributed.world_size() == 1:
            # a launcher repeats the signal by itself
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(GRACE)

    @contextmanager
    def listening(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            signal.alarm(0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
