"""Loads the pretrained image encoder, from a local folder or from the hub at a pinned revision."""

from pathlib import Path

from model.condition import DINOv2
from model.config import EncoderConfig


class EncoderUnavailableError(RuntimeError):
    """The pretrained image encoder can't be loaded; says from where, and what to do."""


def load_image_encoder(config: EncoderConfig) -> DINOv2:
    """Return the frozen DINOv2 that `config` names: from config.path if set, else from the hub.

    Never anything else in its place: raises EncoderUnavailableError when it can't be had, and
    ValueError when its sizes are not those of `config`.
    """
    if config.kind != "dinov2":
        raise ValueError(f'encoder.kind is "{config.kind}": only "dinov2" is loaded from weights')
    from transformers import Dinov2WithRegistersModel  # 3 s to import; small-vit has no need of it

    place = config.path or config.name
    if config.path and not (Path(config.path) / "config.json").is_file():
        raise EncoderUnavailableError(
            f'encoder.path is "{config.path}", where there is no config.json: give the folder that '
            f"`hf download {config.name} --revision {config.revision} --local-dir FOLDER` makes"
        )
    try:
        backbone = Dinov2WithRegistersModel.from_pretrained(
            place, revision="main" if config.path else config.revision
        )
    except (OSError, ValueError) as error:
        raise EncoderUnavailableError(
            f"the image encoder {place} could not be loaded; set encoder.path to a local copy of "
            f"it, or take a preset whose encoder.kind is small-vit. The cause: {error}"
        ) from error
    found = {
        "width": backbone.config.hidden_size,
        "blocks": backbone.config.num_hidden_layers,
        "heads": backbone.config.num_attention_heads,
        "patch": backbone.config.patch_size,
        "registers": backbone.config.num_register_tokens,
    }
    wrong = {k: (getattr(config, k), v) for k, v in found.items() if getattr(config, k) != v}
    if wrong:
        told = ", ".join(
            f"{k} is {a} in the configuration, {b} there" for k, (a, b) in wrong.items()
        )
        raise ValueError(f"{place} has other sizes than the encoder's configuration: {told}")
    return DINOv2(backbone, config.image_size)
