"""Writes in the background while training goes on, one job at a time; what goes wrong reaches every rank.

Takes jobs from the main rank, gives back nothing but their errors. It does not know what a job writes. A job works on
the CPU and on what it was given alone: everything else changes meanwhile, and a GPU may be recording a graph.
"""

from collections.abc import Callable
from concurrent import futures

from sft.engine import gather_objects


class Writer:
    """One background thread of the main rank. As a context manager it lets a job in progress end, whatever happens.

    Args:
        tell: takes the line about a job that failed while something else ended the run.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._job: futures.Future | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """Not collective: other ranks may be gone."""
        self._thread.shutdown()
        if self._job is not None and (failure := self._job.exception()):
            self._tell(f"error: {failure}")

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job; main rank only, after `wait`. It may raise UserError, or another error whose args tell all."""
        assert self._job is None, "wait for the job before: it may have failed"
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Waits for the job, and raises on every rank what it failed with. Collective."""
        if self._job is not None:
            futures.wait([self._job])
        self.check()

    def check(self) -> None:
        """Raises on every rank what the job failed with, if it has ended; does not wait for it. Collective."""
        failure = None
        if self._job is not None and self._job.done():
            failure, self._job = self._job.exception(), None
        found = gather_objects(failure)[0]
        if found is not None:
            raise failure or found  # the main rank's own knows its cause, a copy of it does not
