"""The end of a run before its last step: SIGUSR1 asks for it, as Slurm does before a job's time is
up. The run saves, ends its workers in order, and ends with exit code 0.

    asked for                            what the run does
    before the first update of step s    gives up what it generates and scores, and saves what step
                                         s began with, global_step_s, unless that is saved already
    later in step s                      finishes the step and saves global_step_{s + 1}
    after the last step                  gives up the last validation; the last step is saved

So no update is done twice, and a generation of hours ends within seconds. A pass for
log-probabilities or values and a weight sync are finished first. Started again, the run goes on
with that step, draws the same samples, and ends with the same numbers as a run that was never
stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

from mcore_rl.cluster.group import WorkerGroup
from mcore_rl.errors import StoppedError
from mcore_rl.loop.checkpoints import Checkpoints

logger = logging.getLogger(__name__)


class Stop:
    """Whether a run is asked to end, and the functions that then interrupt its work."""

    def __init__(self) -> None:
        self._is_asked = threading.Event()
        self._interrupts: list[Callable[[], None]] = []

    @property
    def is_asked(self) -> bool:
        """Whether the run is asked to end."""
        return self._is_asked.is_set()

    def ask(self) -> None:
        """Ask it to end; from any thread."""
        self._is_asked.set()
        for interrupt in self._interrupts:
            interrupt()

    def interrupts(self, *functions: Callable[[], None]) -> None:
        """Register functions to call, from any thread, when the run is asked to end. The work that
        they interrupt raises StoppedError."""
        self._interrupts += functions
        if self.is_asked:
            self.ask()

    def check(self) -> None:
        """Raise an error if the run is asked to end.

        Raises:
            StoppedError: if it is.
        """
        if self.is_asked:
            raise StoppedError

    @contextlib.contextmanager
    def saves(self, checkpoints: Checkpoints) -> Iterator[None]:
        """If the step is stopped in the block, save the state that it began with."""
        try:
            yield
        except StoppedError:
            checkpoints.save_begun()
            raise


@contextlib.contextmanager
def stopped_by_signal(workers: WorkerGroup) -> Iterator[Stop]:
    """Yield the `Stop` that SIGUSR1 triggers; the block ends when the run and its workers have
    ended. Only the main thread may enter it."""
    stop, wake = Stop(), os.eventfd(0, os.EFD_CLOEXEC)

    def watch() -> None:
        os.eventfd_read(wake)
        logger.warning("SIGUSR1: the run saves and ends")
        stop.ask()

    # A handler may run between any two instructions, so it does as little as possible.
    threading.Thread(target=watch, name="stop", daemon=True).start()
    signal.signal(signal.SIGUSR1, lambda *_: os.eventfd_write(wake, 1))
    try:
        yield stop
    except StoppedError:
        workers.close()
        logger.warning("ended as asked; the same command goes on from here")
