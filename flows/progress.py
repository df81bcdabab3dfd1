"""Progress of a flow: a bar in the terminal and a progress artifact in Prefect's UI."""

import sys
import time
from types import TracebackType
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from tqdm import tqdm

ARTIFACT_SECONDS = 2.0  # an update is a request to the API


class Progress:
    """Counts what is done of one piece of work, to the terminal and to Prefect."""

    def __init__(self, name: str, unit: str):
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            desc=name,
            unit=unit,
            dynamic_ncols=interactive,
            mininterval=0.2 if interactive else 5.0,
            file=sys.stderr,
        )
        self.artifact: UUID | None = None
        self.artifact_at = time.monotonic()
        if FlowRunContext.get() is not None:
            artifact = create_progress_artifact(
                progress=0.0, key=name.lower(), description=f"{name}: {unit}s"
            )
            assert isinstance(artifact, UUID)  # a coroutine only where an event loop runs
            self.artifact = artifact

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Set how many units are finished, of how many, and a short text shown beside them."""
        self.bar.total = total
        if detail:
            self.bar.set_postfix_str(detail, refresh=False)
        self.bar.update(done - self.bar.n)
        due = time.monotonic() - self.artifact_at >= ARTIFACT_SECONDS or done == total
        if self.artifact is not None and due and total:
            self.artifact_at = time.monotonic()
            update_progress_artifact(self.artifact, progress=100 * done / total)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
