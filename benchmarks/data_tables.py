"""The tables of `benchmarks.data`: rows to Markdown."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

ERROR_MEDIAN, ERROR_99 = 0.1, 0.5  # voxels: what is wanted of a mesh's distance to the original
VOXELS_A_SECOND = 40e6  # what the `small` preset's VAE reads on an H200 (benchmarks/README.md)
Row = dict[str, object]
Groups = dict[tuple[str, int], list[Row]]


def distribution(rows: list[Row], key: str, digits: int = 2) -> str:
    """Return median / 95th percentile / worst of a column."""
    values = np.array([row[key] for row in rows if key in row], float)
    if not len(values):
        return ""
    found = (np.median(values), np.percentile(values, 95), values.max())
    return " / ".join(f"{value:.{digits}f}" for value in found)


def middle(rows: list[Row], key: str, digits: int = 3) -> str:
    """Return the median of a column."""
    values = [row[key] for row in rows if key in row]
    return f"{np.median(values):.{digits}f}" if values else ""


def table(head: str, lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table and an empty line; nothing where it has no lines."""
    if not lines:
        return []
    columns = head.count("|") + 1
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [f"| {head} |", "| --- " * columns + "|", *rows, ""]


def tables(rows: list[Row]) -> str:
    """Return the tables of all rows, in Markdown."""
    groups: Groups = defaultdict(list)
    for row in rows:
        groups[str(row["step"]), int(row["resolution"])].append(row)
    groups = dict(sorted(groups.items()))
    done = {
        key: [row for row in found if "rejected" not in row and "failed" not in row]
        for key, found in groups.items()
    }
    lines = [
        *ways(groups, done),
        *quality(done),
        *files(done),
        *precision(done),
        *interpolation(done),
        *preparation(done),
        *at_scale(done),
    ]
    for why in ("rejected", "failed"):
        named = {(str(r["file"]), str(r["step"]), str(r[why])) for r in rows if why in r}
        lines += [f"{why}: {file}, {step}: {text}" for file, step, text in sorted(named)]
    return "\n".join(lines)


def ways(groups: Groups, done: Groups) -> list[str]:
    """Return the ways of conversion side by side."""
    lines = []
    for (step, resolution), found in done.items():
        if step in ("sparse", "dense", "mesh2sdf") and found:
            closed = np.mean([bool(row["closed"]) for row in found])
            lines.append(
                (
                    step,
                    str(resolution),
                    f"{len(found)} of {len(groups[step, resolution])}",
                    distribution(found, "cpu"),
                    distribution(found, "peak_mb", 0),
                    f"{closed:.1%}",
                    middle(found, "f_score_0.001"),
                    middle(found, "chamfer", 5),
                    middle(found, "normal_consistency"),
                )
            )
    head = (
        "way | R | meshes | CPU s median / 95th / worst | peak MB median / 95th / worst | closed "
        "| F(0.001) | Chamfer | normals"
    )
    return table(head, lines)


def missing_parts(found: list[Row]) -> str:
    """Return how many of the visible parts were found, and in how many meshes one was not."""
    counted, parts = (sum(int(r[key]) for r in found) for key in ("parts", "parts_found"))
    meshes = sum(int(r["parts_found"]) < int(r["parts"]) for r in found)
    return f"{parts} of {counted} ({meshes} meshes miss one)"


def over(found: list[Row], key: str, limit: float) -> str:
    """Return median mesh / worst mesh / number of meshes above a limit of a column."""
    values = np.array([row[key] for row in found if key in row], float)
    if not len(values):
        return ""
    return f"{np.median(values):.3f} / {values.max():.2f} / {(values > limit).sum()}"


def quality(done: Groups) -> list[str]:
    """Return what the sparse engine's surfaces are worth."""
    lines = []
    for (step, resolution), found in done.items():
        if step == "sparse" and found:
            lines.append(
                (
                    str(resolution),
                    distribution(found, "marching_cubes"),
                    missing_parts(found),
                    str(sum("error_99" in row for row in found)),
                    over(found, "error_median", ERROR_MEDIAN),
                    over(found, "error_99", ERROR_99),
                    over(found, "seen_99", ERROR_99),
                    f"{sum(int(row['contradictions']) for row in found)} in {len(found)} meshes",
                )
            )
    head = (
        "sparse, R | marching cubes s median / 95th / worst | visible parts found | meshes with "
        "closed parts | their median error, voxels: median mesh / worst / meshes over "
        f"{ERROR_MEDIAN} | 99th percentile: median mesh / worst / meshes over {ERROR_99} "
        "| the same, visible samples only | edges that contradict the surface"
    )
    return table(head, lines)


def files(done: Groups) -> list[str]:
    """Return what storing takes, and reading beside what a training needs."""
    lines = []
    for (step, resolution), found in done.items():
        if step == "sparse" and found:
            speeds = [float(r["blocks"]) * 512 * 2e-6 / float(r["read"]) for r in found]
            needed = VOXELS_A_SECOND * 2e-6
            lines.append(
                (
                    str(resolution),
                    distribution([{"kb": float(r["bytes"]) / 1e3} for r in found], "kb", 0),
                    middle(found, "write"),
                    middle(found, "read"),
                    f"{np.median(speeds):.0f}",
                    f"{needed / np.median(speeds):.2f}",
                )
            )
    head = (
        "sparse, R | KB an asset median / 95th / worst | write s | read s | MB/s of int16 read "
        f"| cores for {VOXELS_A_SECOND / 1e6:.0f} M voxels/s ({VOXELS_A_SECOND * 2e-6:.0f} MB/s)"
    )
    return table(head, lines)


def precision(done: Groups) -> list[str]:
    """Return what fewer bits a value would save and lose."""
    lines = []
    for (step, resolution), found in done.items():
        if step.startswith("bits-") and found:
            lines.append(
                (
                    str(resolution),
                    step.removeprefix("bits-"),
                    str(len(found)),
                    distribution([{"kb": float(r["bytes"]) / 1e3} for r in found], "kb", 0),
                    f"{np.median([r['error_99'] for r in found]):.5f}",
                    f"{max(float(r['error_99']) for r in found):.5f}",
                    f"{np.median([r['normals'] for r in found]):.6f}",
                    f"{min(float(r['normals']) for r in found):.6f}",
                )
            )
    lines.sort(key=lambda cells: (int(cells[0]), int(cells[1])))
    head = (
        "R | bits | meshes | KB an asset median / 95th / worst | 99th percentile of the surface's "
        "shift, voxels: median mesh | worst | normal consistency: median mesh | worst"
    )
    return table(head, lines)


def interpolation(done: Groups) -> list[str]:
    """Return fields interpolated from twice the resolution beside those converted anew."""
    lines = []
    for (step, resolution), found in done.items():
        if step != "interpolated" or not found:
            continue
        names = {row["file"] for row in found}
        anew = [row for row in done.get(("sparse", resolution), []) if row["file"] in names]
        for way, rows in (("interpolated", found), ("converted", anew)):
            if rows:
                open_ones = sum(not row["closed"] for row in rows)
                scores = [float(row["f_score_0.001"]) for row in rows if "f_score_0.001" in row]
                lines.append(
                    (
                        str(resolution),
                        way,
                        str(len(rows)),
                        str(open_ones),
                        f"{np.median(scores):.3f} / {np.mean(scores):.3f}" if scores else "",
                        middle(rows, "normal_consistency"),
                        missing_parts(rows),
                    )
                )
    head = "R | way | meshes | open | F(0.001) median / mean | normals | visible parts found"
    return table(head, lines)


def preparation(done: Groups) -> list[str]:
    """Return what comes before the conversion."""
    lines = []
    for step in ("prepare", "prepare-paper"):
        if found := done.get((step, 0)):
            kb = [{"kb": float(row["bytes"]) / 1e3} for row in found]
            cells = (distribution(found, key) for key in ("parse", "render", "write"))
            lines.append((step, str(len(found)), *cells, distribution(kb, "kb", 0)))
    head = (
        "views (prepare: 24 of 512 px, prepare-paper: 45 of 1024) | meshes | parsing, CPU s median "
        "/ 95th / worst | textured views | encoding and writing mesh and views | their KB"
    )
    return table(head, lines)


def at_scale(done: Groups, assets: int = 10_000_000) -> list[str]:
    """Return means, and what so many assets would take at them."""
    source = [float(r["source_bytes"]) for r in done.get(("prepare", 0), []) if "source_bytes" in r]
    means = [("source files", 0.0, np.mean(source))] if source else []
    for (step, resolution), rows in done.items():
        if step.startswith("prepare"):
            parts = ("parse", "render", "write")
        elif step == "sparse":
            parts = ("cpu", "write")
        else:
            continue
        if rows:
            seconds = np.mean([sum(float(row[part]) for part in parts) for row in rows])
            size = np.mean([float(row["bytes"]) for row in rows])
            name = f"{step} at {resolution}" if resolution else step
            means.append((f"{name}: {' + '.join(parts)}", seconds, size))
    lines = [
        (
            name,
            f"{seconds:.2f}",
            f"{size / 1e6:.2f}",
            f"{seconds * assets / 3600:,.0f}",
            f"{size * assets / 1e12:.1f}",
        )
        for name, seconds, size in means
    ]
    return table(f"mean an asset | CPU s | MB | {assets:,} assets: core-hours | TB", lines)


def worst(rows: list[Row], count: int = 10) -> list[Row]:
    """Return the rows with the lowest F-scores at the highest resolution that has scores."""
    scored = [row for row in rows if row["step"] == "sparse" and "f_score_0.001" in row]
    highest = max((int(row["resolution"]) for row in scored), default=0)
    scored = [row for row in scored if row["resolution"] == highest]
    return sorted(scored, key=lambda row: float(row["f_score_0.001"]))[:count]
