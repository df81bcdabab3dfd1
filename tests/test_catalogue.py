"""The catalogue: versions that never change, atomic commits, and plans that say why."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.catalogue import (
    SCHEMA,
    CatalogueError,
    Row,
    commit,
    create,
    exists,
    from_table,
    open_version,
    referenced_shards,
    to_table,
)
from tasks.planning import Plan, Wanted, plan
from tasks.samples import split_of

RECIPE = "conversion=1 engine=sparse views=4x64"
LIMITS = "60 s, 1024 MiB"


def asset_id(number: int) -> str:
    return f"{number:064x}"


def row(number: int, resolution: int = 64, **changes: object) -> Row:
    base = Row(
        asset_id(number),
        resolution,
        (f"{number}.glb",),
        "ready",
        RECIPE,
        "folder:x",
        "train",
        limits=LIMITS,
        warnings=("open: 3 edges",),
        faces=12,
        closed=True,
        sign_confidence=0.5,
        seconds_load=0.1,
        shard="s",
        row_group=number,
        assets_row_group=number,
        sdf_digest="d",
        asset_digest="e",
    )
    return replace(base, **changes)


def wanted(number: int, **changes: object) -> Wanted:
    base = Wanted(asset_id(number), (f"{number}.glb",), "folder:x", "", "", "", "train")
    return replace(base, **changes)


FILES = ["s/assets.parquet", "s/sdf-64.parquet", "s/sdf-128.parquet"]


def actions(result: Plan) -> dict[str, tuple[str, str]]:
    return {f"{e.uri}@{e.resolution}": (e.action, e.reason) for e in result.entries}


def test_columns_are_documented_and_rows_survive() -> None:
    assert SCHEMA.names == [item.name for item in fields(Row)]
    for column in SCHEMA:
        assert b"description" in column.metadata
    rows = [row(1), row(2, status="rejected", reason="no_area", faces=None, shard=None)]
    assert from_table(to_table(rows)) == rows


def test_commits_make_versions_that_stay_readable(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert not exists(root)
    with pytest.raises(CatalogueError, match="gigashape refresh"):
        open_version(root)
    empty = create(root)
    assert (empty.number, empty.rows()) == (0, [])
    assert create(root) == empty
    one = commit(empty, [row(2), row(1), row(1, 128)], [])
    assert [r.key for r in one.rows()] == [(asset_id(1), 64), (asset_id(1), 128), (asset_id(2), 64)]
    assert one.rows()[0] == row(1)
    changed = row(1, status="failed", reason="crashed", shard=None, sdf_digest=None)
    two = commit(one, [changed, row(3)], [(asset_id(2), 64)])
    assert two.number == 2
    assert two.rows() == [changed, row(1, 128), row(3)]
    three = commit(two, [], [(asset_id(3), 64)])
    assert [r.key[0] for r in three.rows()] == [asset_id(1)] * 2
    assert commit(three, [], []) == three
    assert one.rows() == [row(1), row(1, 128), row(2)]
    for version in (empty, one, two, three):
        assert open_version(root, version.number) == version
        assert open_version(root, version.name) == version
    assert open_version(root) == three
    assert len({v.digest for v in (empty, one, two, three)}) == 4
    assert referenced_shards(root) == {"s"}
    with pytest.raises(CatalogueError, match="versions 0 to 3, not 4"):
        open_version(root, 4)
    with pytest.raises(CatalogueError, match="another data folder"):
        open_version(root, "v1-0123")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = commit(create(f"{tmp_path}/a"), [row(1), row(2)], [])
    step = commit(create(f"{tmp_path}/b"), [row(2, seconds_load=9.0, shard="other")], [])
    second = commit(step, [row(1)], [])
    assert (first.digest, first.number) == (second.digest, second.number - 1)
    third = commit(second, [row(1, sdf_digest="changed")], [])
    assert third.digest != second.digest


def test_the_later_of_two_commits_is_refused(tmp_path: Path) -> None:
    base = commit(create(str(tmp_path)), [row(1)], [])
    winner = commit(base, [row(2)], [])
    with pytest.raises(CatalogueError, match=r"another refresh.*run it again"):
        commit(base, [row(3)], [])
    assert open_version(str(tmp_path)) == winner
    assert [r.asset_id for r in winner.rows()] == [asset_id(1), asset_id(2)]


def test_a_commit_cut_short_leaves_the_last_version(tmp_path: Path) -> None:
    base = commit(create(str(tmp_path)), [row(1)], [])
    # What a kill between data file and log entry leaves behind.
    pq.write_table(to_table([row(2, shard="t")]), tmp_path / "catalogue/part-00000-cut.parquet")
    (tmp_path / "catalogue/_delta_log/_commit_cut.json.tmp").write_text("{")
    assert open_version(str(tmp_path)) == base
    assert commit(base, [row(3)], []).number == base.number + 1


def test_another_schema_is_explained(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    write_deltalake(f"{tmp_path}/catalogue", pa.table({"asset_id": ["a"]}))
    with pytest.raises(CatalogueError, match="new data folder"):
        open_version(str(tmp_path))


def test_plan_of_an_empty_catalogue_and_of_nothing_to_do() -> None:
    assets = [wanted(1), wanted(2)]
    first = plan([], assets, {64: RECIPE, 128: RECIPE}, LIMITS)
    assert first.counts() == {"new": 4}
    rows = [row(1), row(2), row(1, 128), row(2, 128, status="rejected", reason="x", shard=None)]
    again = plan(rows, assets, {64: RECIPE, 128: RECIPE}, LIMITS, files=FILES)
    assert again.counts() == {"unchanged": 4}
    assert actions(again)["2.glb@128"] == ("unchanged", "rejected (x)")


def test_plan_says_why() -> None:
    rows = [
        row(1),
        row(2),
        row(3),
        row(4, recipe="conversion=0 engine=sparse views=4x64"),
        row(5, status="failed", reason="crashed", shard=None),
        row(6, status="failed", reason="time_limit", shard=None, limits="5 s, 1024 MiB"),
        row(7, 32),
        row(8, shard="lost"),
        row(9, licence="CC0"),
    ]
    assets = [
        wanted(1),
        wanted(22, uris=("2.glb",)),  # 2.glb has other bytes now; 3.glb went
        *(wanted(n) for n in (4, 5, 6, 7, 8, 9, 10)),
    ]
    result = plan(rows, assets, {64: RECIPE}, LIMITS, files=FILES)
    assert [(e.action, e.uri, e.resolution, e.reason) for e in result.entries] == [
        ("unchanged", "1.glb", 64, "ready"),
        ("changed", "2.glb", 64, "other content than before at this place"),
        ("stale", "4.glb", 64, "conversion 0 -> 1"),
        ("unchanged", "5.glb", 64, "failed (crashed)"),
        (
            "retry",
            "6.glb",
            64,
            "failed before (time_limit) within 5 s, 1024 MiB, now 60 s, 1024 MiB",
        ),
        ("new", "7.glb", 64, "not yet at resolution 64"),
        ("stale", "8.glb", 64, "shards/lost/sdf-64.parquet is missing"),
        ("relabelled", "9.glb", 64, "other licence"),
        ("new", "10.glb", 64, "not in the catalogue"),
        ("gone", "2.glb", 64, "its place holds other content now"),
        ("gone", "3.glb", 64, "no longer in the source"),
        ("gone", "7.glb", 32, "resolution 32 is not asked for"),
    ]
    text = result.table(examples=1)
    assert "stale              1  conversion 0 -> 1" in text
    assert "4.glb at 64" in text
    retried = plan(rows, assets, {64: RECIPE}, LIMITS, files=FILES, retry_failed=True)
    assert actions(retried)["5.glb@64"] == ("retry", "failed before (crashed)")


def test_plan_takes_over_what_was_staged() -> None:
    staged = {
        (asset_id(1), 64): row(1),
        (asset_id(2), 64): row(2, recipe="conversion=0 engine=sparse views=4x64"),
        (asset_id(3), 64): row(3, status="failed", reason="crashed", shard=None),
        (asset_id(4), 64): row(4, shard="lost"),
        (asset_id(5), 64): row(5, status="failed", reason="time_limit", limits="5 s, 1 MiB"),
    }
    assets = [wanted(n) for n in range(1, 6)]
    result = plan([], assets, {64: RECIPE}, LIMITS, staged=staged, files=FILES)
    assert [e.action for e in result.entries] == ["staged", "new", "staged", "new", "new"]
    retried = plan([], assets, {64: RECIPE}, LIMITS, staged=staged, files=FILES, retry_failed=True)
    assert [e.action for e in retried.entries] == ["staged", "new", "new", "new", "new"]


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.sets(st.sampled_from([64, 128])))
def test_a_plan_carried_out_leaves_nothing_to_do(
    before: set[int], after: set[int], resolutions: set[int]
) -> None:
    recipes = dict.fromkeys(sorted(resolutions), RECIPE)
    rows = {row(n).key: row(n) for n in before}
    result = plan(list(rows.values()), [wanted(n) for n in after], recipes, LIMITS, files=FILES)
    assert len({e.key for e in result.entries}) == len(result.entries)
    for entry in result.entries:
        if entry.action == "gone":
            del rows[entry.key]
        elif entry.action == "new":
            rows[entry.key] = row(int(entry.asset_id, 16), entry.resolution)
    assert {(int(a, 16), r) for a, r in rows} == {(n, r) for n in after for r in resolutions}
    again = plan(list(rows.values()), [wanted(n) for n in after], recipes, LIMITS, files=FILES)
    assert set(again.counts()) <= {"unchanged"}


def test_the_split_is_stable_and_near_its_share() -> None:
    import hashlib

    ids = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(2000)]
    held = {i for i in ids if split_of(i, 0.1) == "test"}
    assert 140 < len(held) < 260
    assert held <= {i for i in ids if split_of(i, 0.2) == "test"}
    assert not [i for i in ids if split_of(i, 0.0) == "test"]
    assert asdict(wanted(1))["split"] == "train"
