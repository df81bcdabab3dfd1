"""SSA against full attention: python benchmarks/ssa.py [table|profile|growth|block|tune] on a GPU.

Tokens are two nested bumpy shells in a 128^3 latent grid (larger past 131,072 tokens, so that the
occupancy of the blocks stays the same). With table --tokens FOLDER a row is a mesh: its latent
voxels, from the `sdf-*.parquet` shards below a data folder. Inputs are random normal, drawn anew
for every row. Times are medians in milliseconds by CUDA events after warm-up; memory is the peak
beyond inputs, output and gradients.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import ssa, ssa_triton
from model.attention import FullAttention, SpatialSparseAttention, divide_samples
from model.dit import DiTBlock

# tokens a sample, samples, (compression, selection, window), top-k, query heads, KV heads, head
# dim, wanted speed over FlashAttention-2 forward and backward
ROWS = [
    (131_072, 1, (8, 8, 8), 8, 32, 2, 32, 36, 66),
    (131_072, 1, (4, 8, 8), 8, 32, 2, 32, 21, 42),
    (131_072, 1, (4, 8, 8), 32, 32, 2, 32, 9, 18),
    (65_536, 1, (8, 8, 8), 8, 32, 2, 32, 18, 32),
    (45_904, 1, (8, 8, 8), 8, 32, 2, 32, 12, 20),
    (32_768, 1, (8, 8, 8), 8, 32, 2, 32, 9, 12),
    (10_655, 8, (8, 8, 8), 8, 32, 2, 32, 3, 3.3),
    (131_072, 1, (8, 8, 8), 8, 16, 1, 64, 32, 52),
]

# What one H200 was measured to do, for the floors: bf16 matrix products, device memory (bytes read
# and written), and exponentials by its datasheet (16 a clock and multiprocessor, 1.98 GHz).
FLOPS, BYTES, EXPONENTIALS = 790e12, 4.3e12, 132 * 16 * 1.98e9


def shells(tokens: int, samples: int, seed: int) -> Tensor:
    """Return coords [tokens * samples, 4] int32 on the GPU: the voxels nearest to two shells."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    outer = 56 * (tokens / 131_072) ** 0.5
    grid = 128 if outer < 60 else 256
    axis = torch.arange(grid, device="cuda") - grid / 2 + 0.5
    xyz = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    rows = []
    for batch in range(samples):
        phase = torch.rand(3, device="cuda", generator=generator) * 6.28
        direction = functional.normalize(xyz, dim=1)
        bumps = 1 + 0.06 * torch.sin(7 * direction + phase).sum(1)
        radius = xyz.norm(dim=1) / bumps
        distance = torch.minimum((radius - outer).abs(), (radius - 0.7 * outer).abs())
        nearest = distance.topk(tokens, largest=False).indices
        voxels = (xyz[nearest] + grid / 2 - 0.5).int()
        rows.append(torch.cat([torch.full_like(voxels[:, :1], batch), voxels], 1))
    return torch.cat(rows)


def stored_tokens(folder: Path) -> list[Tensor]:
    """Return coords [N, 4] int32 on the CPU of every mesh in the shards below a folder."""
    from pyarrow import fs, parquet

    from tasks.shards import read_sdf

    found = []
    for path in sorted(folder.rglob("sdf-*.parquet")):
        for row_group in range(parquet.ParquetFile(path).num_row_groups):
            blocks = torch.tensor(read_sdf(fs.LocalFileSystem(), str(path), row_group).blocks)
            found.append(functional.pad(blocks.int(), (1, 0)))
    if not found:
        raise SystemExit(f"{folder} has no sdf-*.parquet: name the data folder of a conversion")
    return found


def draw(row: tuple, coords: Tensor | None = None) -> tuple[list[Tensor], ssa.SSALayout, Tensor]:
    """Return inputs, layout and a gradient for a row of ROWS, on shells if there are no coords."""
    tokens, samples, sides, _, heads, kv_heads, dim = row[:7]
    coords = shells(tokens, samples, seed=0) if coords is None else coords.cuda()
    coords = coords[ssa.block_order(coords, sides[1], sides[0])]
    layout = ssa.build_layout(coords, *sides, shift=0)
    n, nc = len(coords), layout.num_compression_blocks
    shapes = [(n, heads, dim)] + [(rows, kv_heads, dim) for rows in (n, n, nc, nc)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    inputs.append(torch.rand(n, 3, device="cuda", dtype=torch.bfloat16))
    grad = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    return [x.requires_grad_() for x in inputs], layout, grad


def median(run: Callable[[], object], milliseconds: int) -> float:
    """Return the median time of run in ms."""
    return float(triton.testing.do_bench(run, warmup=25, rep=milliseconds, return_mode="median"))


def time_both(forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> list[float]:
    """Return forward ms, backward ms and peak GB beyond inputs, output and gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    gradients = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    torch.cuda.synchronize()
    results = sum(x.nbytes for x in (out, *gradients))
    peak = (torch.cuda.max_memory_allocated() - before - results) / 1e9
    del gradients
    backward = median(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), 200)
    return [median(forward, 200), backward, peak]


@cache
def time_full(tokens: int, samples: int, heads: int, dim: int, backend: SDPBackend) -> list[float]:
    """Time full attention with as many KV heads as query heads."""
    shape = (samples, heads, tokens, dim)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    with sdpa_kernel(backend):
        return time_both(
            lambda: functional.scaled_dot_product_attention(*inputs),
            inputs,
            torch.randn_like(inputs[0]),
        )


def newer_flash() -> Callable[..., Tensor] | None:
    """Return FlashAttention-3's or 4's function of q, k, v [B, N, H, D], where installed."""
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func
    elif importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func
    else:
        return None
    return flash_attn_func


def time_newer_flash(row: tuple) -> str:
    """Return FlashAttention-3's or 4's times, "not installed" where they are missing."""
    attend = newer_flash()
    if attend is None:
        return "not installed"
    tokens, samples, _, _, heads, _, dim = row[:7]
    shape = (samples, tokens, heads, dim)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]

    def forward() -> Tensor:
        out = attend(*inputs)
        return out[0] if isinstance(out, tuple) else out

    times = time_both(forward, inputs, torch.randn_like(inputs[0]))
    return f"{times[0]:.2f} / {times[1]:.2f}"


def table(rows: list[tuple], coords: list[Tensor | None]) -> None:
    """Print one line a row: full attention, SSA, and how many times faster SSA is."""
    print("| tokens | sides, top-k, heads | FlashAttention-2 fwd / bwd | cuDNN | "
          "FlashAttention-3/4 | SSA | GB | x fwd (wanted) | x bwd (wanted) |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row, voxels in zip(rows, coords, strict=True):
        tokens, samples, sides, top_k, heads, kv_heads, dim, want_forward, want_backward = row
        sides_text = "/".join(map(str, sides))
        flash = time_full(tokens, samples, heads, dim, SDPBackend.FLASH_ATTENTION)
        cudnn = time_full(tokens, samples, heads, dim, SDPBackend.CUDNN_ATTENTION)
        inputs, layout, grad = draw(row, voxels)
        ours = time_both(
            lambda i=inputs, la=layout, k=top_k: ssa.spatial_sparse_attention(*i, la, k),
            inputs, grad,
        )  # fmt: skip
        print(
            f"| {samples} x {tokens:,} | {sides_text}, {top_k}, {heads} + {kv_heads} "
            f"of {dim} | {flash[0]:.2f} / {flash[1]:.2f} | {cudnn[0]:.2f} / {cudnn[1]:.2f} | "
            f"{time_newer_flash(row)} | "
            f"{ours[0]:.2f} / {ours[1]:.2f} | {ours[2]:.2f} | {flash[0] / ours[0]:.1f} "
            f"({want_forward}) | {flash[1] / ours[1]:.1f} ({want_backward}) |",
            flush=True,
        )


KERNELS = (
    "attend_places", "select_places", "attend_pairs", "combine_places", "prepare_backward",
    "dq_window", "dq_compression", "dkv_places", "backward_pairs",
)  # fmt: skip


def kernel_times(row: tuple) -> dict[str, float]:
    """Return ms by kernel of one forward and backward; what is not ours is "rest"."""
    torch.manual_seed(0)  # which blocks are taken how often matters
    inputs, layout, grad = draw(row)

    def step() -> None:
        out = ssa.spatial_sparse_attention(*inputs, layout, row[3])
        torch.autograd.grad(out, inputs, grad)

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    times: dict[str, float] = defaultdict(float)
    seen: dict[str, int] = defaultdict(int)
    for event in sorted(events, key=lambda e: e.time_range.start):
        name = event.name if event.name in KERNELS else "rest"
        if name in ("attend_places", "dkv_places"):  # the window branch comes first
            seen[name] += 1
            name = f"{name} {'window' if seen[name] == 1 else 'compression'}"
        times[name] += event.time_range.elapsed_us() / 1e3
    return dict(times)


def floors(row: tuple) -> dict[str, float]:
    """Return a lower bound of each kernel's ms: products, exponentials or memory, whatever is most.

    Counts every logit once and every row that a kernel must read or write once.
    """
    torch.manual_seed(0)
    inputs, layout, _ = draw(row)
    tokens, samples, _, top_k, heads, kv_heads, dim = row[:7]
    n = tokens * samples
    with torch.no_grad():
        selected = ssa_triton.attention_and_selection(*inputs, layout, top_k)[1]
    sizes = layout.selection_starts[: layout.counts.selection + 1].diff()
    taken = selected[selected >= 0].long()
    compression = layout.compression_range.diff().sum().item() * heads
    window = layout.window_range.diff().sum().item() * heads
    selection = sizes[taken].sum().item() * heads // kv_heads
    rows = n * heads * dim * 2  # bytes of all queries
    pairs = taken.numel() * heads // kv_heads * dim * 2  # bytes of a row for every pair
    work = {  # logits, products, bytes
        "attend_places window": (window, 2, 2 * rows),
        "attend_places compression": (compression, 2, 2 * rows),
        "select_places": (compression, 1, rows),
        "attend_pairs": (selection, 2, 2 * pairs),
        "combine_places": (0, 0, pairs + 4 * rows),
        "prepare_backward": (0, 0, 3 * rows),
        "dq_window": (window, 4, 3 * rows),
        "dq_compression": (compression, 3, pairs + 4 * rows),
        "dkv_places window": (window, 4, 2 * rows),
        "dkv_places compression": (compression, 4, 2 * rows),
        "backward_pairs": (selection, 5, 3 * pairs),
    }
    return {
        name: 1e3 * max(logits * products * 2 * dim / FLOPS, logits / EXPONENTIALS, size / BYTES)
        for name, (logits, products, size) in work.items()
    }


def profile() -> None:
    """Print where the time of the rows of 131,072 tokens goes, the floor beside each kernel."""
    for row in (*ROWS[:3], ROWS[-1]):
        times, least = kernel_times(row), floors(row)
        print(row[:7], f"sum {sum(times.values()):.2f}, floor {sum(least.values()):.2f}")
        for name, ms in times.items():
            print(f"  {name:26s} {ms:6.2f}  floor {least.get(name, 0):5.2f}", flush=True)


def block() -> None:
    """Print times of a whole transformer block, with SSA and with full attention.

    Width 1024, MLP 4, cross-attention to 1,374 image tokens, adaLN; bf16 autocast. With the
    compression's 3x3x3 convolution where spconv is installed.
    """
    sizes = (1024, 32, 2, 32, 8, 8)
    for tokens in (10_655, 45_904, 131_072):
        times = {}
        coords = shells(tokens, 1, seed=0)
        coords = coords[ssa.block_order(coords, 8, 8)]
        samples = divide_samples(coords[:, 0], 1)
        layout = ssa.build_layout(coords, 8, 8, 8, shift=4)
        attentions = [
            ("SSA 8/8/8 top 8", SpatialSparseAttention(*sizes), layout),
            ("full", FullAttention(1024, 32, 32), samples),
        ]
        if importlib.util.find_spec("spconv"):
            convolved = SpatialSparseAttention(*sizes, delta="convolution")
            attentions.append(("SSA, 3x3x3", convolved, layout))
        for name, attention, table in attentions:
            module = DiTBlock(attention, 1024, 32, 32, 4, 1024).cuda()
            for parameter in module.parameters():  # zeros would time another thing
                parameter.data.normal_(std=0.02)
            inputs = [torch.randn(tokens, 1024, device="cuda", requires_grad=True)]
            others = (
                torch.randn(1, 1024, device="cuda"),
                torch.randn(1, 1374, 1024, device="cuda"),
                torch.ones(1, 1374, dtype=torch.bool, device="cuda"),
            )

            def forward(module=module, arguments=(*inputs, *others, samples, table)) -> Tensor:  # type: ignore[no-untyped-def]
                with torch.autocast("cuda", torch.bfloat16):
                    return module(*arguments)

            variables = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
            times[name] = time_both(forward, variables, torch.randn_like(inputs[0]))
        for name, (forward_ms, backward_ms, peak) in times.items():
            print(
                f"{tokens:7d} tokens, block with {name:15s}: forward {forward_ms:.2f}, "
                f"backward {backward_ms:.2f} ms, {peak:.2f} GB",
                flush=True,
            )


def growth() -> None:
    """Print SSA's time and memory from 8k to 262k tokens, and the layout's cost."""
    for tokens in (8_192, 16_384, 32_768, 65_536, 131_072, 262_144):
        row = (tokens, 1, (8, 8, 8), 8, 32, 2, 32)
        inputs, layout, grad = draw(row)
        ours = time_both(
            lambda i=inputs, la=layout: ssa.spatial_sparse_attention(*i, la, 8), inputs, grad
        )
        built = median(lambda la=layout: ssa.build_layout(la.coords, 8, 8, 8, 4), 50)
        print(
            f"{tokens:7d} tokens, {layout.counts.selection} blocks: forward {ours[0]:.2f}, backward"
            f" {ours[1]:.2f} ms, {ours[2]:.2f} GB, layout {built:.2f} ms",
            flush=True,
        )
    inputs, layout, grad = draw(ROWS[0])
    torch.use_deterministic_algorithms(True)
    ours = time_both(lambda: ssa.spatial_sparse_attention(*inputs, layout, 8), inputs, grad)
    print(f"131072 tokens, deterministic: forward {ours[0]:.2f}, backward {ours[1]:.2f} ms")


VARIANTS = [  # rows, keys, warps, stages, registers
    (64, 64, 4, 3, 128), (64, 64, 4, 3, 168), (64, 64, 4, 5, 168), (64, 64, 4, 5, None),
    (64, 128, 4, 5, 168), (64, 32, 4, 3, 128), (32, 64, 4, 5, 128), (128, 64, 4, 3, 128),
    (128, 64, 4, 5, 168), (128, 64, 4, 3, None), (128, 32, 4, 3, 128), (128, 32, 4, 2, 128),
    (128, 64, 8, 3, 128),
]  # fmt: skip
SETTINGS = [  # changed one at a time
    ("combine", ssa_triton.Tile(64, 0, 4, 1)), ("combine", ssa_triton.Tile(128, 0, 8, 1)),
    ("combine", ssa_triton.Tile(16, 0, 2, 1)), ("PAIRS_A_PROGRAM", 64),
    ("PAIRS_A_BACKWARD_PROGRAM", 128), ("PARTIAL_BYTES", 1 << 28), ("PARTIAL_BYTES", 100 << 20),
]  # fmt: skip


def use(variant: tuple) -> None:
    """Launch every kernel but the merging ones with this tile."""
    for tiles in ssa_triton.TILES.values():
        for name in tiles.keys() - {"combine"}:
            tiles[name] = ssa_triton.Tile(*variant)


def change(name: str, value: object) -> None:
    """Set a tile or a constant of the launches."""
    if isinstance(value, ssa_triton.Tile):
        for tiles in ssa_triton.TILES.values():
            tiles[name] = value
    else:
        setattr(ssa_triton, name, value)


def print_times(title: object, row: tuple) -> None:
    """Print the time of every kernel, or why it does not run."""
    try:
        times = kernel_times(row)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(title, "failed:", str(error)[:100], flush=True)
        return
    print(title, "total", round(sum(times.values()), 2))
    print("  " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()), flush=True)


def tune(row_index: int, warm: int | None) -> None:
    """Print the time of every kernel for every variant of its tile, and for other settings."""
    row = ROWS[row_index]
    small = (8192, *row[1:])
    if warm is not None:  # only compile; a process each, side by side
        if warm < len(VARIANTS):
            use(VARIANTS[warm])
        else:
            change(*SETTINGS[warm - len(VARIANTS)])
        kernel_times(small)
        return
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "tune", f"--row={row_index}", f"--warm={i}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(len(VARIANTS) + len(SETTINGS))
    ]  # fmt: skip
    for child in children:
        child.wait()
    print_times("as committed", row)
    defaults = {size: dict(tiles) for size, tiles in ssa_triton.TILES.items()}
    for variant in VARIANTS:
        use(variant)
        print_times(variant, row)
    constants = {name: getattr(ssa_triton, name, None) for name, _ in SETTINGS}
    for name, value in SETTINGS:
        for size, tiles in defaults.items():
            ssa_triton.TILES[size].update(tiles)
        change(name, value)
        print_times((name, value), row)
        if constants[name] is not None:
            change(name, constants[name])


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["table", "profile", "growth", "block", "tune"]
    parser.add_argument("what", nargs="?", default="table", choices=choices)
    parser.add_argument("--row", type=int, help="the only row of the table, or to tune for")
    parser.add_argument(
        "--tokens", type=Path, help="data folder whose meshes make the table's rows"
    )
    parser.add_argument("--warm", type=int, help="only compile this variant")
    arguments = parser.parse_args()
    rows = ROWS if arguments.row is None else [ROWS[arguments.row]]
    coords: list[Tensor | None] = [None] * len(rows)
    if arguments.tokens:
        coords = [*stored_tokens(arguments.tokens)]
        rows = [(len(voxels), 1, *ROWS[0][2:7], "-", "-") for voxels in coords]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    if arguments.what == "tune":
        tune(arguments.row or 0, arguments.warm)
    elif arguments.what == "table":
        table(rows, coords)
    else:
        {"profile": profile, "growth": growth, "block": block}[arguments.what]()


if __name__ == "__main__":
    main()
