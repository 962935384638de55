"""Jobs in several processes: in order, not all at once, errors in order, and none outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from danlu.core.errors import DataError
from danlu.core.processes import AHEAD, in_order


def leave_a_name(number: int, folder: Path) -> None:
    """A job that tells which process does it, and then takes long."""
    (folder / f"{number}-{os.getpid()}").touch()
    time.sleep(60)


def fail(number: int) -> None:
    raise DataError(f"job {number} went wrong")


def whose(number: int) -> tuple[int, int]:
    return number, os.getpid()


def end(number: int) -> None:
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_jobs_error_is_raised(workers: int) -> None:
    with pytest.raises(DataError, match="job 0 went wrong"):
        list(in_order(fail, [0, 1, 2], workers))


def test_results_come_in_order_and_jobs_are_not_asked_for_all_at_once() -> None:
    asked = 0

    def jobs() -> Iterator[int]:
        nonlocal asked
        for number in range(100):
            asked += 1
            yield number

    found = []
    for number, process in in_order(whose, jobs(), 2):
        assert process != os.getpid()
        assert asked <= len(found) + 2 * AHEAD + 1
        found.append(number)
    assert found == list(range(100)) and list(in_order(whose, [7], 1)) == [(7, os.getpid())]


def test_a_worker_that_is_ended_is_told_of() -> None:
    with pytest.raises(DataError, match="ended from outside"):
        list(in_order(end, [0, 1], 2))


def is_alive(number: int) -> bool:
    """Whether a process runs, other than as what is left of one until someone asks for its exit status."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    """The next run would find it writing into its files."""
    main = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(found := list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name.split("-")[1]) for path in found]
    assert len(set(workers)) == 2 and all(map(is_alive, workers))
    main.send_signal(signal.SIGKILL)
    main.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


if __name__ == "__main__":
    list(in_order(partial(leave_a_name, folder=Path(sys.argv[1])), [0, 1, 2, 3], 2))
