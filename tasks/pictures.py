"""What people look at: contact sheets, slices of an SDF, .glb files, a viewer in one HTML page."""

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between pictures
LABEL = 18  # pixels of a line of text
INSIDE, SURFACE, OUTSIDE = (38, 84, 160), (250, 250, 246), (186, 84, 32)
VIEWER_FACES = 1_000_000  # about 20 MB of HTML; the MLflow UI shows no artifact above 50


def contact_sheet(
    images: Sequence[np.ndarray], columns: int, labels: Sequence[str] = ()
) -> Image.Image:
    """Tile pictures row by row, each under its label.

    images: [H, W] or [H, W, 3 or 4] uint8, any sizes; alpha is laid over a chequered ground, so
    that a mask can be seen. labels: none, or one a picture; cut to the width of a tile.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    if labels and len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(labels)} labels: give one each, or none")
    tiles = [_opaque(image) for image in images]
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles) + (LABEL if labels else 0)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    size = columns * (width + GAP) + GAP, rows * (height + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + GAP)
        if labels:
            text = labels[number]
            while text and draw.textlength(text, font) > width:
                text = text[:-1]
            draw.text((x, y), text, "black", font)
            y += LABEL
        sheet.paste(tile, (x, y))
    return sheet


def _opaque(image: np.ndarray) -> Image.Image:
    """Return image as RGB, transparent parts over a chequered ground."""
    picture = Image.fromarray(np.ascontiguousarray(image, np.uint8))
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    rows, columns = np.indices(image.shape[:2]) // 8
    ground = np.where((rows + columns) % 2, 236, 250).astype(np.uint8)
    under = Image.fromarray(ground).convert("RGBA")
    under.alpha_composite(picture)
    return under.convert("RGB")


def slice_picture(values: np.ndarray, size: int = 256) -> np.ndarray:
    """Colour a slice [X, Y] of sdf / tau as a picture [size, size, 3] uint8, x right and y up.

    Blue inside, white at the surface, red outside, full colour at the edge of the band; a thin
    black line where the sign changes; grey where values are NaN (no block stored there).
    """
    grid = np.flip(np.asarray(values, np.float64).T, 0)
    at = ((np.arange(size) + 0.5) / size * np.array(grid.shape)[:, None]).astype(int)
    grid = grid[np.ix_(at[0], at[1])]
    share = np.abs(np.clip(np.nan_to_num(grid), -1, 1))[..., None]
    ends = np.where((grid < 0)[..., None], INSIDE, OUTSIDE)
    colours = np.asarray(SURFACE) * (1 - share) + ends * share
    inside, known = grid < 0, np.isfinite(grid)
    crossing = np.zeros(grid.shape, bool)
    crossing[1:] |= (inside[1:] != inside[:-1]) & known[1:] & known[:-1]
    crossing[:, 1:] |= (inside[:, 1:] != inside[:, :-1]) & known[:, 1:] & known[:, :-1]
    colours[crossing] = 0
    colours[~known] = 128
    return np.round(colours).astype(np.uint8)


def save_glb(vertices: np.ndarray, faces: np.ndarray, path: Path) -> None:
    """Write a mesh (+y up, outward faces, as everywhere here) as binary glTF in a grey material."""
    import trimesh  # half a second at the start of every worker that writes none

    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[200, 200, 200, 255], metallicFactor=0.0, roughnessFactor=0.7
    )
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    mesh.visual = trimesh.visual.TextureVisuals(material=material)
    path.write_bytes(trimesh.Scene(mesh).export(file_type="glb", include_normals=False))


def viewer_html(meshes: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> str:
    """Return one HTML page that shows meshes in [-1, 1]^3, with a button for each by name.

    Drag to turn, wheel to zoom. Everything is in the page, because the MLflow UI shows artifacts in
    a sandboxed frame, perhaps without a network. Positions are rounded to 16 bits.
    Raises ValueError above VIEWER_FACES faces in all.
    """
    total = sum(len(faces) for _, faces in meshes.values())
    if total > VIEWER_FACES:
        raise ValueError(
            f"{total} faces are more than the {VIEWER_FACES} a page should hold: log the .glb alone"
        )
    packed = []
    for name, (vertices, faces) in meshes.items():
        rounded = np.round((np.clip(vertices, -1, 1) + 1) / 2 * 65535).astype("<u2")
        data = [rounded.tobytes(), np.asarray(faces, "<u4").tobytes()]
        packed.append([name, *(base64.b64encode(zlib.compress(d, 6)).decode() for d in data)])
    # "<" would let a name end the script.
    text = json.dumps(packed).replace("<", "\\u003c")
    return _PAGE.replace("TITLE", html.escape(title)).replace("MESHES", text)


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>TITLE</title>
<style>
  html, body { margin: 0; height: 100%; overflow: hidden; background: #f4f4f2 }
  canvas { width: 100%; height: 100%; display: block; touch-action: none; cursor: grab }
  div { position: fixed; left: 10px; top: 10px; font: 13px sans-serif; color: #333 }
  button { font: inherit; margin-right: 4px } button.on { background: #333; color: #fff }
  p { margin: 6px 0 0 }
</style>
<canvas></canvas>
<div><span></span><p></p></div>
<script>
const meshes = MESHES;
const canvas = document.querySelector("canvas"), note = document.querySelector("p");
const gl = canvas.getContext("webgl2");
if (!gl) note.textContent = "This browser has no WebGL 2; download the .glb beside this file.";

async function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

function shader(type, source) {
  const made = gl.createShader(type);
  gl.shaderSource(made, "#version 300 es\\nprecision highp float;\\n" + source);
  gl.compileShader(made);
  if (!gl.getShaderParameter(made, gl.COMPILE_STATUS)) throw gl.getShaderInfoLog(made);
  return made;
}

let azimuth = 60, elevation = 25, distance = 3.6, shown = null;

function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clearColor(0.957, 0.957, 0.949, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  if (!shown) return;
  const a = azimuth * Math.PI / 180, e = elevation * Math.PI / 180;
  const back = [Math.cos(e) * Math.cos(a), Math.sin(e), Math.cos(e) * Math.sin(a)];
  const right = [Math.sin(a), 0, -Math.cos(a)];
  const up = [back[1] * right[2] - back[2] * right[1], back[2] * right[0] - back[0] * right[2],
              back[0] * right[1] - back[1] * right[0]];
  gl.uniformMatrix3fv(at.camera, false, [right[0], up[0], back[0], right[1], up[1], back[1],
                                         right[2], up[2], back[2]]);
  const aspect = canvas.width / canvas.height, lens = 2.6 * Math.min(1, aspect);
  gl.uniform3f(at.lens, lens / aspect, lens, distance);
  gl.bindVertexArray(shown.array);
  gl.drawElements(gl.TRIANGLES, shown.count, gl.UNSIGNED_INT, 0);
}

async function show(index) {
  const [name, positions, indices] = meshes[index];
  if (!meshes[index].array) {
    // All awaits come first: two quick clicks must not mix their bindings.
    const data = [await unpack(positions, Uint16Array), await unpack(indices, Uint32Array)];
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, data[0], gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.UNSIGNED_SHORT, true, 0, 0);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, data[1], gl.STATIC_DRAW);
    Object.assign(meshes[index], {array, count: data[1].length});
  }
  shown = meshes[index];
  note.textContent = `${document.title}: ${name}, ${(shown.count / 3).toLocaleString()} faces`;
  document.querySelectorAll("button").forEach((b, i) => b.classList.toggle("on", i == index));
  draw();
}

let at;
if (gl) {
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `
    layout(location = 0) in vec3 position;
    uniform mat3 camera;
    uniform vec3 lens;
    out vec3 seen;
    void main() {
      seen = camera * (position * 2.0 - 1.0) - vec3(0, 0, lens.z);
      gl_Position = vec4(seen.xy * lens.xy, -seen.z * 1.002 - 0.02, -seen.z);
    }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
    in vec3 seen;
    out vec4 colour;
    void main() {
      vec3 normal = normalize(cross(dFdx(seen), dFdy(seen)));
      if (dot(normal, seen) > 0.0) normal = -normal;
      float light = 0.33 + 0.12 * normal.z + 0.62 * max(dot(normal, vec3(-0.45, 0.65, 0.61)), 0.0)
                  + 0.22 * max(dot(normal, vec3(0.75, 0.05, 0.66)), 0.0);
      colour = vec4(vec3(0.83, 0.83, 0.80) * min(light, 1.0), 1.0);
    }`));
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  at = {camera: gl.getUniformLocation(program, "camera"),
        lens: gl.getUniformLocation(program, "lens")};
  if (meshes.length > 1) meshes.forEach(([name], i) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.onclick = () => show(i);
    document.querySelector("span").append(button);
  });
  canvas.onpointerdown = event => canvas.setPointerCapture(event.pointerId);
  canvas.onpointermove = event => {
    if (!event.buttons) return;
    azimuth += event.movementX * 0.4;
    elevation = Math.max(-90, Math.min(90, elevation + event.movementY * 0.4));
    draw();
  };
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    distance = Math.max(1.2, Math.min(12, distance * Math.exp(event.deltaY * 0.001)));
    draw();
  }, {passive: false});
  window.onresize = draw;
  if (meshes.length) show(0);
}
</script>
"""
