"""What several processes do, in the order of what they were given.

    for result in in_order(encode, batches, workers=2): ...     # encode(batch) of each, as one process would give them
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from danlu.core.errors import DataError

AHEAD = 8  # jobs a worker that are given out before the first result is asked for
Job = TypeVar("Job")
Result = TypeVar("Result")

_do: Callable[[Any], Any]  # in a worker: what it does


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(do: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """do(job) of every job, in order; one worker is this very process.

    do  is sent to each worker once, and the jobs as they are asked for: AHEAD of them a worker wait, are done or have a
        result that nobody took yet

    Raises what a job raises (of several, the first job's), and DataError where a process was ended from outside.
    """
    if workers == 1:
        yield from map(do, jobs)
        return
    # a fresh interpreter each: a fork of a process with threads (Arrow's, torch's) may hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(do,)) as pool:
        source = iter(jobs)
        try:
            futures: deque[Future[Result]] = deque(pool.submit(_work, job) for job in islice(source, AHEAD * workers))
            while futures:
                yield futures.popleft().result()
                futures.extend(pool.submit(_work, job) for job in islice(source, 1))
        except BrokenProcessPool:
            raise DataError("a worker process was ended from outside, perhaps because memory ran out",
                            hint="Run the same command again; `workers: 1` takes the least memory.") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(do: Callable[[Any], Any]) -> None:
    """Has this worker end with the process that started it: killed, that one can tell nobody, and the next run would find
    workers that write into its files. A tokenizer has no threads of its own here: there is a worker for every core."""
    global _do
    _do = do
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(job: Any) -> Any:
    return _do(job)
