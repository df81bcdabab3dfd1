"""What several test modules share: one Ray session for all, and a data folder for each test."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It takes longest, most of it one process after another: the others run beside it.
    items.sort(key=lambda item: item.path.name != "test_deployments.py")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray session with two workers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Workers import functions by name.
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=100 * 2**20,
        )
    yield
    ray.shutdown()


@pytest.fixture
def data_root(tmp_path: Path) -> str:
    """A data folder that is not there yet."""
    return str(tmp_path / "data")
