"""SSA against full attention on a GPU: python benchmarks/ssa.py [table|profile|growth|tune].

Tokens are two nested bumpy shells in a 128^3 latent grid (larger past 131,072 tokens, so that the
occupancy of the blocks stays the same); inputs are random normal, drawn anew for every row.
Times are medians in milliseconds by CUDA events after warm-up; memory is the peak beyond inputs,
output and gradients.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import ssa, ssa_triton

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


def draw(row: tuple, seed: int = 0) -> tuple[list[Tensor], ssa.SSALayout, Tensor]:
    """Return inputs, layout and a gradient for a row of ROWS."""
    tokens, samples, sides, _, heads, kv_heads, dim = row[:7]
    coords = shells(tokens, samples, seed)
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


def time_full(row: tuple, backend: SDPBackend) -> list[float]:
    """Time full attention with as many KV heads as query heads."""
    tokens, samples, _, _, heads, _, dim = row[:7]
    shape = (samples, heads, tokens, dim)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    with sdpa_kernel(backend):
        return time_both(
            lambda: functional.scaled_dot_product_attention(*inputs),
            inputs,
            torch.randn_like(inputs[0]),
        )


def table() -> None:
    """Print one line a row: full attention, SSA, and how many times faster SSA is."""
    print("| tokens | sides, top-k, heads | FlashAttention-2 fwd / bwd | cuDNN | SSA | GB | "
          "x fwd (wanted) | x bwd (wanted) |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        tokens, samples, sides, top_k, heads, kv_heads, dim, want_forward, want_backward = row
        sides_text = "/".join(map(str, sides))
        flash = time_full(row, SDPBackend.FLASH_ATTENTION)
        cudnn = time_full(row, SDPBackend.CUDNN_ATTENTION)
        inputs, layout, grad = draw(row)
        ours = time_both(
            lambda i=inputs, la=layout, k=top_k: ssa.spatial_sparse_attention(*i, la, k),
            inputs, grad,
        )  # fmt: skip
        print(
            f"| {samples} x {tokens:,} | {sides_text}, {top_k}, {heads} + {kv_heads} "
            f"of {dim} | {flash[0]:.2f} / {flash[1]:.2f} | {cudnn[0]:.2f} / {cudnn[1]:.2f} | "
            f"{ours[0]:.2f} / {ours[1]:.2f} | {ours[2]:.2f} | {flash[0] / ours[0]:.1f} "
            f"({want_forward}) | {flash[1] / ours[1]:.1f} ({want_backward}) |",
            flush=True,
        )


def kernel_times(row: tuple) -> dict[str, float]:
    """Return ms by kernel of one forward and backward; the launches of a name are told apart."""
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
        name = (
            event.name if event.name.split("_")[-1] in ("places", "pairs", "backward") else "rest"
        )
        if name in ("attend_places", "dq_places", "dkv_places"):
            order = {"attend_places": ["window", "compression", "window again"]}
            kinds = order.get(name, ["window", "compression"])
            kind = kinds[min(seen[name], len(kinds) - 1)]
            seen[name] += 1
            name = f"{name} {kind}"
        times[name] += event.time_range.elapsed_us() / 1e3
    return dict(times)


def profile() -> None:
    """Print where the time of the rows of 131,072 tokens goes."""
    for row in (*ROWS[:3], ROWS[-1]):
        print_times(row, row)


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


VARIANTS = [  # rows, keys, warps, stages, registers
    (64, 64, 4, 3, 168), (64, 64, 4, 4, 168), (64, 64, 4, 4, 128), (64, 64, 4, 3, None),
    (128, 32, 4, 2, 168), (128, 32, 4, 3, 128), (128, 64, 4, 2, 168), (128, 64, 4, 3, 128),
    (128, 64, 4, 4, None), (64, 32, 4, 2, 128),
]  # fmt: skip
SETTINGS = [  # changed one at a time
    ("SOFT_EXPONENTIALS", True), ("PAIRS_A_PROGRAM", 64), ("PAIRS_A_BACKWARD_PROGRAM", 64),
    ("PAIRS_A_BACKWARD_PROGRAM", 256), ("PARTIAL_BYTES", 1 << 28), ("PARTIAL_BYTES", 100 << 20),
]  # fmt: skip


def use(variant: tuple) -> None:
    """Launch every kernel but the merging ones with this tile."""
    for name in ssa_triton.TILES:
        if name != "combine":
            ssa_triton.TILES[name] = ssa_triton.Tile(*variant)


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
            setattr(ssa_triton, *SETTINGS[warm - len(VARIANTS)])
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
    defaults = dict(ssa_triton.TILES)
    for variant in VARIANTS:
        use(variant)
        print_times(variant, row)
    ssa_triton.TILES.update(defaults)
    for name, value in SETTINGS:
        before = getattr(ssa_triton, name)
        setattr(ssa_triton, name, value)
        print_times((name, value), row)
        setattr(ssa_triton, name, before)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["table", "profile", "growth", "tune"]
    parser.add_argument("what", nargs="?", default="table", choices=choices)
    parser.add_argument("--row", type=int, default=0, help="row of the table to tune for")
    parser.add_argument("--warm", type=int, default=None, help="only compile this variant")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    if arguments.what == "tune":
        tune(arguments.row, arguments.warm)
    else:
        {"table": table, "profile": profile, "growth": growth}[arguments.what]()


if __name__ == "__main__":
    main()
