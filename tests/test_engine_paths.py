"""The two paths of the sparse engine agree: compiled (the specification), and torch with Triton.

Without a GPU the torch path runs on the CPU, and the kernels alone in Triton's interpreter.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import igl
import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from test_conversion import SOLIDS, plain, turned
from test_engine_properties import soups

from kernels.components import block_labels_torch, block_labels_triton, graph_components
from kernels.distance import closest_triangles_torch, closest_triangles_triton, triangle_records
from kernels.feet import best_feet_torch, best_feet_triton, foot_cells_torch, foot_cells_triton
from kernels.winding import sums_by_torch, sums_by_triton, winding_numbers
from model.marching_cubes import marching_cubes
from tasks import torch_shell
from tasks.conversion import closed_and_oriented, convert
from tasks.mesh import MeshRejectedError, normalise
from tasks.mesh_io import read_mesh
from tasks.procedural import FAMILIES, procedural_mesh
from tasks.sign import oriented_patches
from tasks.sign import winding_numbers as compiled_winding_numbers
from tasks.sparse_engine import sparse_field
from tasks.sparse_engine_torch import sparse_field as sparse_field_torch
from tasks.torch_distance import block_pairs
from tasks.torch_masks import grid_of
from tasks.torch_topology import closed_and_oriented as closed_and_oriented_torch
from tasks.torch_topology import oriented_patches as oriented_patches_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEV = Path(os.environ.get("GIGASHAPE_SHARED", "/nowhere")) / "meshes/dev"
# A plate and a wire under a voxel, an open sheet through a ball, a ball with a hole, a hidden box.
BALL = trimesh.creation.icosphere(3, radius=0.4).apply_translation([0.4, 0.4, 0.4])
PUNCTURED = trimesh.creation.icosphere(4, radius=0.9)
SCENES = {
    "plate and wire": trimesh.util.concatenate(
        [
            trimesh.creation.box((1.5, 1.5, 0.01)).apply_translation([0, 0, -0.5]),
            turned(trimesh.creation.cylinder(0.005, 1.5, sections=8), (1.1, 0.3, 0)),
            BALL,
        ]
    ),
    "sheet through a ball": trimesh.util.concatenate(
        [
            BALL,
            trimesh.Trimesh([[-0.9, -0.9, 0.45], [0.9, -0.9, 0.45], [0.9, 0.9, 0.41]], [[0, 1, 2]]),
        ]
    ),
    "ball with a hole, a box in it": trimesh.util.concatenate(
        [
            trimesh.Trimesh(PUNCTURED.vertices, PUNCTURED.faces[1:]),
            turned(trimesh.creation.box((0.5, 0.5, 0.5)), (0.3, 0.5, 0.7)),
        ]
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small arrays: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_paths_agree(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> None:
    """Values to a float32's rounding (measured: no difference, on CPUs); all else exactly."""
    expected = sparse_field(vertices, faces, resolution)
    found = sparse_field_torch(vertices, faces, resolution, DEVICE).on_host()
    np.testing.assert_array_equal(found.sdf.blocks, expected.sdf.blocks)
    np.testing.assert_allclose(found.sdf.values, expected.sdf.values, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.sdf.values < 0, expected.sdf.values < 0)
    np.testing.assert_array_equal(found.sdf.sharp, expected.sdf.sharp)
    assert found.sdf.blocks.dtype == np.int32
    assert found.sdf.values.dtype == np.float32
    assert (found.parts_in, found.parts_out) == (expected.parts_in, expected.parts_out)
    assert (found.method, found.thin_voxels) == (expected.method, expected.thin_voxels)
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-9)


@pytest.mark.parametrize("name", SOLIDS)
def test_paths_agree_on_solids(name: str) -> None:
    assert_paths_agree(*plain(SOLIDS[name]), 56)


@pytest.mark.parametrize("name", SCENES)
def test_paths_agree_on_shells_holes_and_hidden_walls(name: str) -> None:
    vertices, faces = plain(SCENES[name])
    result = sparse_field(vertices, faces, 64)
    assert (result.method == "flood+winding") == ("hole" in name)
    assert (result.thin_voxels > 0) == ("hole" not in name)
    assert_paths_agree(vertices, faces, 64)


@pytest.mark.parametrize("seed", range(len(FAMILIES)))
def test_paths_agree_on_procedural_objects(seed: int) -> None:
    mesh = procedural_mesh(seed)
    assert_paths_agree(normalise(mesh.vertices), mesh.faces, 64)


@settings(max_examples=20, deadline=None)
@given(soups(), st.sampled_from([32, 48]))
def test_paths_agree_on_soups(soup: tuple[np.ndarray, np.ndarray, int], resolution: int) -> None:
    assert_paths_agree(*soup[:2], resolution)


@pytest.mark.skipif(not DEV.exists(), reason="needs the shared meshes")
@pytest.mark.parametrize(
    ("file", "resolution"),
    [
        ("KenneyNL__Starter-Kit-City-Builder/building-small-c/building-small-c.glb", 128),
        ("ChenEating716__pybullet-URDF-models/scissors__visual.ply", 128),
        ("deepmind__mujoco_menagerie/shadow_hand__palm.obj", 64),
    ],
)
def test_paths_agree_on_meshes_of_artists(file: str, resolution: int) -> None:
    mesh = read_mesh(DEV / file, DEV)
    assert_paths_agree(normalise(mesh.vertices), mesh.faces, resolution)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*SOLIDS, *SCENES])
def test_convert_on_a_gpu(name: str) -> None:
    vertices, faces = plain((SOLIDS | SCENES)[name])
    assert_paths_agree(vertices, faces, 256)
    one, two = (convert(vertices, faces, 256, device=device) for device in ("cuda", "cpu"))
    assert (one.device, two.device) == ("cuda", "cpu")
    assert one.closed
    assert one.warnings == two.warnings
    again = convert(vertices, faces, 256, device="cuda")
    np.testing.assert_array_equal(one.sdf.values, again.sdf.values)


def test_torch_path_refuses_what_has_no_area() -> None:
    vertices, _ = plain(SOLIDS["box"])
    with pytest.raises(MeshRejectedError, match="degenerate"):
        sparse_field_torch(vertices, np.array([[0, 0, 1]]), 64, DEVICE)


def test_closest_triangles_by_triton_are_those_of_the_twin() -> None:
    """Bit for bit, whichever of two equally near triangles there are; blocks without any too."""
    vertices, faces = plain(SOLIDS["torus"])
    corners = torch.from_numpy(((vertices + 1) * 16 - 0.5)[faces]).to(DEVICE)
    keys, starts, triangles = block_pairs(corners.view(-1, 9).T.contiguous(), 4, 3.0)
    records = triangle_records(corners)
    blocks = grid_of(keys, 4).blocks[:3]
    starts = torch.cat([starts[:3], starts[2:3]])  # the last of them has no candidate
    expected = closest_triangles_torch(records, blocks, starts, triangles, 3.0)
    found = closest_triangles_triton(records, blocks, starts, triangles, 3.0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    assert (found[1][:2] >= 0).any()
    assert (found[1][2] == -1).all()
    none = closest_triangles_triton(records, blocks[:0], starts[:1], triangles, 3.0)
    assert none[0].shape == (0, 8, 8, 8)


def test_feet_by_triton_are_those_of_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on what a conversion asks for: hidden walls, and a plate under a voxel."""
    few = 128 if DEVICE == "cpu" else 1_000_000
    layers, seen = [], []

    def check_best(*args: Any) -> None:
        *before, ids, feet, nearest, distance, reach = args
        some = ids[:: max(1, len(ids) // few)][:few]
        found = [part.clone() for part in (feet, nearest, distance)]
        if len(layers) < 4:
            best_feet_triton(*before, some, *found, reach)
        best_feet_torch(*args)
        if len(layers) < 4:
            work = before[-1]
            at = work[some >> 9] << 9 | (some & 511)
            torch.testing.assert_close(found[0][at], feet[at], rtol=0, atol=0)
            for one, two in ((found[1], nearest), (found[2], distance)):
                one, two = one.view(-1)[some], two.view(-1)[some]
                torch.testing.assert_close(one, two, rtol=0, atol=0)
        layers.append(len(ids))

    def check_cells(*args: Any) -> torch.Tensor:
        *grid, ids, triangles = args
        cells = foot_cells_torch(*args)
        found = foot_cells_triton(*grid, ids[:few], triangles[:few])
        torch.testing.assert_close(found, cells[:few], rtol=0, atol=0)
        seen.append(len(ids))
        return cells

    monkeypatch.setattr(torch_shell, "best_feet", check_best)
    monkeypatch.setattr(torch_shell, "foot_cells", check_cells)
    sparse_field_torch(*plain(SCENES["ball with a hole, a box in it"]), 32, DEVICE)
    assert len(layers) >= 4
    sparse_field_torch(*plain(SCENES["plate and wire"]), 32, DEVICE)
    assert sum(seen) > 1000


def test_winding_numbers_are_those_of_the_compiled_path() -> None:
    """Of a soup of many patches, with turned triangles: to the rounding of the sums' quantum."""
    rng = np.random.default_rng(0)
    corners, points = rng.normal(size=(300, 3, 3)), rng.normal(size=(21, 3))
    patches = rng.permutation(np.concatenate([np.zeros(200, int), rng.integers(0, 9, 100)]))
    turns = np.where(rng.random(300) < 0.5, -1.0, 1.0)
    columns = torch.from_numpy(corners).view(-1, 9).T.contiguous()
    given = [
        part.to(DEVICE) for part in (columns, *map(torch.from_numpy, (patches, turns, points)))
    ]
    expected = compiled_winding_numbers(corners, patches, turns, points)
    for found, truth in zip(winding_numbers(*given), expected, strict=True):
        assert np.abs(found.cpu().numpy() - truth).max() < 2e-11  # measured 4e-12
    order = given[1].argsort(stable=True)
    ordered = given[0][:, order].contiguous(), given[1][order], given[2][order], given[3]
    for one, two in zip(sums_by_torch(*ordered, 9), sums_by_triton(*ordered, 9), strict=True):
        assert (one - two).abs().max() <= 300  # quanta; measured none


@pytest.mark.parametrize("density", [0.35, 0.9])
def test_block_labels_name_components(density: float) -> None:
    """Of random sets, against SciPy without walls, and kernel against twin with them."""
    generator = torch.Generator().manual_seed(3)
    allowed = torch.rand((3, 8, 8, 8), generator=generator) < density
    allowed[2] = False
    allowed = allowed.to(DEVICE)
    open_ = torch.zeros((3, *allowed.shape), dtype=torch.bool, device=DEVICE)
    labels = block_labels_torch(allowed, open_)
    for found, members in zip(labels.cpu().numpy(), allowed.cpu().numpy(), strict=True):
        truth, count = ndimage.label(members)
        firsts = [np.flatnonzero(truth.reshape(-1) == n + 1)[0] for n in range(count)]
        expected = np.array([512, *firsts])[truth]
        np.testing.assert_array_equal(found, expected)
    torch.testing.assert_close(block_labels_triton(allowed, open_), labels)
    walls = (torch.rand(open_.shape, generator=generator) < 0.3).to(DEVICE)
    torch.testing.assert_close(
        block_labels_triton(allowed, walls), block_labels_torch(allowed, walls)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(0, 400))
def test_graph_components_are_scipys(seed: int, nodes: int, edges: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, nodes, (2, edges))
    found = graph_components(torch.from_numpy(a), torch.from_numpy(b), nodes).numpy()
    graph = coo_array((np.ones(edges), (a, b)), (nodes, nodes))
    truth = connected_components(graph, directed=False)[1]
    first = np.array([np.flatnonzero(truth == label)[0] for label in range(truth.max() + 1)])
    np.testing.assert_array_equal(found, first[truth])


@pytest.mark.parametrize("name", [*SOLIDS, *SCENES])
def test_patches_and_turns_are_libigls(name: str) -> None:
    """Up to the names of patches and one turn for all of a patch, with faces flipped at random."""
    faces = np.array((SOLIDS | SCENES)[name].faces, np.int64)
    flipped = np.random.default_rng(0).random(len(faces)) < 0.4
    faces[flipped] = faces[flipped][:, ::-1]
    patches, turns = oriented_patches(faces)
    oriented, truth = igl.bfs_orient(faces)
    assert len(np.unique(np.stack([patches, truth], 1), axis=0)) == truth.max() + 1
    kept = (oriented == faces).all(1) | (np.roll(oriented, 1, 1) == faces).all(1)
    kept |= (np.roll(oriented, 2, 1) == faces).all(1)
    same = turns * np.where(kept, 1, -1)
    for patch in range(patches.max() + 1):
        assert len(np.unique(same[patches == patch])) == 1
    found = oriented_patches_torch(torch.from_numpy(faces))
    np.testing.assert_array_equal(found[0].numpy(), patches)
    np.testing.assert_array_equal(found[1].numpy(), turns)


def test_patch_that_cannot_be_oriented_is_left_as_it_is() -> None:
    """A Moebius strip of ten triangles."""
    edge = np.arange(5)
    strip = np.stack(
        [[2 * edge, 2 * edge + 1, 2 * edge + 2], [2 * edge + 1, 2 * edge + 3, 2 * edge + 2]]
    )
    faces = strip.transpose(2, 0, 1).reshape(-1, 3)
    faces = np.where(faces >= 10, 21 - faces, faces)  # the two ends joined crosswise
    for found in (oriented_patches(faces), oriented_patches_torch(torch.from_numpy(faces))):
        assert (np.asarray(found[0]) == 0).all()
        assert (np.asarray(found[1]) == 1).all()


def test_closed_and_oriented_says_the_same_on_both_paths() -> None:
    sdf = sparse_field(*plain(SOLIDS["torus"]), 32).sdf
    points, faces = marching_cubes(torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values), 32)
    turned_round, doubled = faces.clone(), torch.cat([faces, faces[:1]])
    turned_round[5] = turned_round[5].flip(0)
    cases = ((faces, True), (faces[1:], False), (turned_round, False), (doubled, False))
    for case, expected in cases:
        assert closed_and_oriented(case.numpy(), len(points)) == expected
        assert closed_and_oriented_torch(case, len(points)) == expected
    assert closed_and_oriented_torch(faces, 1 << 20)  # products of vertices pass 32 bits


COMPILE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import components, distance, feet, winding

kinds = {"f": "*fp64", "s": "*fp32", "l": "*i64", "i": "*i32", "h": "*i16", "b": "*i8", "n": "i32"}
for kernel, types, constants, options in (
    (distance._closest_triangles_kernel, "fllifsi", {"RECORD": 20}, {"enable_fp_fusion": False}),
    (components._block_labels_kernel, "bbhn", {}, {}),
    (feet._foot_cells_kernel, "inlfnflnil", {"N": 128}, {"enable_fp_fusion": False}),
    (feet._best_feet_kernel, "inlfnfbbbllnsis", {"N": 128}, {"enable_fp_fusion": False}),
    (winding._winding_kernel, "fnlffnlln", {"POINTS": 8, "FACES": 64, "TILES": 64}, {}),
):
    signature = dict(zip(kernel.arg_names, [kinds[t] for t in types]))
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    fused = len(re.findall(r"fma\\.rn\\.f64", ptx))
    assert not (options and fused), f"{kernel.__name__} fuses"
    print(kernel.__name__, file=sys.stderr)
"""


def test_kernels_compile_for_hopper_and_fuse_nothing() -> None:
    """Without a GPU too: a fused product and sum would round otherwise than the compiled path."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("kernel") == 5
