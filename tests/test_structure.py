"""The structure stage: occupancy VAE and dense DiT, at a tiny size."""

import pytest
import torch

from model.condition import Condition
from model.config import StructureConfig
from model.flow import flow_loss, noise_like, sample_euler, sample_timesteps
from model.structure import DenseDiT, StructureVAE, structure_vae_loss

CONFIG = StructureConfig(
    grid=8,
    latent_grid=4,
    latent_channels=3,
    vae_channels=(8, 16),
    width=48,
    blocks=2,
    heads=2,
    mlp_ratio=2,
    condition_width=12,
)


def shells(count: int, grid: int = 8) -> torch.Tensor:
    """Return occupancies [count, 1, G, G, G] of spherical shells about different centres."""
    axis = torch.linspace(-1, 1, grid)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=3)
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(count, 1, 1, 1, 3, generator=generator) - 0.5
    distance = (points - centres).norm(dim=4)
    return ((distance - 0.6).abs() < 0.2).float()[:, None]


def random_condition(count: int) -> Condition:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(count, 3, 12, generator=generator)
    return Condition(tokens, torch.ones(count, 3, dtype=torch.bool))


def test_vae_shapes_of_the_published_steps() -> None:
    torch.manual_seed(0)
    config = StructureConfig(
        grid=16, latent_grid=4, latent_channels=8, vae_channels=(4, 8, 16), width=48, heads=2
    )
    vae = StructureVAE(config)
    mean, logvar = vae.encode(torch.zeros(2, 1, 16, 16, 16))
    assert mean.shape == logvar.shape == (2, 8, 4, 4, 4)
    assert vae.decode(mean).shape == (2, 1, 16, 16, 16)


def test_vae_loss_parts() -> None:
    occupancy = shells(2)
    zero = torch.zeros(2, 3, 4, 4, 4)
    sure = 100 * (2 * occupancy - 1)
    loss, parts = structure_vae_loss(sure, occupancy, zero, zero, CONFIG)
    assert loss == pytest.approx(0, abs=1e-6)
    loss, parts = structure_vae_loss(-sure, occupancy, zero + 2, zero, CONFIG)
    assert parts["bce"] == pytest.approx(100)
    assert parts["dice"] == pytest.approx(1, abs=0.01)
    assert parts["kl"] == pytest.approx(2)
    assert float(loss) == pytest.approx(100 + float(parts["dice"]) + 2e-3)
    # Half the mass on the right voxels: overlap 2 * 0.5 n / (0.5 n + n).
    half = torch.where(occupancy > 0, 0.0, -100.0)
    _, parts = structure_vae_loss(half, occupancy, zero, zero, CONFIG)
    assert parts["dice"] == pytest.approx(1 / 3, abs=0.01)


def test_vae_learns_a_few_shapes() -> None:
    torch.manual_seed(0)
    vae, occupancy = StructureVAE(CONFIG), shells(3)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    for _ in range(50):
        logits, mean, logvar = vae(occupancy, generator)
        loss, _ = structure_vae_loss(logits, occupancy, mean, logvar, CONFIG)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        decoded = vae.decode(vae.encode(occupancy)[0]) > 0
    union = (decoded | (occupancy > 0)).sum()
    assert (decoded & (occupancy > 0)).sum() / union > 0.9


def test_dit_starts_at_zero_and_treats_samples_alone() -> None:
    torch.manual_seed(0)
    model = DenseDiT(CONFIG)
    x, t, condition = torch.randn(3, 3, 4, 4, 4), torch.rand(3), random_condition(3)
    assert not model(x, t, condition).any()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    together = model(x, t, condition)
    assert together.shape == x.shape
    for i in range(3):
        one = Condition(condition.tokens[i : i + 1], condition.mask[i : i + 1])
        alone = model(x[i : i + 1], t[i : i + 1], one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=2e-5)


def test_dit_knows_where_its_tokens_are() -> None:
    """Without positions, a transformer would commute with moving the grid."""
    torch.manual_seed(0)
    model = DenseDiT(CONFIG)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, condition = torch.randn(1, 3, 4, 4, 4), torch.rand(1), random_condition(1)
    out = model(x, t, condition)
    for axis in (2, 3, 4):
        assert not torch.allclose(model(x.flip(axis), t, condition).flip(axis), out, atol=1e-3)
    model.places.zero_()
    blind = model(x, t, condition)
    for axis in (2, 3, 4):  # and so which voxel a row stands for is kept through the model
        flipped = model(x.flip(axis), t, condition).flip(axis)
        torch.testing.assert_close(flipped, blind, rtol=1e-4, atol=2e-5)


def test_dit_learns_one_latent() -> None:
    torch.manual_seed(0)
    model, condition = DenseDiT(CONFIG), random_condition(1)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 3, 4, 4, 4, generator=generator)
    batch = x0.repeat(8, 1, 1, 1, 1)
    tokens = Condition(condition.tokens.repeat(8, 1, 1), condition.mask.repeat(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(140):
        t = sample_timesteps(8, torch.device("cpu"), generator)
        loss = flow_loss(model, batch, tokens, t, noise_like(batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert sum(losses[-10:]) / 10 < 0.1 * losses[0]
    drawn = sample_euler(model, noise_like(x0, generator), condition, None, 20, 1.0, 3.0)
    error = (drawn - x0).square().mean().sqrt()
    assert error < 0.4  # of values with deviation 1; noise alone is off by 1.4
