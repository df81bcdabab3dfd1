"""Flow matching and Euler sampling against closed forms, on dense and on sparse latents."""

import pytest
import torch
from torch import Tensor

from model.condition import Condition
from model.flow import (
    flow_loss,
    noise_like,
    sample_euler,
    sample_timesteps,
    shifted_times,
)
from model.sparse import SparseTensor

CONDITION = Condition(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


def sparse(counts: tuple[int, int], channels: int, seed: int = 0) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    coords = torch.zeros(sum(counts), 4, dtype=torch.int32)
    coords[:, 0], coords[:, 3] = sample, torch.arange(sum(counts))
    return SparseTensor(coords, torch.randn(sum(counts), channels, generator=generator))


def toward(target: Tensor):  # type: ignore[no-untyped-def]
    """Return the exact velocity field whose data is `target` alone: straight lines to it."""

    def velocity(x: Tensor, t: Tensor, _condition: Condition) -> Tensor:
        return (x - target) / t.view(-1, 1, 1)

    return velocity


@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_euler_follows_straight_lines_exactly(steps: int, shift: float) -> None:
    target, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    x = sample_euler(toward(target), noise, CONDITION, None, steps, 1.0, shift)
    torch.testing.assert_close(x, target, rtol=1e-4, atol=1e-5)


def test_euler_integrates_a_constant_velocity_on_sparse_latents() -> None:
    noise = sparse((4, 7), 3)
    rate = torch.tensor([0.5, -2.0])
    seen = []

    def velocity(x: SparseTensor, t: Tensor, _condition: Condition) -> SparseTensor:
        seen.append(float(t[0]))
        return x.replace(rate[x.coords[:, 0].long()][:, None].expand_as(x.feats))

    x = sample_euler(velocity, noise, CONDITION, None, 5, 1.0, 3.0)
    assert x.cache is noise.cache
    torch.testing.assert_close(x.feats, noise.feats - rate[noise.coords[:, 0].long()][:, None])
    torch.testing.assert_close(seen, shifted_times(5, 3.0)[:-1])


def test_shifted_times() -> None:
    assert shifted_times(4, 1) == [1, 0.75, 0.5, 0.25, 0]
    times = shifted_times(4, 6)
    assert times[0] == 1
    assert times[-1] == 0
    assert times[2] == pytest.approx(6 / 7)
    with pytest.raises(ValueError, match="steps is 0"):
        shifted_times(0, 1)


def test_guidance_moves_from_null_past_the_condition() -> None:
    noise = torch.randn(2, 5, 3)

    def velocity(x: Tensor, _t: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(x, 1 + 2 * float(condition.tokens.mean()))  # null 1, condition 3

    def moved(guidance: float, null: Condition | None) -> Tensor:
        return noise - sample_euler(velocity, noise, CONDITION, null, 4, guidance, 1.0)

    torch.testing.assert_close(moved(1, None), torch.full_like(noise, 3))
    assert torch.equal(moved(1, None), moved(1, CONDITION.null()))
    torch.testing.assert_close(moved(0, CONDITION.null()), torch.full_like(noise, 1))
    torch.testing.assert_close(moved(7, CONDITION.null()), torch.full_like(noise, 15))
    with pytest.raises(ValueError, match="guidance is 2"):
        moved(2, None)


def test_loss_is_the_squared_distance_to_the_velocity() -> None:
    x0, eps, t = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([0.2, 0.9])

    def velocity(x: Tensor, at: Tensor, _condition: Condition) -> Tensor:
        expected = x0 + at.view(2, 1, 1) * (eps - x0)
        torch.testing.assert_close(x, expected)
        return eps - x0 + torch.tensor([1.0, 3.0]).view(2, 1, 1)

    loss = flow_loss(velocity, x0, CONDITION, t, eps)
    torch.testing.assert_close(loss, torch.tensor((1.0 + 9.0) / 2))


def test_every_sample_of_a_ragged_batch_weighs_the_same() -> None:
    x0 = sparse((2, 50), 3)
    eps = noise_like(x0, torch.Generator().manual_seed(1))
    offset = torch.tensor([1.0, 3.0])[x0.coords[:, 0].long()][:, None]

    def velocity(x: SparseTensor, _t: Tensor, _condition: Condition) -> SparseTensor:
        return x.replace(eps.feats - x0.feats + offset)

    loss = flow_loss(velocity, x0, CONDITION, torch.tensor([0.5, 0.1]), eps)
    torch.testing.assert_close(loss, torch.tensor(5.0))


def test_timesteps() -> None:
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    t = sample_timesteps(20000, device, generator)
    assert t.min() > 0
    assert t.max() < 1
    logit = torch.logit(t.double())
    assert float(logit.mean()) == pytest.approx(1, abs=0.03)
    assert float(logit.std()) == pytest.approx(1, abs=0.03)
    uniform = sample_timesteps(20000, device, generator, "uniform")
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    with pytest.raises(ValueError, match="beta"):
        sample_timesteps(2, device, generator, "beta")  # type: ignore[arg-type]


def test_noise_repeats_for_a_generator() -> None:
    x = sparse((3, 3), 2)
    first, again = (noise_like(x, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.feats, again.feats)
    assert first.coords is x.coords
