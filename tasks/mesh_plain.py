"""Readers of STL, PLY and OFF: formats of one file and one part."""

import re
import struct
from collections.abc import Iterator
from itertools import chain

import numpy as np

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_parts import GREY, WHITE, Reading, reject_short
from tasks.mesh_polygons import triangulate

PLY_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
PLY_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def read_stl(data: bytes, reading: Reading) -> None:
    """Read an STL; its size, not the word `solid`, tells a binary from a text one."""
    count = struct.unpack_from("<I", data, 80)[0] if len(data) >= 84 else 0
    binary = len(data) == 84 + 50 * count
    if not binary and data.lstrip()[:5].lower() == b"solid" and b"facet" in data[:4096].lower():
        numbers = r"[ \t]+(\S+)[ \t]+(\S+)[ \t]+(\S+)"
        text = data.decode("latin-1")
        corners = re.findall(r"^[ \t]*vertex" + numbers, text, re.MULTILINE | re.IGNORECASE)
        triangles = np.array([[number(t) for t in corner] for corner in corners], np.float64)
        if len(triangles) % 3:
            detail = f"{len(triangles)} vertices are no whole number of triangles"
            raise MeshRejectedError("truncated", detail)
    else:
        if len(data) < 84:
            raise MeshRejectedError("truncated", f"{len(data)} bytes; an STL header takes 84")
        if len(data) < 84 + 50 * count:
            raise reject_short(f"{count} triangles", 84 + 50 * count, len(data))
        if len(data) > 84 + 50 * count:
            rest = len(data) - 84 - 50 * count
            reading.warn("trailing_data", f"{rest} bytes after the {count} declared triangles")
        reading.check_limits(0, count)
        record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("flags", "<u2")])
        triangles = np.frombuffer(data, record, count, 84)["corners"].astype(np.float64)
    triangles = triangles.reshape(-1, 3)
    reading.check_limits(len(triangles), len(triangles) // 3)
    faces = np.arange(len(triangles)).reshape(-1, 3)
    reading.add(triangles, faces, reading.material(GREY))


def number(token: str) -> float:
    """Parse a coordinate; C's spellings of NaN and infinity (`-nan(ind)`, `1.#INF`) are NaN."""
    try:
        return float(token)
    except ValueError:
        if re.search(r"nan|inf|#ind|#qnan", token, re.IGNORECASE):
            return float("nan")
        raise MeshRejectedError("malformed", f"{token[:40]!r} is not a number") from None


def read_off(data: bytes, reading: Reading) -> None:
    """Read an OFF or COFF text file: counts, vertices, polygons."""
    text = re.sub(r"#[^\n]*", "", data.decode("latin-1"))
    match = re.match(r"\s*(ST)?(C)?(N)?OFF\b(\s+BINARY\b)?", text)
    if match is None or match[4]:
        detail = "expected a text file that begins with OFF, COFF, NOFF or STOFF"
        raise MeshRejectedError("wrong_format", detail)
    rows = [row for line in text[match.end() :].splitlines() if (row := line.split())]
    if not rows or len(rows[0]) < 2:
        raise MeshRejectedError("malformed_header", "no line with the counts")
    vertices, faces = int(rows[0][0]), int(rows[0][1])
    if min(vertices, faces) < 0 or vertices + faces > len(rows) - 1:
        # A line of a vertex or a face takes at least 4 characters.
        raise reject_short(
            f"{vertices} vertices and {faces} faces", 4 * (vertices + faces), len(data)
        )
    reading.check_limits(vertices, faces)
    reading.points = vertices
    if faces == 0 or vertices == 0:
        return
    table = [[number(t) for t in row[:3]] for row in rows[1 : vertices + 1]]
    polygons = [[int(t) for t in row[1 : int(row[0]) + 1]] for row in rows[vertices + 1 :][:faces]]
    counts = np.array([len(p) for p in polygons])
    if any(len(v) < 3 for v in table) or any(
        n != int(row[0]) for n, row in zip(counts, rows[vertices + 1 :], strict=False)
    ):
        raise MeshRejectedError("truncated", "a vertex or face line is too short")
    add_polygons(reading, np.array(table), np.fromiter(chain(*polygons), np.int64), counts, GREY)


def add_polygons(
    reading: Reading,
    positions: np.ndarray,
    corners: np.ndarray,
    counts: np.ndarray,
    material: Material,
    uv: np.ndarray | None = None,
    colours: np.ndarray | None = None,
    face_colours: np.ndarray | None = None,
) -> None:
    """Add polygons: corners [C] are rows of positions; uv [C, 2] lies on corners.

    colours [V, 4] lie on positions, face_colours [P, 4] on polygons; uint8.
    """
    if len(corners) and (corners.min() < 0 or corners.max() >= len(positions)):
        detail = f"faces use vertices {corners.min()} to {corners.max()} of {len(positions)}"
        raise MeshRejectedError("index_out_of_range", detail)
    triangles, polygon = triangulate(positions[corners], counts)
    index = corners[triangles]
    colour_pair = None
    if colours is not None:
        colour_pair = (colours, index)
    elif face_colours is not None:
        colour_pair = (face_colours, np.repeat(polygon[:, None], 3, 1))
    reading.add_corners(
        positions,
        index,
        reading.material(material),
        None if uv is None else (uv, triangles),
        colour_pair,
    )


def ply_header(data: bytes) -> tuple[str, list[tuple[str, int, list]], str | None, int]:
    """Return byte order, elements (name, count, properties), texture file, length of the header.

    A property is (name, type) or (name, type of the count, type). Raises `malformed_header`.
    """
    end = re.search(rb"^end_header[ \t]*\r?\n", data[: 1 << 16], re.MULTILINE)
    if end is None:
        raise MeshRejectedError("malformed_header", "no end_header in the first 64 KiB")
    order, texture = None, None
    elements: list[tuple[str, int, list]] = []
    try:
        for line in data[: end.start()].decode("latin-1").splitlines()[1:]:
            match line.split():
                case ["format", name, _]:
                    order = PLY_FORMATS[name]
                case ["element", name, count]:
                    elements.append((name, int(count), []))
                case ["property", "list", count_type, value_type, name]:
                    elements[-1][2].append((name, PLY_TYPES[count_type], PLY_TYPES[value_type]))
                case ["property", value_type, name]:
                    elements[-1][2].append((name, PLY_TYPES[value_type]))
                case ["comment", "TextureFile", *name]:
                    texture = " ".join(name)
                case ["comment" | "obj_info", *_] | []:
                    pass
                case _:
                    raise ValueError(line)
    except (KeyError, ValueError, IndexError) as error:
        raise MeshRejectedError("malformed_header", f"line not understood: {error}") from error
    if order is None or any(count < 0 for _, count, _ in elements):
        raise MeshRejectedError("malformed_header", "no format line, or a negative count")
    return order, elements, texture, end.end()


def read_ply(data: bytes, reading: Reading) -> None:
    """Read a PLY, text or binary: vertices and faces with their colours and texture."""
    order, elements, texture, position = ply_header(data)
    for name, count, properties in elements:
        smallest = sum(np.dtype(p[1]).itemsize if order else 2 for p in properties)
        if count * max(smallest, 1) > len(data) - position:
            what = f"{count} elements {name!r}"
            raise reject_short(what, count * max(smallest, 1), len(data) - position)
    tokens = iter(data[position:].split()) if not order else iter(())
    tables: dict[str, dict] = {}
    for name, count, properties in elements:
        if order:
            tables[name], position = ply_binary(data, position, order, count, properties)
        else:
            tables[name] = ply_text(tokens, count, properties)
    vertex, face = tables.get("vertex", {}), tables.get("face", {})
    if not {"x", "y", "z"} <= set(vertex):
        raise MeshRejectedError("no_geometry", "no vertex element with x, y, z")
    if "tristrips" in tables:
        raise MeshRejectedError("unsupported_feature", "triangle strips in a PLY; store faces")
    positions = np.stack([vertex[axis].astype(np.float64) for axis in "xyz"], 1)
    reading.points = len(positions)
    corners, counts = face.get("vertex_indices", face.get("vertex_index", (None, np.zeros(0))))
    if len(counts) == 0:
        return
    colours, face_colours = ply_colours(vertex), ply_colours(face)
    picture = reading.texture(texture) if texture else None
    uv = None
    if picture is not None and "texcoord" in face:
        values, sizes = face["texcoord"]
        uv = values.reshape(-1, 2) if np.array_equal(sizes, 2 * counts) else None
    elif picture is not None:
        pairs = (("u", "v"), ("s", "t"), ("texture_u", "texture_v"))
        for u, v in pairs:
            if u in vertex and v in vertex:
                uv = np.stack([vertex[u], vertex[v]], 1)[corners]
    material = GREY if colours is None and face_colours is None else WHITE
    if uv is not None:
        material, colours, face_colours = Material(WHITE.colour, picture), None, None
    add_polygons(
        reading, positions, corners.astype(np.int64), counts, material, uv, colours, face_colours
    )


def ply_colours(table: dict) -> np.ndarray | None:
    """Return colours [N, 4] uint8 of an element, or None."""
    if not {"red", "green", "blue"} <= set(table):
        return None
    channels = [table[c] for c in ("red", "green", "blue")]
    channels.append(table.get("alpha", np.full(len(channels[0]), 255, np.uint8)))
    if channels[0].dtype.kind == "f":
        channels = [c * 255 if c.dtype.kind == "f" else c for c in channels]
    return np.stack([np.clip(c, 0, 255) for c in channels], 1).astype(np.uint8)


def ply_binary(
    data: bytes, position: int, order: str, count: int, properties: list
) -> tuple[dict, int]:
    """Return a binary element's columns and where it ends; a list column is (values, sizes)."""
    lists = [p for p in properties if len(p) == 3]
    # Nearly always every face has the same number of corners: read it as one table, then check.
    sizes, at = {}, position
    for p in properties if count else []:
        if at + np.dtype(p[1]).itemsize > len(data):
            raise reject_short("the first element's properties", at + 1, len(data))
        width = np.dtype(p[1]).itemsize
        if len(p) == 3:
            sizes[p[0]] = int(np.frombuffer(data, order + p[1], 1, at)[0])
            width += sizes[p[0]] * np.dtype(p[2]).itemsize
        at += width
    if any(n < 0 or n > len(data) for n in sizes.values()):
        raise MeshRejectedError("malformed", f"lists of {sizes} items")
    fields: list[tuple] = []
    for i, p in enumerate(properties):
        if len(p) == 2:
            fields.append((f"{i}", order + p[1]))
        else:
            fields += [(f"{i}n", order + p[1]), (f"{i}", order + p[2], (sizes.get(p[0], 0),))]
    record = np.dtype(fields)
    end = position + count * record.itemsize
    if end <= len(data):
        table = np.frombuffer(data, record, count, position)
        if all((table[f"{properties.index(p)}n"] == sizes.get(p[0], 0)).all() for p in lists):
            columns = {
                p[0]: table[f"{i}"]
                if len(p) == 2
                else (table[f"{i}"].reshape(-1), np.full(count, sizes.get(p[0], 0)))
                for i, p in enumerate(properties)
            }
            return columns, end
    if not lists:
        raise reject_short(f"{count} elements", end - position, len(data) - position)
    return ply_ragged(data, position, order, count, properties)


def ply_ragged(
    data: bytes, position: int, order: str, count: int, properties: list
) -> tuple[dict, int]:
    """Return what `ply_binary` does, row by row, for lists of different lengths."""
    scalar = {p: struct.Struct((order) + STRUCT[p[1]]) for p in properties}
    columns: list[list] = [[] for _ in properties]
    lengths: list[list[int]] = [[] for _ in properties]
    for row in range(count):
        for i, p in enumerate(properties):
            try:
                (value,) = scalar[p].unpack_from(data, position)
                position += scalar[p].size
                if len(p) == 2:
                    columns[i].append(value)
                else:
                    items = struct.unpack_from(
                        f"{order}{max(value, 0)}{STRUCT[p[2]]}", data, position
                    )
                    position += len(items) * np.dtype(p[2]).itemsize
                    columns[i].extend(items)
                    lengths[i].append(len(items))
            except struct.error:
                detail = f"the data ends in element {row} of {count}"
                raise MeshRejectedError("truncated", detail) from None
    return ply_columns(properties, columns, lengths), position


STRUCT = dict(zip(("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"), "bBhHiIfd", strict=True))


def ply_text(tokens: Iterator[bytes], count: int, properties: list) -> dict:
    """Return a text element's columns, taken from an iterator of words."""
    columns: list[list] = [[] for _ in properties]
    lengths: list[list[int]] = [[] for _ in properties]
    for row in range(count):
        for i, p in enumerate(properties):
            try:
                word = next(tokens)
                if len(p) == 2:
                    columns[i].append(number(word.decode("latin-1")))
                    continue
                lengths[i].append(int(word))
                columns[i].extend(number(next(tokens).decode("latin-1")) for _ in range(int(word)))
            except (StopIteration, RuntimeError):
                detail = f"the text ends in element {row} of {count}"
                raise MeshRejectedError("truncated", detail) from None
    return ply_columns(properties, columns, lengths)


def ply_columns(properties: list, columns: list[list], lengths: list[list[int]]) -> dict:
    """Return columns as arrays of their declared types; a list column is (values, sizes)."""
    return {
        p[0]: np.array(column, p[1])
        if len(p) == 2
        else (np.array(column, p[2]), np.array(sizes, np.int64))
        for p, column, sizes in zip(properties, columns, lengths, strict=True)
    }
