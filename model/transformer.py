"""Parts of the transformers over sparse voxels: norms, positions, MLP, shifted-window attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.sparse import SparseTensor, voxel_keys


class AbsolutePositionEmbedding(nn.Module):
    """Sines and cosines of a position, at frequencies from 1 down to 1/10000. No parameters."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        count = channels // 6
        if count == 0:
            raise ValueError(f"channels is {channels}; a sine and a cosine of x, y and z need 6")
        self.channels = channels
        steps = torch.arange(count, dtype=torch.float32) / count
        self.register_buffer("frequencies", 10000.0**-steps, persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """Return [N, channels] float32 for coords [N, 3], float or int, in voxels.

        For x, y and z the sines of channels // 6 frequencies, then their cosines; channels left
        over are zero.
        """
        # In float32 whatever autocast says: bfloat16 can't tell 256 from 257.
        angles = coords.float()[:, :, None] * self.frequencies.float()
        waves = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
        return functional.pad(waves, (0, self.channels - waves.shape[1]))


class RMSNorm(nn.Module):
    """RMS norm of queries or keys over head_dim, with a learned scale a head and channel."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., heads, head_dim] normalised, in its own dtype; computed in float32."""
        normed = functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        return (normed * self.weight).to(x.dtype)


class MLP(nn.Module):
    """Linear, GELU, linear; the hidden width is ratio * channels."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, ratio * channels)
        self.down = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., channels] for x [..., channels]."""
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


@dataclass(frozen=True)
class Windows:
    """Where the tokens of each attention window are.

    Windows hold anything from 1 to side^3 tokens. They are grouped by their size rounded up to a
    power of two, so that a group is one padded attention call and at most half of it is padding.

    groups: (rows, valid) of each group, [W, P] int64 rows of the tensor and [W, P] bool; padding
        repeats the window's first row and is False in valid.
    inverse: [N] int64, for each row its place among the valid tokens of all groups in order.
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    inverse: Tensor


def windows(x: SparseTensor, side: int, shift: int) -> Windows:
    """Return the partition of x into windows of side^3 voxels whose grid is moved by shift voxels.

    Kept in x.cache: layers and the backward share it. Synchronises with the host when built.
    """
    key = ("windows", side, shift)
    if key in x.cache:
        found = x.cache[key]
        assert isinstance(found, Windows)
        return found
    coords = x.coords.long()
    cell = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // side], dim=1)
    keys, order = voxel_keys(cell).sort(stable=True)
    counts = torch.unique_consecutive(keys, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    padded = 2 ** torch.log2(counts.double()).ceil().long()
    groups = []
    for size in padded.unique().tolist():
        chosen = padded == size
        slot = torch.arange(size, device=coords.device)
        valid = slot < counts[chosen, None]
        rows = order[starts[chosen, None] + slot * valid]
        groups.append((rows, valid))
    placed = [rows[valid] for rows, valid in groups]
    inverse = torch.empty_like(order)
    if placed:
        inverse[torch.cat(placed)] = torch.arange(len(order), device=order.device)
    built = Windows(tuple(groups), inverse)
    x.cache[key] = built
    return built


class WindowAttention(nn.Module):
    """Multi-head attention among the voxels of each window of window^3."""

    def __init__(self, channels: int, heads: int, head_dim: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(channels, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, channels)

    def forward(self, x: SparseTensor) -> Tensor:
        """Return the attended features, [N, channels]."""
        partition = windows(x, self.window, self.shift)
        qkv = self.qkv(x.feats)
        attended = []
        for rows, valid in partition.groups:
            # index_select and not qkv[rows]: its backward adds in place instead of sorting.
            padded = qkv.index_select(0, rows.flatten())
            q, k, v = padded.view(*rows.shape, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
            attended.append(y.transpose(1, 2).flatten(2)[valid])
        if not attended:
            return self.out(qkv[:, : self.out.in_features])
        return self.out(torch.cat(attended).index_select(0, partition.inverse))


class WindowBlock(nn.Module):
    """Pre-norm transformer block: window attention, then an MLP, each added to its input."""

    def __init__(
        self, channels: int, heads: int, head_dim: int, window: int, shift: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, head_dim, window, shift)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = MLP(channels, mlp_ratio)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels."""
        feats = x.feats + self.attention(x.replace(self.attention_norm(x.feats)))
        return x.replace(feats + self.mlp(self.mlp_norm(feats)))
