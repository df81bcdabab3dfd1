"""Image encoders, packing of foreground tokens, and the null condition."""

import pytest
import torch
from torch.nn import functional
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from model.condition import Condition, DINOv2, SmallViT, SparseConditioning
from model.config import EncoderConfig

VIT = EncoderConfig(
    kind="small-vit", image_size=48, patch=12, width=24, blocks=2, heads=2, registers=2
)


def dinov2(size: int) -> DINOv2:
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28
    )
    return DINOv2(Dinov2WithRegistersModel(config), size)


def test_foreground_and_special_tokens_are_packed_with_their_positions() -> None:
    torch.manual_seed(0)
    conditioning = SparseConditioning(10, 24)
    patches, special = torch.randn(2, 16, 10), torch.randn(2, 3, 10)
    alpha = torch.zeros(2, 32, 32)  # patches of 8 pixels
    alpha[0, 9, 31] = 1  # one pixel keeps patch row 1, column 3
    alpha[1, 0:9, 0] = 0.9  # rows 0 and 1 of column 0
    alpha[1, 20, 20] = 0.2  # too faint
    condition = conditioning(patches, special, alpha)
    assert condition.mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert not condition.tokens[0, 4].any()

    def expected(tokens: torch.Tensor, places: list[list[int]]) -> torch.Tensor:
        return conditioning.project(tokens) + conditioning.position(torch.tensor(places))

    specials = [[0, 0, 1]] * 3
    first = torch.cat([special[0], patches[0, [7]]])
    torch.testing.assert_close(condition.tokens[0, :4], expected(first, [*specials, [3, 1, 0]]))
    second = torch.cat([special[1], patches[1, [0, 4]]])
    torch.testing.assert_close(
        condition.tokens[1], expected(second, [*specials, [0, 0, 0], [0, 1, 0]])
    )


def test_condition_of_a_batch_equals_samples_alone() -> None:
    torch.manual_seed(0)
    conditioning = SparseConditioning(10, 24)
    patches, special, alpha = torch.randn(3, 16, 10), torch.randn(3, 1, 10), torch.rand(3, 9, 9)
    alpha[1] = 0  # no foreground: the special token is left
    together = conditioning(patches, special, alpha * 0.7)
    assert together.mask[1].sum() == 1
    for i in range(3):
        part = slice(i, i + 1)
        alone = conditioning(patches[part], special[part], alpha[part] * 0.7)
        torch.testing.assert_close(together.tokens[i][together.mask[i]], alone.tokens[0])
    opaque = conditioning(patches, special, torch.ones(3, 9, 9))
    assert opaque.mask.shape == (3, 17)
    assert opaque.mask.all()


def test_patches_of_no_square_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens"):
        SparseConditioning(4, 6)(torch.zeros(1, 12, 4), torch.zeros(1, 1, 4), torch.ones(1, 8, 8))


def test_null_and_dropped_conditions() -> None:
    condition = Condition(torch.ones(4000, 2, 3), torch.rand(4000, 2) > 0.5)
    null = condition.null()
    assert not null.tokens.any()
    assert null.mask is condition.mask
    dropped = condition.drop(0.1, torch.Generator().manual_seed(0))
    per_sample = dropped.tokens.flatten(1).mean(1)
    assert set(per_sample.tolist()) == {0.0, 1.0}
    assert float(per_sample.mean()) == pytest.approx(0.9, abs=0.02)
    assert torch.equal(condition.drop(0.0).tokens, condition.tokens)
    assert not condition.drop(1.0).tokens.any()


def test_small_vit_sees_colour_alpha_and_place() -> None:
    torch.manual_seed(0)
    encoder = SmallViT(VIT)
    rgba = torch.rand(2, 4, 60, 60)
    patches, special = encoder(rgba)
    assert patches.shape == (2, 16, 24)
    assert special.shape == (2, 3, 24)
    torch.testing.assert_close(encoder(rgba[1:])[0], patches[1:])
    # What stands behind alpha 0 is nothing.
    clear = rgba.clone()
    clear[:, 3, :, :30] = 0
    hidden = clear.clone()
    hidden[:, :3, :, :30] = 1
    torch.testing.assert_close(encoder(hidden)[0], encoder(clear)[0])
    assert not torch.allclose(encoder(clear)[0], patches, atol=1e-3)
    assert not torch.allclose(encoder(rgba.flip(3))[1], special, atol=1e-3)
    (patches.square().sum() + special.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dinov2_tokens_are_those_before_the_last_norm() -> None:
    encoder = dinov2(56)
    for parameter in encoder.backbone.parameters():  # the first ones are too small to tell
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.zeros_(encoder.backbone.layernorm.bias)
    rgba = torch.rand(2, 4, 56, 56)
    patches, special = encoder(rgba)
    assert patches.shape == (2, 16, 24)
    assert special.shape == (2, 5, 24)
    tokens = torch.cat([special, patches], dim=1)
    torch.testing.assert_close(tokens, functional.layer_norm(tokens, (24,)), atol=1e-4, rtol=1e-4)
    # The backbone's own output is the same tokens under its last norm, scale and all.
    composite = rgba[:, :3] * rgba[:, 3:]
    own = encoder.backbone((composite - encoder.mean) / encoder.std).last_hidden_state
    torch.testing.assert_close(tokens * encoder.backbone.layernorm.weight, own)


def test_dinov2_is_frozen_and_resizes() -> None:
    encoder = dinov2(28)
    torch.nn.ModuleList([encoder]).train()
    assert encoder.training
    assert not encoder.backbone.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    patches, _ = encoder(torch.rand(1, 4, 90, 90))
    assert patches.shape == (1, 4, 24)
    assert not patches.requires_grad
    white = DINOv2(encoder.backbone, 28, background=1.0)
    clear = torch.zeros(1, 4, 28, 28)
    opaque_white = torch.ones(1, 4, 28, 28)
    torch.testing.assert_close(white(clear)[0], encoder(opaque_white)[0])


def test_images_without_alpha_are_refused() -> None:
    for encoder in (SmallViT(VIT), dinov2(28)):
        with pytest.raises(ValueError, match=r"\[1, 3, 8, 8\].*\[B, 4, S, S\]"):
            encoder(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="uint8"):
            encoder(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
