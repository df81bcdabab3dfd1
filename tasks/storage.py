"""Where a data folder lives: paths through `pyarrow.fs`, whole-file writes, and locks.

A root is a local folder or a URI that pyarrow knows, such as `s3://bucket/prefix`; credentials and
endpoints come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...), which is where
the catalogue's delta-rs looks for them too.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pyarrow import fs


class DatasetBusyError(RuntimeError):
    """Another process works on the same data folder."""


class BinarySink(Protocol):
    """What takes the bytes of a file being written."""

    def write(self, data: bytes) -> object:
        """Append data."""


@dataclass
class HashingSink:
    """Passes bytes on to a file and keeps their SHA-256 and count."""

    sink: BinarySink
    bytes_written: int = 0
    closed: bool = False
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def write(self, data: bytes) -> int:
        """Append data; returns its length, as a Python file does."""
        view = memoryview(data)
        self._hash.update(view)
        self.sink.write(data)
        self.bytes_written += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Position in the file; pyarrow's writers ask."""
        return self.bytes_written

    def flush(self) -> None:
        """Do nothing: the file is flushed once, when it is complete."""

    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._hash.hexdigest()


def absolute_root(root: str) -> str:
    """Return a root that means the same in a process with another working directory."""
    return root if "://" in root else str(Path(root).absolute())


def open_filesystem(root: str | Path) -> tuple[fs.FileSystem, str]:
    """Return the file system of a root (folder or URI) and the root's path in it."""
    if "://" in str(root):
        return fs.FileSystem.from_uri(str(root))
    return fs.LocalFileSystem(), str(Path(root).absolute())


@contextmanager
def atomic_file(filesystem: fs.FileSystem, path: str) -> Iterator[HashingSink]:
    """Write a file that appears whole or not at all; its folder must exist.

    Locally: a temporary file, fsync, rename, fsync of the folder. On an object store an object
    appears at its close; a writer that fails there leaves a partial object, so a file counts only
    once a staging file or the catalogue names it.
    """
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            yield HashingSink(stream)
        return
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield HashingSink(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def list_files(filesystem: fs.FileSystem, folder: str) -> dict[str, fs.FileInfo]:
    """Return the files under a folder, at any depth, by their path relative to it."""
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
    prefix = folder.rstrip("/") + "/"
    return {
        info.path.removeprefix(prefix): info
        for info in filesystem.get_file_info(selector)
        if info.type == fs.FileType.File
    }


@contextmanager
def exclusive(root: str | Path) -> Iterator[None]:
    """Hold the data folder for one refresh; raises DatasetBusyError when another one does.

    A lock of the kernel, so it goes with the process that holds it, however that dies. Object
    stores have none: there two refreshes both run, and the catalogue accepts the first commit.
    """
    filesystem, path = open_filesystem(root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(locked(Path(path) / ".refresh.lock"))
        except BlockingIOError:
            raise DatasetBusyError(
                f"another refresh is working on {path}; wait for it to end or stop it, then run "
                "this one again"
            ) from None
        yield


@contextmanager
def locked(file: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold a local file's kernel lock; it goes with the process that holds it.

    Raises BlockingIOError when another holds it and still does after so many seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not, where a forked child has it too
