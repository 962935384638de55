"""What several processes do, in the order of what they were given.

    for result in in_order(encode, batches, workers=2): ...     # encode(batch) of each, as one process would give them

Each worker is a fresh interpreter, which reads the program's script again up to `if __name__ == "__main__":`.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from danlu.core.errors import ConfigError, DataError

AHEAD = 8  # jobs a worker that are given out and whose results nobody has taken yet, at most
GUARD = 'A script that starts processes has to begin its work behind `if __name__ == "__main__":`'
QUOTA = Path("/sys/fs/cgroup/cpu.max")
Job = TypeVar("Job")
Result = TypeVar("Result")

_do: Callable[[Any], Any]  # in a worker: what it does
_told: Connection  # in a worker: closed at the other end where nothing more is to be begun


def num_cores() -> int:
    """Cores that this process may use, as many of them as its container may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no such file, or it says “max”
        return cores


def refuse_in_worker() -> None:
    """Raises ConfigError in a worker that reads the program's script and finds work in it, which it would begin anew."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError("this script begins its work again in each process that it starts", hint=f"{GUARD}.")


def in_order(do: Callable[[Job], Result], jobs: Iterable[Job], workers: int, *, room: float = math.inf,
             weigh: Callable[[Job], int] = lambda job: 1) -> Iterator[Result]:
    """do(job) of every job, in order; one worker is this very process.

    do     is sent to each worker once
    room   what is given out weighs at most so much, or is one job
    weigh  the weight of a job

    Raises what a job raises (of several, the first job's), and DataError where a process was ended from outside. Where it
    ends early, for an error or because no more results are asked for, the workers finish what they are at and no more.
    """
    if workers == 1:
        yield from map(do, jobs)
        return
    refuse_in_worker()
    # a fresh interpreter each: a fork of a process with threads (Arrow's, torch's) may hang
    context = multiprocessing.get_context("spawn")
    told, teller = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(do, told))
    waiting: deque[tuple[Future[Result], int]] = deque()
    source, held = iter(jobs), 0
    job = next(source, None)
    try:
        while waiting or job is not None:
            while job is not None and len(waiting) < AHEAD * workers and (not waiting or held + weigh(job) <= room):
                waiting.append((pool.submit(_work, job), weigh(job)))
                held += waiting[-1][1]
                job = next(source, None)
            future, weight = waiting[0]
            result = future.result()
            waiting.popleft()
            held -= weight
            yield result
    except BrokenProcessPool:
        raise DataError("a worker process ended before its work was done, perhaps because memory ran out",
                        hint=f"Run the same command again; `workers: 1` takes the least memory. {GUARD}.") from None
    finally:
        teller.close()
        pool.shutdown(wait=True, cancel_futures=True)  # not ended: one that is writing its result would leave half of it
        told.close()


def _begin(do: Callable[[Any], Any], told: Connection) -> None:
    """Has this worker end with the process that started it: killed, that one can tell nobody, and the next run would find
    workers that write into its files. A tokenizer has no threads of its own here: there is a worker for every core. The
    keyboard's interrupt is the starter's business."""
    global _do, _told
    _do, _told = do, told
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(job: Any) -> Any:
    return None if _told.poll() else _do(job)
