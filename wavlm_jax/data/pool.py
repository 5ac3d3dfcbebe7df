"""Work shared out to processes that come up fresh, and go when their parent goes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class WorkerError(RuntimeError):
    """A worker process died without a word; says what to do."""


def unordered(
    work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int, jobs_per_process: int | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """(job, work(job)) of all jobs, as they come ready.

    Args:
        work: a picklable function; an exception in it ends the whole.
        jobs: picklable arguments.
        workers: processes; with one, or one job, the work is done here.
        jobs_per_process: after so many a process is replaced by a fresh one; then no work is done here.

    Raises:
        WorkerError: a process was killed, or ran out of memory.

    """
    workers = min(workers, len(jobs))
    if workers <= 1 and jobs_per_process is None:
        for job in jobs:
            yield job, work(job)
        return
    pool = ProcessPoolExecutor(
        max(workers, 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_with_parent,
        max_tasks_per_child=jobs_per_process,
    )
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died (killed, or out of memory); finished work is kept: run the same command again, with "
            "fewer --workers if it was memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """A worker whose parent was killed outright would wait for work for ever; this one leaves too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
