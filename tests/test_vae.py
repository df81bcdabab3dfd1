import pytest
import torch
from torch import Tensor

from model.config import VAEConfig
from model.sdf import truncation
from model.sparse import SparseTensor, voxel_keys
from model.transformer import AbsolutePositionEmbedding, RMSNorm, WindowAttention
from model.vae import GroupNorm, SparseSDFVAE, band_tensor, chunk_rows, sample_latent, vae_loss

STEPS = 100
TINY = VAEConfig(channels=32, latent_channels=8, blocks=2, heads=2, head_dim=16, window=4)


def slab(resolution: int, scale: float = 0.9) -> tuple[Tensor, Tensor]:
    """Return blocks [B, 3] int32 and values [B, 8, 8, 8] of a box of unequal sides."""
    axis = (2 * torch.arange(resolution) + 1) / resolution - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    outside = points.abs() - scale * torch.tensor([0.9, 0.6, 0.3])
    sdf = outside.clamp(min=0).norm(dim=-1) + outside.amax(-1).clamp(max=0)
    values = (sdf / truncation(resolution)).clamp(-1, 1)
    side = resolution // 8
    tiles = values.view(side, 8, side, 8, side, 8).permute(0, 2, 4, 1, 3, 5)
    active = (tiles.abs() < 1).flatten(3).any(3)
    return active.nonzero().int(), tiles[active]


def join(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    blocks = [torch.nn.functional.pad(b, (1, 0), value=i) for i, (b, _) in enumerate(samples)]
    return torch.cat(blocks), torch.cat([values for _, values in samples])


def test_configuration_errors_name_the_value():
    with pytest.raises(ValueError, match=r"channels is 40.*multiple of 16"):
        VAEConfig(channels=40)
    with pytest.raises(ValueError, match="heads is 0"):
        VAEConfig(heads=0)


def test_band_tensor_holds_the_band_in_order():
    blocks, values = join([slab(32), slab(32, 0.6)])
    x = band_tensor(blocks, values)
    assert len(x.coords) == (values.abs() < 1).sum()
    assert (voxel_keys(x.coords).diff() > 0).all()
    for row in range(0, len(x.coords), 97):
        batch, *place = x.coords[row].tolist()
        corner = torch.tensor([batch, *(p // 8 for p in place)])
        block = (blocks == corner).all(1).nonzero().item()
        i, j, k = (p % 8 for p in place)
        assert x.feats[row, 0] == values[block, i, j, k]


def test_shapes_order_and_gradients():
    torch.manual_seed(0)
    blocks, values = join([slab(32), slab(32, 0.6)])
    vae = SparseSDFVAE(TINY)
    mean, logvar = vae.encode(band_tensor(blocks, values))
    assert torch.equal(mean.coords, blocks)
    assert mean.feats.shape == logvar.feats.shape == (len(blocks), 8)
    decoded = vae.decode(sample_latent(mean, logvar, torch.Generator().manual_seed(0)))
    assert decoded.shape == values.shape
    assert decoded.abs().max() < 1
    sharp = torch.rand(values.shape) < 0.1
    vae_loss(decoded, values, sharp, mean.feats, logvar.feats, TINY)[0].backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Keys shift all scores of a query alike; everything else must learn.
        assert parameter.grad.any(), name


def test_samples_in_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    vae = SparseSDFVAE(TINY).double()
    shapes = [slab(32), slab(32, 0.6)]
    apart = []
    for sample in shapes:
        blocks, values = join([sample])
        mean, logvar = vae.encode(band_tensor(blocks, values.double()))
        apart.append((vae.decode(mean), logvar.feats))
    blocks, values = join(shapes)
    mean, logvar = vae.encode(band_tensor(blocks, values.double()))
    wanted = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    for got, target in zip((vae.decode(mean), logvar.feats), wanted, strict=True):
        torch.testing.assert_close(got, target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [8, 24])
def test_decoding_in_chunks_gives_the_same_values(grid):
    torch.manual_seed(0)
    flat = torch.randperm(2 * grid**3)[:80].sort().values
    coords = torch.stack(torch.unravel_index(flat, (2, grid, grid, grid)), dim=1).int()
    vae = SparseSDFVAE(TINY).double()
    z = SparseTensor(coords, torch.randn(80, 8).double())
    with torch.no_grad():
        whole = vae.decode(z)
        chunked = vae.decode_chunked(z, grid)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_chunk_rows_take_the_cube_and_its_surroundings():
    coords = torch.tensor([[0, 3, 4, 7], [0, 4, 4, 4], [0, 8, 7, 7], [0, 12, 7, 7], [1, 4, 4, 4]])
    inside, around = chunk_rows(coords, torch.tensor([0, 1, 1, 1]), 4)
    assert inside.tolist() == [False, True, False, False, False]
    assert around.tolist() == [True, True, True, False, False]


def test_an_empty_batch_passes_through():
    vae = SparseSDFVAE(TINY)
    blocks, values = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 8, 8, 8)
    mean, logvar = vae.encode(band_tensor(blocks, values))
    decoded = vae.decode(mean)
    assert decoded.shape == (0, 8, 8, 8)
    loss, _ = vae_loss(decoded, values, values.bool(), mean.feats, logvar.feats, TINY)
    assert loss == 0


def test_one_latent_voxel():
    blocks = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    values = torch.ones(1, 8, 8, 8)
    values[0, 3, 3, 3] = 0.5  # a single band voxel
    vae = SparseSDFVAE(TINY)
    mean, _ = vae.encode(band_tensor(blocks, values))
    assert torch.equal(mean.coords, blocks)
    assert vae.decode(mean).isfinite().all()


def test_loss_is_a_mean_over_each_class():
    target = torch.ones(2, 8, 8, 8)
    target[0, 0, 0, :4] = 0.5
    target[1] = -1
    values = torch.zeros(2, 8, 8, 8)
    values[0, 0, 0, 0] = 0.25
    sharp = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    mean, logvar = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    config = VAEConfig(lambda_in=2, lambda_ext=3, lambda_sharp=5, lambda_kl=7)
    loss, parts = vae_loss(values, target, sharp, mean, logvar, config)
    wanted = {"in": (3 * 0.25 + 0.0625) / 4, "ext": 1.0, "sharp": 0.0, "kl": 2.0}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(wanted)
    total = 2 * wanted["in"] + 3 * wanted["ext"] + 7 * wanted["kl"]
    assert loss.item() == pytest.approx(total)
    sharp[0, 0, 0, 0] = True
    assert vae_loss(values, target, sharp, mean, logvar, config)[1]["sharp"] == 0.0625


def test_group_norm_normalises_each_sample_alone():
    torch.manual_seed(0)
    coords = torch.zeros(50, 4, dtype=torch.int32)
    coords[:, 3] = torch.arange(50)
    coords[20:, 0] = 1
    x = SparseTensor(coords, 5 + 3 * torch.randn(50, 64))
    y = GroupNorm(64)(x).feats
    for part, wanted in zip(y.split([20, 30]), x.feats.split([20, 30]), strict=True):
        wanted = torch.nn.functional.group_norm(wanted.T[None], 32)[0].T
        torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_equals_masked_attention(shift):
    torch.manual_seed(0)
    flat = torch.randperm(2 * 9 * 7 * 11)[:250].sort().values
    coords = torch.stack(torch.unravel_index(flat, (2, 9, 7, 11)), dim=1).int()
    attention = WindowAttention(24, heads=3, head_dim=8, window=4, shift=shift).double()
    x = SparseTensor(coords, torch.randn(250, 24, dtype=torch.float64, requires_grad=True))
    q, k, v = attention.qkv(x.feats).view(250, 3, 3, 8).permute(1, 2, 0, 3)
    cell = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // 4], dim=1)
    same = (cell[:, None] == cell[None]).all(-1)
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~same, -torch.inf)
    wanted = attention.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    got = attention(x)
    torch.testing.assert_close(got, wanted)
    seed = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * seed).sum(), x.feats),
        torch.autograd.grad((wanted * seed).sum(), x.feats),
    )


def test_positions_are_told_apart():
    embedding = AbsolutePositionEmbedding(64)
    coords = torch.cartesian_prod(*[torch.arange(0.0, 64, 9)] * 3)
    codes = embedding(coords)
    assert codes.shape == (512, 64)
    assert torch.pdist(codes).min() > 0.1
    assert embedding(coords.int()).equal(codes)
    with pytest.raises(ValueError, match="channels is 4"):
        AbsolutePositionEmbedding(4)


def test_rms_norm_a_head():
    norm = RMSNorm(3, 16)
    x = 7 * torch.randn(5, 3, 16)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(5, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_in_mixed_precision_agrees_with_the_cpu():
    torch.manual_seed(0)
    blocks, values = join([slab(64), slab(64, 0.6)])
    sharp = torch.rand(values.shape) < 0.1
    vae = SparseSDFVAE(VAEConfig(channels=128, blocks=2, heads=4, head_dim=32))

    def run(device: str) -> tuple[Tensor, Tensor]:
        vae.to(device).zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, logvar = vae.encode(band_tensor(blocks.to(device), values.to(device)))
            decoded = vae.decode(mean)
        loss, _ = vae_loss(
            decoded, values.to(device), sharp.to(device), mean.feats, logvar.feats, vae.config
        )
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])
        assert decoded.dtype == torch.float32
        return decoded.detach().cpu(), gradient.cpu()

    values_wanted, gradient_wanted = run("cpu")
    values_got, gradient_got = run("cuda")
    # bfloat16 rounds to 4e-3, through some twenty layers.
    assert (values_got - values_wanted).norm() < 0.05 * values_wanted.norm()
    assert (gradient_got - gradient_wanted).norm() < 0.1 * gradient_wanted.norm()


def test_a_mini_vae_overfits_one_shape():
    torch.manual_seed(0)
    blocks, values = join([slab(32, 0.5)])
    x = band_tensor(blocks, values)
    config = VAEConfig(channels=64, latent_channels=16, blocks=1, heads=2, head_dim=32)
    vae = SparseSDFVAE(config)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS)
    sharp = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(STEPS):
        mean, logvar = vae.encode(x)
        decoded = vae.decode(sample_latent(mean, logvar))
        loss, _ = vae_loss(decoded, values, sharp, mean.feats, logvar.feats, config)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(x)[0])
    band = values.abs() < 1
    voxels = 2 * (decoded - values)[band].abs().mean()  # tau is two voxels
    assert voxels < 0.3  # a constant is 1 voxel off
