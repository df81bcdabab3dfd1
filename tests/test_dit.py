"""SS-DiT: start, order and batching of tokens, what reaches what, and that it learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.condition import Condition
from model.config import DiTConfig
from model.dit import SparseDiT, TimestepEmbedding
from model.flow import flow_loss, noise_like, sample_euler, sample_timesteps
from model.sparse import SparseTensor

CONFIG = DiTConfig(
    width=64,
    blocks=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp_ratio=2,
    latent_channels=5,
    compression=4,
    top_k=2,
    condition_width=12,
    max_grid=16,
)
COUNTS = [130, 1, 200]


def random_latent(counts: list[int], grid: int = 16, seed: int = 0) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(grid**3, generator=generator)[:count].sort().values
        voxels = torch.stack([cells // grid**2, cells // grid % grid, cells % grid], dim=1)
        parts.append(torch.cat([torch.full((count, 1), sample), voxels], dim=1))
    coords = torch.cat(parts).int()
    return SparseTensor(coords, torch.randn(len(coords), 5, generator=generator))


def random_condition(lengths: list[int], width: int = 12, seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths), width, generator=generator)
    return Condition(tokens, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def awake(config: DiTConfig, grid: int = 16) -> SparseDiT:
    """Return a model whose zero-initialised parts are not zero."""
    torch.manual_seed(0)
    model = SparseDiT(config, grid)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def sample_of(x: SparseTensor, index: int) -> SparseTensor:
    rows = x.coords[:, 0] == index
    coords = x.coords[rows].clone()
    coords[:, 0] = 0
    return SparseTensor(coords, x.feats[rows])


def test_velocity_is_zero_and_blocks_are_the_identity_at_first() -> None:
    torch.manual_seed(0)
    model = SparseDiT(CONFIG, 16)
    x, t, condition = random_latent(COUNTS), torch.rand(3), random_condition([4, 2, 3])
    velocity = model(x, t, condition)
    assert torch.equal(velocity.coords, x.coords)
    assert velocity.feats.shape == x.feats.shape
    assert not velocity.feats.any()
    hidden: list[Tensor] = []
    for block in model.transformer.blocks:
        block.register_forward_hook(
            lambda _block, inputs, output: hidden.extend([inputs[0], output])
        )
    model(x, t, condition)
    assert len(hidden) == 4
    for h in hidden[1:]:
        assert torch.equal(h, hidden[0])


@pytest.mark.parametrize("attention", ["ssa", "full"])
@pytest.mark.parametrize(("compression", "delta"), [(4, "convolution"), (8, "pointwise")])
def test_a_ragged_batch_equals_its_samples_alone(
    attention: str, compression: int, delta: str
) -> None:
    model = awake(replace(CONFIG, compression=compression, delta=delta, attention=attention))  # type: ignore[arg-type]
    x, t = random_latent(COUNTS), torch.tensor([0.1, 0.5, 0.9])
    lengths = [4, 2, 3]
    condition = random_condition(lengths)
    together = model(x, t, condition).feats
    for i, length in enumerate(lengths):
        one = Condition(condition.tokens[i : i + 1, :length], condition.mask[i : i + 1, :length])
        alone = model(sample_of(x, i), t[i : i + 1], one).feats
        # Float32 sums in another order; the worst seen is 2e-6 of values near 3.
        torch.testing.assert_close(together[x.coords[:, 0] == i], alone, rtol=1e-4, atol=2e-5)


def test_rows_keep_their_voxels_whatever_the_block_order() -> None:
    """The block order is inside: blocks of 8 and one block of all give rows in x's own order."""
    model = awake(replace(CONFIG, attention="full", selection=8))
    whole = awake(replace(CONFIG, attention="full", selection=16, compression=16))
    whole.load_state_dict(model.state_dict())
    x, t, condition = random_latent(COUNTS), torch.rand(3), random_condition([4, 2, 3])
    assert not torch.equal(model._tables(x, 3).order, whole._tables(x, 3).order)
    torch.testing.assert_close(
        model(x, t, condition).feats, whole(x, t, condition).feats, rtol=1e-4, atol=2e-5
    )


def test_mirrored_samples_swap_their_outputs() -> None:
    model = awake(CONFIG)
    x, t, condition = random_latent([90, 120]), torch.tensor([0.3, 0.6]), random_condition([3, 3])
    first, second = sample_of(x, 0), sample_of(x, 1)
    coords = torch.cat([second.coords, first.coords])
    coords[len(second.coords) :, 0] = 1
    swapped = SparseTensor(coords, torch.cat([second.feats, first.feats]))
    out = model(x, t, condition).feats
    flipped = Condition(condition.tokens.flip(0), condition.mask.flip(0))
    back = model(swapped, t.flip(0), flipped).feats
    torch.testing.assert_close(torch.cat([back[120:], back[:120]]), out, rtol=1e-4, atol=2e-5)


def test_every_input_and_parameter_matters() -> None:
    model = awake(CONFIG)
    x, t, condition = random_latent(COUNTS), torch.rand(3), random_condition([4, 2, 3])
    noise = noise_like(x, torch.Generator().manual_seed(0))
    flow_loss(model, x, condition, t, noise).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    out = model(x, t, condition).feats
    assert not torch.allclose(model(x, 1 - t, condition).feats, out, atol=1e-3)
    assert not torch.allclose(model(x, t, condition.null()).feats, out, atol=1e-3)
    moved = SparseTensor(x.coords + torch.tensor([0, 0, 0, 16], dtype=torch.int32), x.feats)
    assert not torch.allclose(model(moved, t, condition).feats, out, atol=1e-3)


def test_odd_layers_shift_their_windows_and_tables_are_shared() -> None:
    model = SparseDiT(CONFIG, 16)
    x = random_latent(COUNTS)
    tables = model._tables(x, 3)
    assert [layout.shift for layout in tables.layouts] == [0, 4]  # type: ignore[union-attr]
    assert model._tables(x.replace(2 * x.feats), 3) is tables
    seen = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda _block, inputs, _out: seen.append(inputs[-1]))
    model(x, torch.rand(3), random_condition([1, 1, 1]))
    assert seen[0] is tables.layouts[0]
    assert seen[1] is tables.layouts[1]


def test_finer_grids_share_the_positions_of_the_coarser() -> None:
    coarse, fine = awake(CONFIG, grid=16), awake(CONFIG, grid=32)
    assert (coarse.position_scale, fine.position_scale) == (1.0, 0.5)
    assert coarse.state_dict().keys() == fine.state_dict().keys()
    seen = []
    for model in (coarse, fine):
        model.transformer.position.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs))
    x = random_latent([40])
    doubled = SparseTensor(x.coords * torch.tensor([1, 2, 2, 2], dtype=torch.int32), x.feats)
    for model, latent in ((coarse, x), (fine, doubled)):
        model(latent, torch.rand(1), random_condition([2]))
    keys = [set(map(tuple, inputs[0].tolist())) for inputs in seen]
    assert keys[0] == keys[1]


def test_recomputed_activations_give_the_same_gradients() -> None:
    x, t, condition = random_latent(COUNTS), torch.rand(3), random_condition([4, 2, 3])
    noise = noise_like(x, torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        model = awake(replace(CONFIG, recompute=recompute))
        flow_loss(model, x, condition, t, noise).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_wrong_batches_are_refused() -> None:
    model = SparseDiT(CONFIG, 16)
    x = random_latent(COUNTS)
    with pytest.raises(ValueError, match="sample 2 in a batch of 2"):
        model(x, torch.rand(2), random_condition([1, 1]))
    with pytest.raises(ValueError, match="2 samples, t 3"):
        model(x, torch.rand(3), random_condition([1, 1]))
    empty = SparseTensor(x.coords[:0], x.feats[:0])
    with pytest.raises(ValueError, match="no voxels"):
        model(empty, torch.rand(1), random_condition([1]))


def test_time_embedding_tells_near_times_apart() -> None:
    torch.manual_seed(0)
    embedding = TimestepEmbedding(16)
    out = embedding(torch.tensor([0.0, 0.001, 0.5, 1.0]))
    assert torch.isfinite(out).all()
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_one_latent_is_learnt_in_seconds() -> None:
    torch.manual_seed(0)
    model = SparseDiT(CONFIG, 16)
    x, condition = random_latent([60]), random_condition([3])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    batch = SparseTensor(
        torch.cat([x.coords + torch.tensor([i, 0, 0, 0], dtype=torch.int32) for i in range(4)]),
        x.feats.repeat(4, 1),
    )
    tokens = Condition(condition.tokens.expand(4, -1, -1), condition.mask.expand(4, -1))
    losses = []
    for _ in range(100):
        t = sample_timesteps(4, torch.device("cpu"), generator)
        loss = flow_loss(model, batch, tokens, t, noise_like(batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.1 * losses[0]
    drawn = sample_euler(model, noise_like(x, generator), condition, None, 20, 1.0, 3.0)
    error = (drawn.feats - x.feats).square().mean().sqrt()
    assert error < 0.4  # of values with deviation 1; noise alone is off by 1.4
