"""Isolation: real crashes, hangs and memory hogs in a real child become outcomes."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tasks.isolation import IsolatedFunction, Limits, Stage

LIMITS = Limits(seconds=60.0, bytes=400 * 2**20)  # more than a busy machine needs to fill them
BRIEF = Limits(seconds=1.0, bytes=400 * 2**20)


WARMED: list[int] = []


def warm_up() -> None:
    """More than a job may take, for what it keeps stays the child's."""
    WARMED.append(len(np.ones(LIMITS.bytes // 4)))


def job(kind: str, argument: object = None) -> Iterator[object]:
    """What the children of these tests do."""
    yield Stage("first")
    yield ("pid", os.getpid())
    yield Stage("second")
    match kind:
        case "add":
            time.sleep(0.2)
            yield np.arange(3) + argument
        case "segfault":
            sys.stderr.write("about to fall")
            ctypes.string_at(0)
        case "hang":
            while True:
                pass
        case "exit":
            os._exit(3)
        case "raise":
            raise KeyError("wrong mesh")
        case "touch":  # grows for ever, page by page
            kept = []
            while True:
                kept.append(np.ones(2**21))
                time.sleep(0.001)
        case "allocate":  # one request beyond the limit
            np.zeros(2**32)
        case "warmed":
            yield len(WARMED)
        case "peak":
            np.ones(argument // 8)
        case "environment":
            yield {**os.environ}
            links = [Path(f"/proc/self/fd/{n}") for n in range(3, 64)]
            yield [str(link.readlink()) for link in links if link.is_symlink()]
        case "grandchild":
            yield subprocess.Popen(["sleep", "60"]).pid
            time.sleep(60)


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedFunction]:
    with IsolatedFunction("test_isolation:job", LIMITS) as function:
        yield function


def pid(outcome: object) -> int:
    return dict(v for v in outcome.values if isinstance(v, tuple))["pid"]


def alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != "zombie"


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 5
    while alive(process):
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.02)


def test_child_is_warmed_up_once_and_outside_the_limits(isolated: IsolatedFunction) -> None:
    for _ in range(2):
        outcome = isolated.run("warmed")
        assert outcome.failure is None
        assert outcome.values[-1] == 1


def test_values_and_times_come_back_and_the_child_is_reused(isolated: IsolatedFunction) -> None:
    first = isolated.run("add", 1)
    second = isolated.run("add", 10)
    assert first.failure is None
    assert first.values[1].tolist() == [1, 2, 3]
    assert second.values[1].tolist() == [10, 11, 12]
    assert list(first.seconds) == ["first", "second"]
    assert first.seconds["second"] > 0.1  # it sleeps 0.2 s by another clock
    assert pid(first) == pid(second) != os.getpid()


@pytest.mark.parametrize(
    ("kind", "reason", "detail"),
    [
        ("segfault", "crashed", r"(?s)signal 11 \(SIGSEGV\) in `second`.*about to fall.*string_at"),
        ("exit", "crashed", "exit status 3 in `second`"),
        # Whichever is first: its memory is measured, or it is refused more.
        ("touch", "memory_limit", "MiB in `second` of 400|Unable to allocate 16"),
        ("allocate", "memory_limit", "(?i)allocate 32"),
    ],
)
def test_a_fault_is_an_outcome(
    isolated: IsolatedFunction, kind: str, reason: str, detail: str
) -> None:
    failed = isolated.run(kind)
    assert failed.failure is not None
    assert (failed.failure.reason, failed.failure.stage) == (reason, "second")
    assert re.search(detail, failed.failure.detail), failed.failure.detail
    assert pid(failed)  # what came before the fault is kept
    wait_until_gone(pid(failed))
    again = isolated.run("add", 1)
    assert again.failure is None
    assert pid(again) != pid(failed)


def test_an_exception_is_an_outcome_and_costs_no_child(isolated: IsolatedFunction) -> None:
    before = isolated.run("add", 1)
    failed = isolated.run("raise")
    assert failed.failure is not None
    assert failed.failure.reason == "exception"
    assert "KeyError: 'wrong mesh' (test_isolation.py:" in failed.failure.detail
    assert pid(isolated.run("add", 1)) == pid(before)


def test_peak_memory_is_that_of_the_job(isolated: IsolatedFunction) -> None:
    base = isolated.run("add", 1).peak_bytes
    assert isolated.run("peak", 150 * 2**20).peak_bytes - base > 140 * 2**20
    assert isolated.run("add", 1).peak_bytes - base < 30 * 2**20


def test_the_child_holds_nothing_of_ours(
    isolated: IsolatedFunction, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    isolated.close()
    with (tmp_path / "handle").open("w"):
        outcome = isolated.run("environment")
    environment, descriptors = outcome.values[1:]
    assert not [name for name in environment if name.startswith("RAY_")]
    assert environment["OMP_NUM_THREADS"] == environment["NUMBA_NUM_THREADS"] == "1"
    assert [name.split(":")[0] for name in descriptors] == ["socket"]


@pytest.mark.parametrize("kind", ["hang", "grandchild"])
def test_a_time_limit_ends_the_child_and_its_children(kind: str) -> None:
    with IsolatedFunction("test_isolation:job", BRIEF) as function:
        outcome = function.run(kind)
    assert outcome.failure is not None
    assert outcome.failure.reason == "time_limit"
    assert outcome.failure.detail == "still in `second` after 1 s"
    wait_until_gone(pid(outcome))
    for grandchild in outcome.values[1:]:
        wait_until_gone(grandchild)


def test_the_child_dies_with_a_killed_parent() -> None:
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from tasks.isolation import IsolatedFunction, Limits\n"
        "isolated = IsolatedFunction('test_isolation:job', Limits(60, 2**30))\n"
        "print(isolated.run('add', 1).values[0][1], flush=True)\n"
        "isolated.run('hang')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        wait_until_gone(child)


def test_a_function_that_cannot_be_imported_is_explained() -> None:
    with (
        IsolatedFunction("test_isolation:nothing", LIMITS) as function,
        pytest.raises(RuntimeError, match=r"(?s)test_isolation:nothing did not start.*nothing"),
    ):
        function.run()
