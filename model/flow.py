"""Rectified flow over dense and sparse latents: eqs. (10) and (11), and Euler sampling.

t = 0 is data, t = 1 is noise: x(t) = (1 - t) x_0 + t eps, velocity eps - x_0.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor

from model.condition import Condition
from model.sparse import SparseTensor

Latent = TypeVar("Latent", Tensor, SparseTensor)
# (x(t), t [B], condition) -> velocity, shaped as x
Velocity = Callable[[Latent, Tensor, Condition], Latent]


def sample_timesteps(
    count: int,
    device: torch.device,
    generator: Generator | None = None,
    distribution: Literal["logit-normal", "uniform"] = "logit-normal",
    mean: float = 1.0,
    std: float = 1.0,
) -> Tensor:
    """Return training timesteps [count] in [0, 1].

    The paper doesn't publish its distribution. The default, sigmoid of a normal with mean 1 and
    deviation 1, leans towards noise, where a shape is decided. generator: on `device`.
    """
    if distribution == "uniform":
        return torch.rand(count, device=device, generator=generator)
    if distribution == "logit-normal":
        return torch.sigmoid(mean + std * torch.randn(count, device=device, generator=generator))
    raise ValueError(f'distribution is "{distribution}"; take "logit-normal" or "uniform"')


def noise_like(x: Latent, generator: Generator | None = None) -> Latent:
    """Return standard normal noise shaped as x, on its voxels. generator: on its device."""
    feats = _feats(x)
    noise = torch.randn(feats.shape, device=feats.device, dtype=feats.dtype, generator=generator)
    return _like(x, noise)


def flow_loss(
    model: Velocity[Latent], x0: Latent, condition: Condition, t: Tensor, noise: Latent
) -> Tensor:
    """Return the flow matching loss of eq. (11), a scalar; t [B] as from `sample_timesteps`.

    Each sample weighs the same whatever its number of voxels, so that a batch's loss is the mean of
    its samples' losses alone.
    """
    data, eps = _feats(x0), _feats(noise)
    if isinstance(x0, SparseTensor):
        sample = x0.coords[:, 0].long()
    else:
        sample = torch.arange(len(data), device=data.device)
    at = t.index_select(0, sample).view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    velocity = model(_like(x0, (1 - at) * data + at * eps), t, condition)
    error = (_feats(velocity).float() - (eps - data).float()).square().flatten(1).mean(1)
    rows = torch.bincount(sample, minlength=len(t)).clamp(min=1)
    return (error / rows[sample]).sum() / len(t)


@torch.no_grad()
def sample_euler(
    model: Velocity[Latent],
    noise: Latent,
    condition: Condition,
    null_condition: Condition | None,
    steps: int,
    guidance: float,
    shift: float,
) -> Latent:
    """Return the latent that Euler steps of the flow reach from noise; deterministic given noise.

    guidance: of v = v_null + guidance (v_cond - v_null); 1 takes the condition alone, and needs no
        null_condition. The paper's is 7.
    shift: times are t -> shift t / (1 + (shift - 1) t); above 1 spends more steps on noise. The
        paper's is 6 (dense, 512) and 8 (1024).
    """
    if guidance != 1 and null_condition is None:
        raise ValueError(f"guidance is {guidance}, which needs a null_condition; or take 1")
    x = _feats(noise).float()
    batch = len(condition.tokens)
    times = shifted_times(steps, shift)
    for now, then in pairwise(times):
        at = torch.full((batch,), now, device=x.device)
        state = _like(noise, x)
        velocity = _feats(model(state, at, condition)).float()
        if guidance != 1 and null_condition is not None:
            null = _feats(model(state, at, null_condition)).float()
            velocity = null + guidance * (velocity - null)
        x = x + (then - now) * velocity
    return _like(noise, x)


def shifted_times(steps: int, shift: float) -> list[float]:
    """Return the steps + 1 times from 1 down to 0 that Euler sampling visits."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps is {steps}, shift {shift}; both must be above zero")
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in uniform]


def _feats(x: Tensor | SparseTensor) -> Tensor:
    return x.feats if isinstance(x, SparseTensor) else x


def _like(x: Latent, feats: Tensor) -> Latent:
    latent: Any = x.replace(feats) if isinstance(x, SparseTensor) else feats
    return latent
