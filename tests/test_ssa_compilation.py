"""SSA's kernels compile for a Hopper GPU, on a machine that has none.

The interpreter, which runs them in the other tests, takes more than the compiler does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Run in a process of its own, where triton does not interpret. Every launch is compiled instead.
SCRIPT = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from kernels import ssa, ssa_triton

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
         torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32"}
compiled = set()

def compile_instead(self, *args, grid, warmup, **kwargs):
    names = self.arg_names
    values = dict(zip(names, args, strict=False))
    values |= {name: kwargs.pop(name) for name in names if name in kwargs}
    kind = {n: TYPES[getattr(v, "dtype", type(v))] for n, v in values.items()
            if not self.params[names.index(n)].is_constexpr}
    constants = {(i,): values[n] for i, n in enumerate(names) if n not in kind}
    signature = {n: kind.get(n, "constexpr") for n in names}
    aligned = [n for n, type_ in kind.items() if type_[0] == "*"]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(self, signature, constants, attributes)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kwargs)
    compiled.add(self.__name__)

JITFunction.run = compile_instead
sides, heads, kv_heads, dim, top_k, dtype = eval(sys.argv[1])
axis = torch.arange(16)
xyz = torch.cartesian_prod(axis, axis, axis[:2])
coords = torch.nn.functional.pad(xyz, (1, 0)).int()
coords = coords[ssa.block_order(coords, sides[1], sides[0])]
layout = ssa.build_layout(coords, *sides, 0)
n, nc = len(coords), layout.num_compression_blocks
shapes = [(n, heads, dim), *[(rows, kv_heads, dim) for rows in (n, n, nc, nc)], (n, 3)]
inputs = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
out = ssa_triton.attention(*inputs, layout, top_k)
torch.autograd.grad(out, inputs, out)
print(*sorted(compiled))
"""


@pytest.mark.parametrize(
    "shape",
    ["(8, 8, 8), 32, 2, 32, 8, torch.bfloat16", "(4, 8, 8), 12, 2, 64, 3, torch.float32"],
)
def test_every_kernel_compiles_for_hopper(shape: str) -> None:
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, shape],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        "attend_pairs", "attend_places", "backward_pairs", "combine_places", "count_pairs",
        "cut_segments", "dkv_places", "dq_compression", "dq_window", "longest_keys", "place_pairs",
        "prepare_backward", "select_places",
    ]  # fmt: skip
