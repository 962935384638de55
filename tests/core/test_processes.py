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

from danlu.core import processes
from danlu.core.errors import DataError
from danlu.core.processes import AHEAD, in_order, num_cores


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


def leave_a_mark(number: int, folder: Path) -> None:
    """A job of a moment; the first one fails."""
    if number == 0:
        raise DataError("job 0 went wrong")
    time.sleep(0.2)
    (folder / str(number)).touch()


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


def test_a_worker_that_ends_is_told_of() -> None:
    with pytest.raises(DataError, match=r"(?s)ended before its work was done.*__main__"):
        list(in_order(end, [0, 1], 2))


def test_after_an_error_nothing_more_is_begun(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="job 0 went wrong"):
        list(in_order(partial(leave_a_mark, folder=tmp_path), range(16), 2))
    done = len(list(tmp_path.iterdir()))
    assert done <= 4
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == done, "and nobody works on"


def test_nor_when_no_more_results_are_asked_for(tmp_path: Path) -> None:
    results = in_order(partial(leave_a_mark, folder=tmp_path), range(1, 17), 2)
    next(results)
    results.close()
    done = len(list(tmp_path.iterdir()))
    assert done <= 5
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == done


def test_an_error_of_the_source_comes_through() -> None:
    def jobs() -> Iterator[int]:
        yield from range(3)
        raise DataError("no more rows")

    with pytest.raises(DataError, match="no more rows"):
        list(in_order(whose, jobs(), 2))


def test_what_is_given_out_is_bounded_by_its_weight() -> None:
    asked = []

    def jobs() -> Iterator[int]:
        for number in (5, 5, 100, 5, 5, 5):
            asked.append(number)
            yield number

    found = []
    for number, _ in in_order(whose, jobs(), 2, room=10, weigh=lambda number: number):
        found.append((number, len(asked)))
    assert [number for number, _ in found] == [5, 5, 100, 5, 5, 5]
    # one that is heavier than all that may be given out goes alone; the next job is always known
    assert [count for _, count in found] == [3, 3, 4, 6, 6, 6]


SCRIPT = """
from danlu.core.processes import in_order, refuse_in_worker
refuse_in_worker()
print(list(in_order(abs, [-1, -2, -3], 2)))
"""


def test_a_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "x.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode and "begins its work again in each process" in done.stderr and "__main__" in done.stderr
    (tmp_path / "y.py").write_text(SCRIPT.replace("refuse_in_worker()\nprint", "if __name__ == '__main__':\n    print"))
    done = subprocess.run([sys.executable, tmp_path / "y.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1, 2, 3]\n", done.stderr


def test_cores_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    for text, cores in (("max 100000\n", 64), ("200000 100000\n", 2), ("50000 100000\n", 1), ("?", 64)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(processes, "QUOTA", tmp_path / "cpu.max")
        assert num_cores() == cores


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
