"""Parametric objects with the defects of real assets, the same for a seed on every machine.

`procedural_mesh(seed)` makes an object of family seed % len(FAMILIES); y is up, the longest side
about 1. Parts overlap; some sheets are open, some parts are turned inside out, some faces stored
twice. Most parts are 0.06 or thicker, three voxels at resolution 64.
"""

from collections.abc import Callable

import numpy as np

from tasks.mesh import Mesh
from tasks.mesh_parts import WHITE

Colour = tuple[int, int, int]
Point = tuple[float, float, float]


def from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """Return the 8-bit RGB of a hue (in turns), a saturation and a value in [0, 1]."""
    wheel = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    rgb = value * (1 - saturation * (1 - np.clip(wheel, 0, 1)))
    r, g, b = (int(c * 255 + 0.5) for c in rgb)
    return r, g, b


class Builder:
    """Collects the parts of one object."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.vertices: list[np.ndarray] = []
        self.faces: list[np.ndarray] = []
        self.colours: list[np.ndarray] = []
        self.count = 0
        self.hue = float(rng.random())

    def between(self, low: float, high: float) -> float:
        """Return a uniform random number."""
        return float(low + (high - low) * self.rng.random())

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return bool(self.rng.random() < probability)

    def colour(self, step: int) -> Colour:
        """Return a colour of the object's palette; neighbouring steps differ in hue and value."""
        hue = self.hue + 0.382 * step + self.between(-0.03, 0.03)
        value = (0.9, 0.55, 0.75)[step % 3]
        return from_hsv(hue % 1, self.between(0.55, 0.9), value)

    def add(self, vertices: np.ndarray, faces: np.ndarray, colour: Colour) -> None:
        """Add a part: vertices [V, 3], faces [F, 3] counterclockwise from outside."""
        self.vertices.append(np.asarray(vertices, np.float64))
        self.faces.append(np.asarray(faces, np.int64) + self.count)
        self.colours.append(np.tile(np.array([*colour, 255], np.uint8), (len(vertices), 1)))
        self.count += len(vertices)

    def box(
        self, centre: Point, size: Point, colour: Colour, turn: np.ndarray | None = None
    ) -> None:
        """Add a box, turned about its centre."""
        corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
        faces = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
        points = corners * size
        if turn is not None:
            points = points @ turn.T
        self.add(points + centre, quads(np.array(faces)), colour)

    def lathe(
        self,
        profile: list[tuple[float, float]],
        colour: Colour,
        centre: Point = (0.0, 0.0, 0.0),
        turn: np.ndarray | None = None,
        sides: int = 32,
    ) -> None:
        """Add a surface of revolution about y: (radius, height) from bottom to top on the outside.

        A profile that starts and ends at radius 0 makes a closed surface, another an open one.
        """
        angle = np.arange(sides) * (2 * np.pi / sides)
        ring = np.stack([np.cos(angle), np.zeros(sides), -np.sin(angle)], 1)
        points = [
            np.array([[0.0, y, 0.0]]) if radius == 0 else ring * radius + [0.0, y, 0.0]
            for radius, y in profile
        ]
        starts = np.cumsum([0, *(len(p) for p in points[:-1])]).tolist()
        step = np.arange(sides)
        after = (step + 1) % sides
        faces = []
        for low, high, (below, _), (above, _) in zip(
            starts[:-1], starts[1:], profile[:-1], profile[1:], strict=True
        ):
            if below > 0:
                top = high + step if above > 0 else np.full(sides, high)
                faces.append(np.stack([low + step, low + after, top], 1))
            if above > 0:
                bottom = low + after if below > 0 else np.full(sides, low)
                faces.append(np.stack([bottom, high + after, high + step], 1))
        vertices = np.concatenate(points)
        if turn is not None:
            vertices = vertices @ turn.T
        self.add(vertices + centre, np.concatenate(faces), colour)

    def rod(self, start: Point, end: Point, radius: float, colour: Colour, **shape: float) -> None:
        """Add a closed cylinder; `tip`: its radius at the end, `sides`: of its section."""
        axis = np.subtract(end, start)
        length = float(np.sqrt((axis**2).sum()))
        y = axis / length
        x = np.cross(y, [1.0, 0, 0] if abs(y[0]) < 0.7 else [0, 0, 1.0])
        x /= np.sqrt((x**2).sum())
        turn = np.stack([x, y, np.cross(x, y)], 1)
        profile = [(0.0, 0.0), (radius, 0.0), (shape.get("tip", radius), length), (0.0, length)]
        self.lathe(profile, colour, start, turn, int(shape.get("sides", 20)))

    def tube(self, path: np.ndarray, radius: float, colour: Colour, closed: bool = False) -> None:
        """Add a round tube along a path [P, 3] in a plane z = const, with its ends capped."""
        ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0)
        if not closed:
            ahead[0], ahead[-1] = path[1] - path[0], path[-1] - path[-2]
        ahead /= np.sqrt((ahead**2).sum(1, keepdims=True))
        side = np.cross(ahead, [0.0, 0.0, 1.0])
        angle = np.arange(12) * (2 * np.pi / 12)
        ring = np.cos(angle)[None, :, None] * side[:, None] + np.sin(angle)[None, :, None] * [
            0,
            0,
            1,
        ]
        vertices = (path[:, None] + radius * ring).reshape(-1, 3)
        rows = np.arange(len(path) * 12).reshape(-1, 12)
        following = np.roll(rows, -1, 0) if closed else rows[1:]
        present = rows if closed else rows[:-1]
        cells = [present, following, np.roll(following, -1, 1), np.roll(present, -1, 1)]
        faces = [quads(np.stack(cells, -1).reshape(-1, 4))]
        if not closed:
            fan = np.stack([np.zeros(10, int), np.arange(1, 11), np.arange(2, 12)], 1)
            faces += [fan, fan[:, ::-1] + rows[-1, 0]]
        self.add(vertices, np.concatenate(faces), colour)

    def plate(
        self,
        outer: np.ndarray,
        inner: np.ndarray,
        depth: float,
        colour: Colour,
        closed: bool = True,
    ) -> None:
        """Add a plate between two outlines [n, 2] in x and y, counterclockwise; depth along z.

        closed: a ring; otherwise an arc, with flat ends.
        """
        n = len(outer)
        flat = np.concatenate([outer, inner])
        back = np.concatenate([flat, np.full((2 * n, 1), -depth / 2)], 1)
        front = np.concatenate([flat, np.full((2 * n, 1), depth / 2)], 1)
        i = np.arange(n if closed else n - 1)
        j = (i + 1) % n
        o, p, top = 0, n, 2 * n
        cells = [
            [top + o + i, top + o + j, top + p + j, top + p + i],
            [o + j, o + i, p + i, p + j],
            [o + i, o + j, top + o + j, top + o + i],
            [p + j, p + i, top + p + i, top + p + j],
        ]
        faces = [quads(np.stack(c, 1)) for c in cells]
        if not closed:
            ends = [[p, o, top + o, top + p], [n - 1, p + n - 1, top + p + n - 1, top + n - 1]]
            faces.append(quads(np.array(ends)))
        self.add(np.concatenate([back, front]), np.concatenate(faces), colour)

    def sheet(self, points: np.ndarray, colour: Colour) -> None:
        """Add an open sheet over a grid of points [h, w, 3]."""
        rows = np.arange(points.shape[0] * points.shape[1]).reshape(points.shape[:2])
        cells = [rows[:-1, :-1], rows[:-1, 1:], rows[1:, 1:], rows[1:, :-1]]
        self.add(points.reshape(-1, 3), quads(np.stack(cells, -1).reshape(-1, 4)), colour)

    def mesh(self) -> Mesh:
        """Join the parts, with a few of real assets' defects."""
        if self.chance(0.15):
            part = int(self.rng.integers(len(self.faces)))
            self.faces[part] = self.faces[part][:, ::-1]
        faces = np.concatenate(self.faces)
        if self.chance(0.2):
            stray = self.rng.integers(len(faces), size=max(1, len(faces) // 50))
            faces[stray] = faces[stray][:, ::-1]
        if self.chance(0.2):
            again = self.rng.integers(len(faces), size=max(1, len(faces) // 50))
            faces = np.concatenate([faces, faces[again]])
        # Rounded: the last bits of sines differ between machines, the identity must not.
        vertices = np.round(np.concatenate(self.vertices), 5).astype(np.float32).astype(np.float64)
        return Mesh(
            vertices=vertices + 0.0,
            faces=faces,
            vertex_colours=np.concatenate(self.colours),
            materials=(WHITE,),
            face_material=np.zeros(len(faces), np.int32),
        )


def quads(cells: np.ndarray) -> np.ndarray:
    """Return two triangles for each of the cells [N, 4]."""
    return np.concatenate([cells[:, [0, 1, 2]], cells[:, [0, 2, 3]]])


def about(axis: int, angle: float) -> np.ndarray:
    """Return the rotation [3, 3] by an angle about x, y or z."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = np.eye(3)
    turn[[i, j], [i, j]] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def circle(radius: float, n: int, start: float = 0.0, end: float = 2 * np.pi) -> np.ndarray:
    """Return n points [n, 2] of a circle, or of an arc with its end."""
    angle = np.linspace(start, end, n, endpoint=end - start < 6.28)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def legs(b: Builder, x: float, z: float, height: float, thick: float, colour: Colour) -> None:
    """Add four square legs that reach a little into what they carry."""
    for sx in (-1, 1):
        for sz in (-1, 1):
            centre = (sx * (x - thick / 2), height / 2 + 0.01, sz * (z - thick / 2))
            b.box(centre, (thick, height + 0.02, thick), colour)


def table(b: Builder) -> None:
    """A rectangular or round table; some carry a cloth, an open sheet."""
    top, leg = b.colour(0), b.colour(1)
    height, x, thick = b.between(0.45, 0.75), 0.5, b.between(0.06, 0.1)
    if b.chance(0.35):
        b.lathe([(0, 0), (0.5, 0), (0.5, thick), (0, thick)], top, (0, height, 0), sides=40)
        b.rod((0, 0, 0), (0, height + 0.02, 0), b.between(0.05, 0.09), leg)
        b.lathe([(0, 0), (0.28, 0), (0.22, 0.07), (0, 0.07)], leg, sides=32)
        return
    z = b.between(0.28, 0.48)
    b.box((0, height + thick / 2, 0), (2 * x, thick, 2 * z), top)
    legs(b, x - 0.02, z - 0.02, height, b.between(0.07, 0.12), leg)
    if b.chance(0.4):
        b.box((0, 0.25 * height, 0), (2 * x - 0.12, 0.06, 2 * z - 0.12), leg)
    if b.chance(0.4):
        width, drop = b.between(0.12, 0.25), b.between(0.1, 0.25)
        z_out, y = z + 0.03, height + thick + 0.03
        line = [(-z_out, y - drop), (-z_out, y), (z_out, y), (z_out, y - drop)]
        grid = [[(side * width, h, d) for side in (-1, 1)] for d, h in line]
        b.sheet(np.array(grid), b.colour(2))


def chair(b: Builder) -> None:
    """A chair with a panel or slats for its back, with arms or without."""
    seat, leg = b.colour(0), b.colour(1)
    x, z, height = b.between(0.22, 0.3), b.between(0.22, 0.28), b.between(0.35, 0.5)
    b.box((0, height + 0.035, 0), (2 * x, 0.07, 2 * z), seat)
    legs(b, x, z, height, b.between(0.06, 0.09), leg)
    back = 1.0 - height
    if b.chance(0.5):
        tilt = about(0, -b.between(0.0, 0.2))
        b.box((0, height + back / 2, -z + 0.03), (2 * x, back, 0.07), b.colour(2), tilt)
    else:
        for side in (-1, 1):
            b.box((side * (x - 0.035), height + back / 2, -z + 0.035), (0.07, back, 0.07), leg)
        slats = int(b.rng.integers(2, 4))
        for i in range(slats):
            y = height + back * (i + 1) / slats - 0.05
            b.box((0, y, -z + 0.035), (2 * x - 0.06, 0.08, 0.06), b.colour(2))
    if b.chance(0.35):
        for side in (-1, 1):
            b.box((side * (x + 0.02), height + 0.25, 0), (0.07, 0.06, 2 * z), b.colour(1))
            b.box((side * (x + 0.02), height + 0.13, z - 0.05), (0.06, 0.25, 0.06), leg)


def stool(b: Builder) -> None:
    """A round stool on splayed legs, with a ring that goes through them."""
    height, n = b.between(0.6, 0.9), int(b.rng.integers(3, 6))
    radius, spread = b.between(0.2, 0.28), b.between(0.24, 0.34)
    seat = [(0, 0), (radius, 0.0), (radius + 0.02, 0.04), (radius, 0.09), (0, 0.1)]
    b.lathe(seat, b.colour(0), (0, height, 0), sides=36)
    leg = b.colour(1)
    for i in range(n):
        c, s = np.cos(2 * np.pi * i / n), np.sin(2 * np.pi * i / n)
        top, foot = (
            (0.6 * radius * c, height + 0.03, 0.6 * radius * s),
            (spread * c, 0.0, spread * s),
        )
        b.rod(foot, top, 0.04, leg)
    middle = spread + (0.6 * radius - spread) * 0.35
    hoop = [(middle + 0.035 * c, 0.35 * height + 0.035 * s) for c, s in circle(1, 12)]
    b.lathe([*hoop, hoop[0]], b.colour(2), sides=36)


def bookcase(b: Builder) -> None:
    """Shelves between two sides, an open sheet for a back, books that touch and stick out."""
    wood, shelves = b.colour(0), int(b.rng.integers(2, 5))
    x, z, thick = b.between(0.28, 0.48), b.between(0.14, 0.2), 0.065
    for side in (-1, 1):
        b.box((side * (x - thick / 2), 0.5, 0), (thick, 1.0, 2 * z), wood)
    gap = (1 - thick) / shelves
    for i in range(shelves + 1):
        b.box((0, thick / 2 + i * gap, 0), (2 * x - 0.02, thick, 2 * z - 0.01), wood)
    grid = [[(-x + 0.01, y, -z + 0.01), (x - 0.01, y, -z + 0.01)] for y in (0.01, 0.99)]
    b.sheet(np.array(grid), b.colour(1))
    for i in range(shelves):
        left = -x + thick
        while left < x - thick - 0.1 and b.chance(0.85):
            width, height = b.between(0.07, 0.12), b.between(0.55, 0.9) * (gap - thick)
            y = thick + i * gap + height / 2 - 0.005
            depth = b.between(1.3, 1.7) * z
            colour = from_hsv(b.between(0, 1), b.between(0.5, 0.9), b.between(0.4, 0.95))
            b.box((left + width / 2, y, 0.02), (width, height, depth), colour)
            left += width


def vase(b: Builder) -> None:
    """A vase with a wall, or as a single open sheet, of a smooth profile."""
    heights = np.linspace(0, 1, 17)
    low, bulge, neck = b.between(0.12, 0.22), b.between(0.25, 0.42), b.between(0.12, 0.24)
    peak = b.between(0.3, 0.55)
    belly = np.exp(-(((heights - peak) / 0.22) ** 2))
    radii = (low + (neck - low) * heights) * (1 - belly) + bulge * belly
    radii += b.between(0.0, 0.08) * np.maximum(heights - 0.85, 0) / 0.15
    outer = list(zip(radii.tolist(), heights.tolist(), strict=True))
    sides = 6 if b.chance(0.2) else 40
    if b.chance(0.3):
        b.lathe([(0, 0), *outer], b.colour(0), sides=sides)
    else:
        inner = [(max(r - 0.07, 0.03), y) for r, y in outer[2:][::-1]]
        b.lathe([(0, 0), *outer, *inner, (0, inner[-1][1])], b.colour(0), sides=sides)
    for at in (4, 11):
        if b.chance(0.6):
            band = [(r + 0.015, y) for r, y in outer[at : at + 3]]
            b.lathe(band, b.colour(1 + at % 3), sides=sides)


def mug(b: Builder) -> None:
    """A mug with its handle pushed through the wall."""
    radius, height, wall = b.between(0.28, 0.4), b.between(0.6, 0.9), 0.07
    foot = radius * b.between(0.75, 1.0)
    body = [(0, 0), (foot, 0), (radius, height), (radius - wall, height), (foot - wall, 0.08)]
    b.lathe([*body, (0, 0.08)], b.colour(0), sides=40)
    size = height * b.between(0.25, 0.33)
    arc = circle(size, 15, -np.pi / 2 - 0.25, np.pi / 2 + 0.25)
    path = np.stack([arc[:, 0] + 0.95 * radius, arc[:, 1] + height / 2, 0 * arc[:, 0]], 1)
    b.tube(path, b.between(0.04, 0.055), b.colour(1))
    if b.chance(0.6):
        lean = (radius - foot) / height
        band = [(foot + lean * y + 0.01, y) for y in (0.35 * height, 0.6 * height)]
        b.lathe(band, b.colour(2), sides=40)


def bottle(b: Builder) -> None:
    """A bottle with a cap over its neck and a label around it, an open sheet."""
    radius, shoulder, neck = b.between(0.16, 0.26), b.between(0.5, 0.65), b.between(0.05, 0.08)
    body = [(0, 0), (radius * 0.93, 0), (radius, 0.04), (radius, shoulder)]
    curve = [
        (neck + (radius - neck) * np.cos(t), shoulder + 0.2 * np.sin(t)) for t in (0.4, 0.8, 1.2)
    ]
    b.lathe([*body, *curve, (neck, 0.75), (neck, 0.92), (0, 0.92)], b.colour(0), sides=36)
    cap = neck + 0.03
    b.lathe([(0, 0.86), (cap, 0.86), (cap, 1.0), (0, 1.0)], b.colour(1), sides=24)
    low = b.between(0.1, 0.2)
    b.lathe([(radius + 0.012, low), (radius + 0.012, low + 0.25)], b.colour(2), sides=36)


def gear(b: Builder) -> None:
    """A gear with a hub that overlaps it, upright."""
    teeth, depth = int(b.rng.integers(8, 17)), b.between(0.1, 0.2)
    root, hole = b.between(0.36, 0.4), b.between(0.08, 0.14)
    outline = np.repeat([root, root, 0.5, 0.5], 2)
    radii = np.tile(outline, teeth)
    n = len(radii)
    ring = circle(1, n)
    b.plate(ring * radii[:, None], ring * hole, depth, b.colour(0))
    hub = hole + b.between(0.07, 0.1)
    b.plate(circle(hub, 32), circle(hole - 0.01, 32), depth + b.between(0.08, 0.2), b.colour(1))
    if b.chance(0.5):
        b.rod((0, 0, -0.3), (0, 0, 0.3), hole + 0.01, b.colour(2))


def wrench(b: Builder) -> None:
    """A wrench: an open jaw, a handle, a ring; or two jaws."""
    colour, depth = b.colour(0), b.between(0.08, 0.12)
    width = b.between(0.1, 0.14)
    b.box((0, 0, 0), (0.66, width, depth * 0.8), b.colour(1))
    for side in (-1, 1):
        jaw, bore = b.between(0.15, 0.19), b.between(0.07, 0.09)
        shift = np.array([side * 0.37, 0.0])
        if side < 0 and b.chance(0.6):
            b.plate(circle(jaw, 32) + shift, circle(bore, 32) + shift, depth, colour)
            continue
        middle, half = (0.0 if side > 0 else np.pi) + b.between(-0.4, 0.4), b.between(0.45, 0.7)
        ends = (middle + half, middle + 2 * np.pi - half)
        b.plate(
            circle(jaw, 25, *ends) + shift, circle(bore, 25, *ends) + shift, depth, colour, False
        )


def hammer(b: Builder) -> None:
    """A hammer with a face, and a claw or a second face."""
    grip, head, steel = b.colour(0), b.colour(1), b.colour(2)
    length, size = b.between(0.75, 0.95), b.between(0.1, 0.15)
    b.rod((0, 0, 0), (0, length + 0.03, 0), b.between(0.045, 0.06), grip, tip=0.04)
    b.rod((0, 0, 0), (0, 0.35 * length, 0), b.between(0.065, 0.08), steel)
    b.box((0, length, 0), (2 * size, 1.1 * size, size), head)
    b.rod((0.5 * size, length, 0), (0.26 + size, length, 0), 0.62 * size, head, tip=0.8 * size)
    if b.chance(0.5):
        for side in (-1, 1):
            turn = about(2, b.between(0.2, 0.45)) @ about(1, side * 0.15)
            b.box((-0.15 - size, length - 0.04, side * 0.045), (0.34, 0.065, 0.065), head, turn)
    else:
        b.rod((-0.5 * size, length, 0), (-0.22 - size, length, 0), 0.6 * size, head, sides=4)


def lamp(b: Builder) -> None:
    """A lamp: its shade is an open sheet, its bulb hangs inside."""
    radius, base = b.between(0.16, 0.26), b.colour(0)
    b.lathe([(0, 0), (radius, 0), (radius, 0.06), (0.05, 0.11), (0, 0.11)], base, sides=32)
    b.rod((0, 0.05, 0), (0, 0.75, 0), b.between(0.033, 0.045), b.colour(1))
    wide = b.between(0.24, 0.34)
    low, sides = b.between(0.5, 0.62), 6 if b.chance(0.3) else 36
    b.lathe([(wide, low), (wide * b.between(0.4, 0.8), 1.0)], b.colour(2), sides=sides)
    turns = [(0.09 * np.sin(t), 0.8 - 0.1 * np.cos(t)) for t in np.linspace(0, np.pi, 9)[1:-1]]
    b.lathe([(0, 0.7), *turns, (0, 0.9)], (255, 240, 170), sides=20)


def bolt(b: Builder) -> None:
    """A bolt with a hexagonal or round head, a thread, and mostly a nut on it."""
    steel, shaft = b.colour(0), b.between(0.1, 0.15)
    head, high = shaft * b.between(1.8, 2.2), b.between(0.12, 0.2)
    sides = 6 if b.chance(0.7) else 32
    b.lathe([(0, 0), (head, 0), (head, high), (0, high)], steel, (0, 1 - high, 0), sides=sides)
    turns = int(b.rng.integers(5, 9))
    thread = [(shaft + 0.03 * (i % 2), 0.6 * i / (2 * turns)) for i in range(2 * turns + 1)]
    b.lathe([(0, 0), *thread, (shaft, 1.0 - high / 2), (0, 1.0 - high / 2)], b.colour(1))
    if b.chance(0.7):
        at, thick = b.between(0.15, 0.5), b.between(0.14, 0.2)
        bore = shaft + 0.01
        nut = [(head, 0), (head, thick), (bore, thick), (bore, 0), (head, 0)]
        b.lathe(nut, b.colour(2), (0, at, 0), about(1, b.between(0, 1)), sides=6)


FAMILIES: tuple[Callable[[Builder], None], ...] = (
    table,
    chair,
    stool,
    bookcase,
    vase,
    mug,
    bottle,
    gear,
    wrench,
    hammer,
    lamp,
    bolt,
)


def procedural_mesh(seed: int) -> Mesh:
    """Return the object of a seed: family seed % len(FAMILIES), coloured by vertex."""
    builder = Builder(np.random.default_rng(seed))
    FAMILIES[seed % len(FAMILIES)](builder)
    return builder.mesh()


def procedural_bytes(seed: int) -> bytes:
    """Return the object of a seed as the file that stands for it: a binary PLY."""
    mesh = procedural_mesh(seed)
    assert mesh.vertex_colours is not None
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(mesh.vertices)}\n"
        + "".join(f"property float {axis}\n" for axis in "xyz")
        + "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "alpha"))
        + f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    vertices = np.empty(len(mesh.vertices), [("position", "<f4", 3), ("colour", "u1", 4)])
    vertices["position"], vertices["colour"] = mesh.vertices, mesh.vertex_colours
    faces = np.empty(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces
    return header.encode() + vertices.tobytes() + faces.tobytes()
