"""The shared hostile folder through a whole refresh: every file's outcome is the expected one."""

import csv
import os
import shutil
from pathlib import Path

import pytest

from tasks.catalogue import open_version
from tasks.refresh import RefreshConfig, refresh

SHARED = os.environ.get("GIGASHAPE_SHARED")

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.skipif(SHARED is None, reason="GIGASHAPE_SHARED is not set"),
]


@pytest.mark.timeout(300)
def test_every_hostile_file_is_a_row_with_its_reason(tmp_path: Path, data_root: str) -> None:
    source = tmp_path / "hostile"
    shutil.copytree(Path(SHARED or "") / "meshes" / "hostile", source)
    with (source / "expected.csv").open(newline="", encoding="utf-8") as stream:
        expected = list(csv.DictReader(stream))
    names = []
    for line in expected:
        path = source / line["file"]
        if line["copy_as"]:
            path = path.rename(path.with_name(line["copy_as"]))
        names.append(str(path.relative_to(source)))
    report = refresh(
        RefreshConfig(
            data_root,
            f"folder:{source}",
            (32,),
            views=1,
            view_size=32,
            seconds=60,
            bytes=2 * 2**30,
        )
    )
    rows = {uri: row for row in open_version(data_root).rows() for uri in row.uris}
    assert not [row.detail for row in rows.values() if row.status == "failed"]
    assert set(rows) == set(names)
    for name, line in zip(names, expected, strict=True):
        row, verdict = rows[name], line["expected"]
        warnings = {warning.split(":")[0] for warning in row.warnings}
        if verdict == "reject":
            assert (row.status, row.reason) == ("rejected", line["reason_code"]), name
        elif verdict == "accept_with_warning":
            assert row.status == "ready", (name, row.reason, row.detail)
            assert line["reason_code"] in warnings, (name, warnings)
        elif verdict == "accept":
            assert row.status == "ready", (name, row.reason, row.detail)
        assert (row.status == "ready") == (row.closed is True), name
        assert (row.status == "ready") == (row.detail == ""), name
    assert sum(report.outcomes.values()) == len(names)
