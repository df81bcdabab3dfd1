from dataclasses import asdict

import pytest

from model.config import VAEConfig
from tasks.presets import PresetError, build_config, config_digest, load_preset


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_every_preset_loads_and_trains_what_generation_needs(name):
    preset = load_preset(name)
    assert preset.name == name
    assert {"vae", "structure-vae", "structure"} <= set(preset.training)
    assert preset.dit_stages()
    assert set(preset.sampling) == {"structure", *preset.dit_stages()}
    # Latents and image tokens fit the transformers that take them.
    assert preset.dit.latent_channels == preset.vae.latent_channels
    finest = max(preset.training["structure"].resolutions)
    assert preset.structure.grid * 8 == finest
    for stage in preset.dit_stages():
        assert preset.training[stage].resolutions == (int(stage.removeprefix("dit-")),)
    if preset.encoder.kind == "dinov2":
        assert len(preset.encoder.revision) == 40


def test_the_paper_preset_has_the_published_sizes():
    paper = load_preset("paper")
    assert paper.vae == VAEConfig()
    assert (paper.dit.width, paper.dit.blocks, paper.dit.heads, paper.dit.kv_heads) == (
        1024,
        24,
        32,
        2,
    )
    rates = [paper.training[stage].learning_rate for stage in paper.dit_stages()]
    assert rates == [1e-4, 1e-4, 5e-5, 2e-5]
    starts = [paper.training[stage].start_from for stage in paper.dit_stages()]
    assert starts == ["", *paper.dit_stages()[:-1]]


def test_overrides_go_before_the_file():
    preset = load_preset("tiny", {"training.vae.steps": 7, "data.source": "folder:x"})
    assert preset.training["vae"].steps == 7
    assert preset.data.source == "folder:x"
    assert preset.training["structure"] == load_preset("tiny").training["structure"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.vae.stepz": 7}, r"configs/tiny.toml: training.vae.stepz = 7: unknown key"),
        ({"training.vae.steps": "7"}, r"training.vae.steps = '7': expected int"),
        ({"training.vae.steps": True}, r"training.vae.steps = True: expected int"),
        ({"training.vae.steps": 0}, r"training.vae: TrainingConfig.steps is 0"),
        ({"training.vae.schedule": "step"}, r"schedule = 'step': expected \['constant', 'cosine'"),
        ({"data.resolutions": [60]}, r"data: resolutions has 60; take multiples of 8"),
        ({"data.resolutions": 64}, r"data.resolutions = 64: expected"),
        ({"data.resolutions": [64.5]}, r"data.resolutions\[0\] = 64.5: expected int"),
        ({"data.views": 1}, r"data: views is 1"),
        ({"data.resolutions": [128]}, r"training.vae.resolutions has \[64\]"),
        ({"training.dit-64.start_from": "dit-32"}, r'start_from is "dit-32"; take one of'),
        ({"vae.channels": 60}, r"vae: VAEConfig.channels is 60"),
        ({"vae": 3}, r"vae = 3: expected a table"),
    ],
)
def test_a_mistake_names_file_key_and_value(overrides, message):
    with pytest.raises(PresetError, match=message):
        load_preset("tiny", overrides)


def test_files_by_path_and_their_mistakes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n")
    with pytest.raises(PresetError, match=r"mine.toml: data is missing"):
        load_preset(str(path))
    path.write_text("name = \n")
    with pytest.raises(PresetError, match=r"mine.toml: .*line 1"):
        load_preset(str(path))
    with pytest.raises(PresetError, match=r"nowhere.toml: .*No such file"):
        load_preset(str(tmp_path / "nowhere.toml"))
    with pytest.raises(PresetError, match=r'no preset "huge": take one of .*tiny'):
        load_preset("huge")


def test_a_configuration_survives_a_mapping_and_digests_tell_them_apart():
    tiny = load_preset("tiny")
    for config in (tiny.vae, tiny.structure, tiny.dit, tiny.encoder, tiny.training["vae"]):
        assert build_config(type(config), asdict(config), "here") == config
    digests = {config_digest(tiny.vae), config_digest(tiny.dit), config_digest(tiny.vae, tiny.dit)}
    assert len(digests) == 3
    assert config_digest(tiny.vae) == config_digest(load_preset("tiny").vae)
