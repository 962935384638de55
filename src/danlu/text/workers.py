"""Jobs done by several processes: here, or on a Ray cluster through Daft. Each job leaves files.

On one machine these are plain processes. Daft 0.7's process functions are as quick, but end in a segmentation fault when
the interpreter closes, so Daft is used where it is needed: on Ray, the jobs are the rows of one frame, which it spreads
over the cluster. There every node needs danlu and the same folders.

    for number in run_jobs(partial(fill, folder=folder), jobs, workers=2): ...       # 0, 1, 2, … as they are done
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from danlu.core.errors import ConfigError, DataError
from danlu.core.processes import in_order

Engine = Literal["native", "ray"]
Job = TypeVar("Job")


def run_jobs(do: Callable[[Job], None], jobs: Sequence[Job], workers: int, engine: Engine = "native") -> Iterator[int]:
    """Does all jobs and yields their numbers in order; one worker is this very process.

    Raises what a job raises (of several, the first job's), and DataError where a process was ended from outside.
    """
    if engine == "ray":
        yield from _on_ray(do, jobs, workers)
    else:
        for number, _ in enumerate(in_order(do, jobs, min(workers, max(len(jobs), 1)))):
            yield number


def _on_ray(do: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> Iterator[int]:
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")  # before the import, which calls home
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        import daft
        import ray
    except ImportError as error:
        raise ConfigError(f"engine: ray needs the package {error.name}", hint="pip install 'danlu[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), num_cpus=None if "RAY_ADDRESS" in os.environ else workers,
                 log_to_driver=False)  # without a cluster, a small one here
    daft.set_runner_ray(noop_if_initialized=True)  # several runs of jobs in one process

    @daft.func.batch(return_dtype=daft.DataType.string())
    def work(numbers: daft.Series) -> list[str]:
        return [_outcome(do, jobs[number]) for number in numbers.to_pylist()]

    frame = daft.from_pydict({"number": list(range(len(jobs)))}).into_partitions(max(len(jobs), 1))
    outcomes = frame.with_column("error", work(frame["number"])).sort("number").to_pydict()
    for number, wrong in zip(outcomes["number"], outcomes["error"], strict=True):
        if wrong:
            raise DataError(wrong)
        yield number


def _outcome(do: Callable[[Job], None], job: Job) -> str:
    """"" or what went wrong: an error of ours, whose words would be lost in a traceback of the cluster's."""
    try:
        do(job)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""
