"""A pool of processes that prepares chunks on all cores and returns them in order."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import starmap
from multiprocessing import get_context

import pyarrow as pa

from reprotune.data.chunks import Chunk, Preparer
from reprotune.data.limiting import CHUNK
from reprotune.errors import InputError
from reprotune.process import end_with_parent

Job = tuple[pa.RecordBatch, str, list[str]]
"""Raw rows, the name of their format and the fields to ignore."""
Work = Callable[[Iterable[Job]], Iterator[Chunk]]

CHUNKS_TO_START = 4
"""Chunks that are worth the start of one more process."""

_preparer: Preparer | None = None
"""Set before the pool forks, so that every worker has it."""


def process_count(rows: int) -> int:
    """One process a core, as far as there are rows enough to be worth its start."""
    return min(len(os.sched_getaffinity(0)), 1 + rows // (CHUNKS_TO_START * CHUNK))


@contextmanager
def workers(preparer: Preparer, count: int) -> Iterator[Work]:
    """Yield a function that prepares chunks in order, in this process if `count` is 1, else in a pool."""
    global _preparer
    if count == 1:
        yield lambda jobs: starmap(preparer.prepare, jobs)
        return
    _preparer = preparer
    # a forked worker starts at once and shares memory, as long as no garbage collection writes to it
    gc.freeze()
    try:
        with ProcessPoolExecutor(count, get_context("fork"), end_with_parent, (os.getpid(),)) as pool:
            # the first task forks all workers, before tqdm or Arrow start a thread
            pool.submit(int).result()
            yield lambda jobs: in_order(pool, jobs, ahead=2 * count)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that tokenizes was ended from outside, most likely for want of memory; "
            "free some, then `dvc repro`"
        ) from error
    finally:
        gc.unfreeze()


def in_order(pool: Executor, jobs: Iterable[Job], ahead: int) -> Iterator[Chunk]:
    """Results in the order of the jobs; at most `ahead` jobs are in memory."""
    waiting: deque[Future[Chunk]] = deque()
    for job in jobs:
        waiting.append(pool.submit(prepare, job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def prepare(job: Job) -> Chunk:
    """In a worker: convert and tokenize some rows of one source."""
    assert _preparer is not None
    return _preparer.prepare(*job)
