"""Promotion: champions change together, for a better score alone, and can be taken back."""

from pathlib import Path

import pytest

from tasks.models import CHALLENGER, CHAMPION, promote_if_better
from tasks.tracking import ModelVersion, register_model, resolve_model, set_alias, start_run

SCORE = "generation/f_score_2_voxels"
NAMES = ("gigashape-structure", "gigashape-dit-64")


@pytest.fixture
def registry(tmp_path: Path) -> tuple[str, list[ModelVersion]]:
    """A registry with a champion and a newer challenger of each stage, and the challengers."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    files = tmp_path / "files"
    files.mkdir()
    (files / "weights").write_text("weights")
    with start_run("retrain", "retrain", uri, {}) as run:
        for name in NAMES:
            register_model(name, files, run, {}, (CHALLENGER, CHAMPION))
        challengers = [register_model(name, files, run, {}, (CHALLENGER,)) for name in NAMES]
    return uri, challengers


def champions(uri: str) -> list[int]:
    return [resolve_model(f"{name}@{CHAMPION}", uri).version for name in NAMES]


def test_a_better_set_is_promoted_and_can_be_rolled_back(registry) -> None:
    uri, challengers = registry
    decision = promote_if_better(challengers, SCORE, 0.8123, 0.7, 0.1, uri)
    assert champions(uri) == [2, 2]
    assert "gigashape-structure/2, gigashape-dit-64/2: promoted to champion" in decision
    assert "0.8123 against the champion's 0.7000" in decision
    for name in NAMES:
        set_alias(name, CHAMPION, 1, uri)
    assert champions(uri) == [1, 1]


@pytest.mark.parametrize(("new", "min_gain"), [(0.7, 0.0), (0.6, 0.0), (0.79, 0.1)])
def test_what_is_not_better_stays_challenger(registry, new: float, min_gain: float) -> None:
    uri, challengers = registry
    decision = promote_if_better(challengers, SCORE, new, 0.7, min_gain, uri)
    assert champions(uri) == [1, 1]
    assert [resolve_model(f"{name}@{CHALLENGER}", uri).version for name in NAMES] == [2, 2]
    assert "kept as challenger" in decision
    assert f"{new:.4f} against the champion's 0.7000" in decision
