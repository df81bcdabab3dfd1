"""Presets: `configs/{tiny,small,paper}.toml` read into frozen, checked configurations.

    preset = load_preset("tiny", {"training.vae.steps": 100, "data.source": "folder:meshes"})

Needs torch and pyarrow only, so that a bare training machine reads the same files.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from model.config import DiTConfig, EncoderConfig, StructureConfig, VAEConfig
from tasks.training import TrainingConfig

Config = TypeVar("Config")


class PresetError(ValueError):
    """A preset's file or an override that is wrong: names the file, the key and the value."""


@dataclass(frozen=True)
class DataConfig:
    """What a refresh makes.

    source: as `gigashape refresh --source` takes it. resolutions: voxels along an axis of
    [-1, 1], multiples of 8. views, view_size: pictures an asset, pixels of a side. held_out: share
    of assets kept out of training for evaluation. engine: of the conversion.
    """

    source: str
    resolutions: tuple[int, ...]
    views: int
    view_size: int
    held_out: float = 0.0
    engine: Literal["sparse", "mesh2sdf"] = "sparse"

    def __post_init__(self) -> None:
        for resolution in self.resolutions:
            if resolution <= 0 or resolution % 8:
                raise ValueError(f"resolutions has {resolution}; take multiples of 8")
        if self.views < 2:
            raise ValueError(f"views is {self.views}; take 2 or more: the last is held out")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be in [0, 1)")


@dataclass(frozen=True)
class SamplingConfig:
    """Euler steps, guidance strength and timestep shift of one generation stage."""

    steps: int = 50
    guidance: float = 7.0
    shift: float = 6.0

    def __post_init__(self) -> None:
        for name in ("steps", "shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")


@dataclass(frozen=True)
class EvaluationConfig:
    """How models are scored.

    points: sampled on a surface, and in a volume. assets: most assets scored. picture_size: pixels
    of a side of what people see; normal_size: of the normal pictures that are scored.
    """

    points: int = 100_000
    assets: int = 64
    picture_size: int = 256
    normal_size: int = 512


@dataclass(frozen=True)
class Preset:
    """One screen of choices for the whole pipeline.

    training, sampling: by stage name: `vae`, `vae-R`, `structure-vae`, `structure`, `dit-R`.
    """

    name: str
    data: DataConfig
    vae: VAEConfig
    structure: StructureConfig
    dit: DiTConfig
    encoder: EncoderConfig
    training: dict[str, TrainingConfig]
    sampling: dict[str, SamplingConfig] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"name is {self.name!r}; it names the registered models: take letters, digits, "
                "dots, dashes and underscores"
            )
        for stage, config in self.training.items():
            missing = sorted(set(config.resolutions) - set(self.data.resolutions))
            if missing:
                raise ValueError(
                    f"training.{stage}.resolutions has {missing}, which data.resolutions "
                    f"{list(self.data.resolutions)} lacks"
                )
            if config.start_from and config.start_from not in self.training:
                raise ValueError(
                    f'training.{stage}.start_from is "{config.start_from}"; take one of '
                    f"{sorted(self.training)}"
                )

    def dit_stages(self) -> list[str]:
        """Return the SS-DiT's stages, coarse to fine."""
        stages = [stage for stage in self.training if stage.startswith("dit-")]
        return sorted(stages, key=lambda stage: int(stage.removeprefix("dit-")))


def load_preset(name: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Return a preset by its name, or read it from a path that ends in .toml.

    overrides: values by dotted key, such as {"training.vae.steps": 100}; they go before the file.
    Raises PresetError for a file, key or value that doesn't fit.
    """
    if name.endswith(".toml"):
        source, where = Path(name), name
    else:
        folder = files("configs")
        names = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))
        if name not in names:
            raise PresetError(f'no preset "{name}": take one of {names}, or the path of a .toml')
        source, where = Path(str(folder)) / f"{name}.toml", f"configs/{name}.toml"
    try:
        tables = tomllib.loads(source.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PresetError(f"{where}: {error}") from error
    for key, value in (overrides or {}).items():
        table = tables
        *parents, last = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return build_config(Preset, tables, where)


def build_config(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Return a configuration from nested mappings; `where` names their file in PresetErrors."""
    built: Config = _build(kind, values, where, "")
    return built


def config_digest(*configs: object) -> str:
    """Return 12 hexadecimal digits that stand for the values of configurations."""
    values = [asdict(config) if is_dataclass(config) else config for config in configs]  # type: ignore[arg-type]
    return sha256(repr(values).encode()).hexdigest()[:12]


def _build(kind: Any, value: Any, where: str, key: str) -> Any:
    """Return `value`, as TOML gives it, as a value of type `kind`; `key` is its dotted name."""
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where, key)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {k: _build(arguments[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build(arguments[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = list(arguments) if origin is Literal else getattr(kind, "__name__", kind)
    raise PresetError(f"{where}: {key} = {value!r}: expected {expected}")


def _build_dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise PresetError(f"{where}: {key} = {value!r}: expected a table")
    dot = f"{key}." if key else ""
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise PresetError(
                f"{where}: {dot}{name} = {value[name]!r}: unknown key; take one of {sorted(hints)}"
            )
    for f in fields(kind):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in value:
            raise PresetError(f"{where}: {dot}{f.name} is missing")
    built = {k: _build(hints[k], v, where, f"{dot}{k}") for k, v in value.items()}
    try:
        return kind(**built)
    except ValueError as error:
        if isinstance(error, PresetError):
            raise
        raise PresetError(f"{where}: {key or 'preset'}: {error}") from error
