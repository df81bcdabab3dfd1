"""Runs a generator function in a child process, under limits of time and memory, job after job.

A segmentation fault, a hang or an allocation without end ends the child, not its parent, and comes
back as a `Failure` with a reason; the next job gets a new child. The child is a fresh interpreter
(no fork: it holds no thread, lock or handle of Ray's), serves many jobs because its imports cost
seconds, and dies when its parent does. Linux only.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

POLL_SECONDS = 0.05  # a process can touch some 100 MB between two looks at its memory
START_SECONDS = 300.0  # imports and warm-up, where every core starts a child at once
IDLE_SECONDS = 120.0  # a child nobody talks to ends; its parent starts another when needed
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Stage:
    """What a job yields when it enters its next stage."""

    name: str


@dataclass(frozen=True)
class Failure:
    """Why a job did not end.

    reason: `crashed`, `time_limit`, `memory_limit` or `exception`. stage: the one it was in.
    """

    reason: str
    detail: str
    stage: str


@dataclass(frozen=True)
class Outcome:
    """What came of one job.

    values: what it yielded, up to its end or its failure. seconds: by stage. peak_bytes: the most
    resident memory of the child during the job, its libraries included.
    """

    values: tuple[Any, ...]
    seconds: dict[str, float]
    peak_bytes: int
    failure: Failure | None


@dataclass(frozen=True)
class Limits:
    """Of one job: seconds of wall-clock time, bytes of the child's resident memory."""

    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.bytes / 2**20:.0f} MiB"


Kind = Literal["stage", "value", "end", "memory", "exception"]


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: Connection
    stderr: Path
    used: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        # Its group, so that processes that it started go too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()
        self.stderr.unlink(missing_ok=True)

    def last_words(self) -> str:
        return self.stderr.read_bytes()[-2000:].decode(errors="replace").strip()


@dataclass
class IsolatedFunction:
    """Calls function(*args) in a child under limits.

    function: names a generator function, `module:name`, which only the child imports. It yields
    `Stage` marks and values that pickle. A function `warm_up` of that module is called once, before
    the first job and outside its limits: for kernels that are loaded or compiled, and for the
    address space that a GPU's driver takes. Use as a context, or call `close`; calls must come from
    the thread that made the first (the kernel ends the child with it).
    """

    function: str
    limits: Limits
    _child: _Child | None = field(default=None, init=False)

    def __enter__(self) -> "IsolatedFunction":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; a later call starts another."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def run(self, *args: object) -> Outcome:
        """Run one job to its end or to its limits."""
        child = self._ready_child()
        memory = psutil.Process(child.process.pid)
        values: list[Any] = []
        seconds: dict[str, float] = {}
        stage, peak, failure, ended = "", 0, None, False
        child.pipe.send(args)
        started = entered = time.monotonic()
        while failure is None and not ended:
            try:
                message: tuple[Kind, Any, int] | None = (
                    child.pipe.recv() if child.pipe.poll(POLL_SECONDS) else None
                )
                peak = max(peak, memory.memory_info().rss, message[2] if message else 0)
            except (EOFError, OSError, psutil.NoSuchProcess):
                failure = _death(child, stage, self.limits)
                break
            now = time.monotonic()
            match message:
                case ("stage", name, _):
                    if stage:
                        seconds[stage] = seconds.get(stage, 0.0) + now - entered
                    stage, entered = name, now
                case ("value", value, _):
                    values.append(value)
                case ("exception", detail, _):
                    failure = Failure("exception", detail, stage)
                case ("memory", detail, _):
                    failure = Failure("memory_limit", f"{detail} ({self.limits})", stage)
                case ("end", _, _):
                    ended = True
            if failure is None and not ended:
                if now - started > self.limits.seconds:
                    failure = Failure(
                        "time_limit", f"still in `{stage}` after {self.limits.seconds:g} s", stage
                    )
                elif peak > self.limits.bytes:
                    failure = Failure(
                        "memory_limit",
                        f"{peak / 2**20:.0f} MiB in `{stage}` of {self.limits.bytes / 2**20:.0f}",
                        stage,
                    )
        if stage:
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - entered
        # A child that outlived an exception is sound, unless memory has piled up in it.
        sound = ended or (failure is not None and failure.reason == "exception")
        if not sound or _resident(memory) > self.limits.bytes / 2:
            self.close()
        child.used = time.monotonic()
        return Outcome(tuple(values), seconds, peak, failure)

    def _ready_child(self) -> _Child:
        if self._child is not None:
            idle = time.monotonic() - self._child.used > IDLE_SECONDS / 2  # it may be ending now
            if idle or self._child.process.poll() is not None:
                self.close()
        if self._child is None:
            self._child = _start(self.function, self.limits)
        return self._child


def _start(function: str, limits: Limits) -> _Child:
    """Start a child that has imported the function, warmed up and waits for jobs."""
    ours, theirs = Pipe()
    stderr, path = tempfile.mkstemp(prefix="gigashape-child-")
    # Ray's variables would make a library in the child join the cluster; one thread each, since
    # Ray runs as many children as there are cores.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    threads = ("OMP", "OPENBLAS", "MKL", "NUMBA", "VECLIB_MAXIMUM")
    environment |= {f"{name}_NUM_THREADS": "1" for name in threads}
    start = f"import sys; sys.path[:] = {sys.path!r}\n"
    start += f"from tasks.isolation import serve; serve({theirs.fileno()}, {os.getpid()})"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    os.close(stderr)
    child = _Child(process, ours, Path(path))
    try:
        child.pipe.send((function, limits))
        if not child.pipe.poll(START_SECONDS):
            raise TimeoutError(f"no sign of life in {START_SECONDS:g} s")
        child.pipe.recv()
    except (EOFError, OSError) as error:  # TimeoutError is one
        words = child.last_words()
        child.stop()
        raise RuntimeError(
            f"the child process for {function} did not start: {error}\n{words}"
        ) from error
    return child


def _death(child: _Child, stage: str, limits: Limits) -> Failure:
    """Explain a child that ended by itself."""
    try:
        status = child.process.wait(5)
    except subprocess.TimeoutExpired:
        return Failure("crashed", "it closed its pipe and went on", stage)
    words = child.last_words()
    if "bad_alloc" in words or "MemoryError" in words:
        return Failure("memory_limit", f"an allocation was refused ({limits})", stage)
    if status < 0:
        what = f"signal {-status} ({signal.Signals(-status).name})"
    else:
        what = f"exit status {status}"
    return Failure("crashed", "\n".join(filter(None, [f"{what} in `{stage}`", words])), stage)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _status_bytes(name: str) -> int:
    """Return a figure of this process's memory, such as VmHWM, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: isolation needs a Linux kernel")


def serve(descriptor: int, parent: int) -> None:
    """Be a child: serve jobs that come through a pipe until it closes or stays silent."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    faulthandler.enable()
    pipe = Connection(descriptor)
    try:
        name, limits = pipe.recv()
        module_name, _, function_name = name.partition(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        warm_up = getattr(module, "warm_up", None)
        if warm_up is not None:
            warm_up()
        pipe.send("ready")
        while pipe.poll(IDLE_SECONDS):
            _serve_job(pipe, function, limits, pipe.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve_job(
    pipe: Connection,
    function: Callable[..., Generator[Any, None, None]],
    limits: Limits,
    args: tuple[Any, ...],
) -> None:
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    # The job may map at most the limit on top of what the libraries hold, so that one huge request
    # is refused before a page of it is touched. Resident memory is watched by the parent.
    allowance = _status_bytes("VmData") + limits.bytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowance, resource.RLIM_INFINITY))
    resets = True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    except OSError:  # sandboxes such as gVisor: what the parent sees every 50 ms must do
        resets = False

    def send(kind: Kind, content: object) -> None:
        pipe.send((kind, content, _status_bytes("VmHWM") if resets else 0))

    try:
        for item in function(*args):
            if isinstance(item, Stage):
                send("stage", item.name)
            else:
                send("value", item)
        send("end", None)
    except MemoryError as error:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        send("memory", str(error) or "an allocation was refused")
    except Exception as error:  # noqa: BLE001 - whatever a library throws is the job's outcome
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        send("exception", f"{type(error).__name__}: {error} ({where})")
