"""Reader of Wavefront OBJ with its MTL materials.

The file is split into lines once; lines of one kind are then parsed together.
"""

import re
from itertools import chain

import numpy as np

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_parts import GREY, WHITE, Reading
from tasks.mesh_plain import number
from tasks.mesh_polygons import triangulate

# Options of a texture line and how many words follow each at most (-o, -s, -t take one to three).
MAP_OPTIONS = {
    **dict.fromkeys(("-blendu", "-blendv", "-cc", "-clamp", "-bm", "-boost", "-texres"), 1),
    **dict.fromkeys(("-imfchan", "-type"), 1),
    "-mm": 2,
    **dict.fromkeys(("-o", "-s", "-t"), 3),
}


def text_lines(data: bytes) -> list[str]:
    """Return lines without blanks before them, tabs as blanks, continued lines joined."""
    text = data.decode("utf-8", errors="replace").replace("\t", " ")
    if "\\" in text:
        text = re.sub(r"\\[ ]*\r?\n", " ", text)
    if re.search(r"^ ", text, re.MULTILINE):
        text = re.sub(r"^ +", "", text, flags=re.MULTILINE)
    return text.splitlines()


def obj_references(data: bytes) -> list[str]:
    """Return the material libraries that an OBJ names, in order, each once."""
    found = re.findall(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", data, re.MULTILINE)
    return list(dict.fromkeys(name.decode("utf-8", errors="replace").strip() for name in found))


def mtl_textures(data: bytes) -> list[str]:
    """Return all pictures that an MTL names, in order, each once."""
    lines = [line.split(None, 1) for line in text_lines(data)]
    maps = [w[1] for w in lines if len(w) == 2 and re.match(r"map_|bump|disp|norm", w[0].lower())]
    return list(dict.fromkeys(map_path(words) for words in maps))


def map_path(words: str) -> str:
    """Return the path of a texture line, which may hold blanks, without its options."""
    rest = words.split(" ")
    while len(rest) > 1 and rest[0] in MAP_OPTIONS:
        option, rest = rest[0], rest[1:]
        for taken in range(MAP_OPTIONS[option]):
            if taken and not re.fullmatch(r"[-+.\deE]+", rest[0]):
                break
            rest = rest[1:] or rest
    return " ".join(rest).strip()


def read_mtl(data: bytes, reading: Reading) -> dict[str, Material]:
    """Return materials by name: Kd (taken as sRGB, as tools do), map_Kd, d or Tr."""
    settings: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text_lines(data):
        words = line.split(None, 1)
        if len(words) == 2 and words[0] == "newmtl":
            current = settings.setdefault(words[1], {})
        elif len(words) == 2:
            current[words[0].lower()] = words[1]
    materials = {}
    for name, values in settings.items():
        texture = None
        if "map_kd" in values:
            texture = reading.texture(map_path(values["map_kd"]))
        colour = [number(t) for t in values.get("kd", "").split()[:3]] or [0.8, 0.8, 0.8]
        if len(colour) != 3 or not np.isfinite(colour).all():
            reading.warn("broken_material_reference", f"Kd of {name!r}: {values['kd']!r}")
            colour = [0.8, 0.8, 0.8]
        if texture is not None and max(colour) == 0:
            colour = [1.0, 1.0, 1.0]  # 3ds Max writes a black Kd beside a texture
        alpha = 1.0
        if "d" in values:
            alpha = number(values["d"].split()[-1])
        elif "tr" in values:
            alpha = 1 - number(values["tr"].split()[-1])
        # Fully transparent is an exporter's mix-up of d and Tr far more often than a wish.
        alpha = alpha if 0 < alpha <= 1 else 1.0
        r, g, b = (min(max(c, 0.0), 1.0) for c in colour)
        materials[name] = Material((r, g, b, alpha), texture)
    return materials


def face_numbers(rows: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return corners of each `f` line [F], their vertex [C] and texture [C] numbers, 0 for none.

    Lines of one shape, nearly always all of them, are parsed as a table, others word by word.
    """
    text = "\n".join(rows)
    if "  " in text or " \n" in text or text.endswith(" "):
        rows = re.sub(r" +(?=\n|$)", "", re.sub(r" {2,}", " ", text)).split("\n")
    # One blank before each word: a line's blanks are its corners.
    blanks = np.fromiter((row.count(" ") for row in rows), np.int64, len(rows))
    counts = np.zeros(len(rows), np.int64)
    found = {}
    for shape in np.unique(blanks):
        where = np.flatnonzero(blanks == shape)
        found[shape] = face_table([rows[i] for i in where], int(shape))
        counts[where] = found[shape][0]
    starts = np.cumsum(counts) - counts
    vertex, texture = np.zeros((2, counts.sum()), np.int64)
    for shape, (sizes, vertices, textures) in found.items():
        first = np.repeat(starts[blanks == shape] - (np.cumsum(sizes) - sizes), sizes)
        at = first + np.arange(len(vertices))
        vertex[at], texture[at] = vertices, textures
    return counts, vertex, texture


def face_table(rows: list[str], corners: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `face_numbers` does for lines of so many words after the `f`."""
    total = corners * len(rows)
    text = "\n".join(rows)
    slashes, doubled = text.count("/"), text.count("//")
    # a, a/b, a//c, a/b/c: numbers of a corner, and which of them is the texture's
    style = {(0, 0): (1, 0), (1, 0): (2, 1), (2, 1): (2, 0), (2, 0): (3, 1)}
    per, at = style.get((slashes // max(total, 1), doubled // max(total, 1)), (0, 0))
    if per and corners > 0 and slashes % total == doubled % total == 0:
        flat = text.replace("//", " ").replace("/", " ").splitlines()
        try:
            table = np.loadtxt(flat, np.int64, usecols=range(1, per * corners + 1), ndmin=2)
        except (ValueError, IndexError):
            pass
        else:
            table = table.reshape(-1, per)
            texture = table[:, at] if at else np.zeros(total, np.int64)
            return np.full(len(rows), corners), table[:, 0], texture
    words = [row.split("#")[0].split()[1:] for row in rows]
    parts = [word.split("/") for word in chain.from_iterable(words)]
    try:
        vertex = np.array([int(p[0]) for p in parts], np.int64)
        texture = np.array([int(p[1]) if len(p) > 1 and p[1] else 0 for p in parts], np.int64)
    except (ValueError, OverflowError) as error:
        raise MeshRejectedError("malformed", f"a face: {error}") from error
    return np.array([len(w) for w in words], np.int64), vertex, texture


def obj_index(index: np.ndarray, total: int, before: np.ndarray, what: str) -> np.ndarray:
    """Return 0-based indices of 1-based or (negative) relative ones.

    before: how many elements stood before each corner; total: how many there are in all.
    """
    wrong = (index == 0) | (index > total) | (index < -before)
    if wrong.any():
        detail = f"{what} index {index[wrong][0]} of {total} (OBJ counts from 1)"
        raise MeshRejectedError("index_out_of_range", detail)
    return np.where(index > 0, index - 1, index + before)


def float_table(rows: list[str], columns: int) -> np.ndarray:
    """Return the first columns [N, columns] of lines `keyword x y z ...`."""
    try:
        return np.loadtxt(rows, np.float64, comments=None, usecols=range(1, columns + 1), ndmin=2)
    except (ValueError, IndexError):
        table = [[number(t) for t in row.split()[1 : columns + 1]] for row in rows]
        if any(len(row) != columns for row in table):
            detail = f"a {rows[0].split()[0]} line has fewer than {columns} numbers"
            raise MeshRejectedError("malformed", detail) from None
        return np.array(table)


def read_obj(data: bytes, reading: Reading) -> None:
    """Read an OBJ: polygons, texture coordinates, materials, vertex colours."""
    lines = text_lines(data)
    keyword = np.array([line[:2] for line in lines], dtype="U2")
    is_vertex, is_uv = keyword == "v ", keyword == "vt"
    vertex_rows = [lines[i] for i in np.flatnonzero(is_vertex)]
    reading.points = len(vertex_rows)
    face_lines = np.flatnonzero(keyword == "f ")
    if len(face_lines) == 0 or not vertex_rows:
        if len(face_lines):
            raise MeshRejectedError("index_out_of_range", "faces but no vertices")
        return
    reading.check_limits(len(vertex_rows), len(face_lines))

    counts, corners, textures = face_numbers([lines[i] for i in face_lines])
    line_of_corner = np.repeat(face_lines, counts)
    before = np.cumsum(is_vertex)[line_of_corner]
    index = obj_index(corners, len(vertex_rows), before, "vertex")
    table = float_table(vertex_rows, 3)
    triangles, polygon = triangulate(table[index], counts)

    materials = obj_materials(lines, keyword, reading)
    textured = any(reading.materials[m].texture is not None for m in set(materials[1]))
    uv = None
    if textured and is_uv.any() and textures.all():
        uv_table = float_table([lines[i] for i in np.flatnonzero(is_uv)], 2)
        before = np.cumsum(is_uv)[line_of_corner]
        try:
            uv_index = obj_index(textures, len(uv_table), before, "texture")
            uv = (uv_table, uv_index[triangles])
        except MeshRejectedError as error:
            reading.warn("broken_texture", error.detail)
    elif textured:
        reading.warn("broken_texture", "a texture, but faces without texture coordinates")

    face_material = materials[1][np.searchsorted(materials[0], face_lines, side="right")]
    colours = obj_colours(vertex_rows)
    if colours is not None:
        # Colours on the vertices stand in for the material: files have one or the other.
        face_material = np.full(len(face_lines), reading.material(WHITE), np.int32)
    reading.add_corners(
        table,
        index[triangles],
        face_material[polygon],
        uv,
        None if colours is None else (colours, index[triangles]),
    )


def obj_colours(rows: list[str]) -> np.ndarray | None:
    """Return colours [V, 4] uint8 of lines `v x y z r g b`, or None unless all lines have them."""
    if len(rows[0].split()) < 7 or any(len(row.split()) < 7 for row in rows):
        return None
    colours = np.loadtxt(rows, np.float64, comments=None, usecols=(4, 5, 6), ndmin=2)
    if not np.isfinite(colours).all():
        return None
    scale = 255 if colours.max() <= 1 else 1
    rgb = np.clip(colours * scale + 0.5, 0, 255).astype(np.uint8)
    return np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], 1)


def obj_materials(
    lines: list[str], keyword: np.ndarray, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines of `usemtl` [U] and the material in use from each: [U + 1], 0 before."""
    library: dict[str, Material] = {}
    for i in np.flatnonzero(keyword == "mt"):
        name = lines[i].partition(" ")[2].strip()
        if lines[i].startswith("mtllib ") and name:
            try:
                library |= read_mtl(reading.reference(name, "missing_material"), reading)
            except MeshRejectedError as error:
                reading.warn("missing_material", f"{error.reason}, {error.detail}")
    default = reading.material(GREY)
    at, use, index = [], [default], {}
    for i in np.flatnonzero(keyword == "us"):
        if lines[i].startswith("usemtl"):
            name = lines[i][6:].strip()
            if name not in index:
                if name not in library and name:
                    reading.warn("missing_material", f"material {name!r} is not defined")
                index[name] = reading.material(library[name]) if name in library else default
            at.append(i)
            use.append(index[name])
    return np.array(at, np.int64), np.array(use, np.int32)
