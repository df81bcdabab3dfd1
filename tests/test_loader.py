import hashlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_data import sphere_sdf, write_spheres

from tasks.catalogue import DatasetVersion
from tasks.encoding import latent_set_digest
from tasks.latents import LatentsError, encode_latents, open_latents, place_views
from tasks.loader import Batch, Loader, SampleDataset, epoch_batches
from tasks.model_files import ModelFiles
from tasks.samples import SampleRef, read_index, split, write_index
from tasks.shards import read_image, read_latents
from tasks.storage import open_filesystem

COUNT, VIEWS = 7, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def samples(root):
    return write_spheres(root, COUNT, views=VIEWS)


def make(root, samples, kind="sdf", views=False, budget=100, seed=3, **ranks) -> Loader:
    filesystem, base = open_filesystem(root)
    return Loader(SampleDataset(samples, filesystem, base, kind, views, seed), budget, **ranks)


def same(a: Batch, b: Batch) -> bool:
    tensors = ((getattr(a, n), getattr(b, n)) for n in ("coords", "values", "sharp", "rgba"))
    return a.asset_ids == b.asset_ids and all(
        (x is None and y is None) or torch.equal(x, y) for x, y in tensors
    )


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    budget=st.integers(50, 120),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_sample_within_the_budget_and_equal_ranks(
    tokens, budget, world_size, epoch
):
    batches = epoch_batches(tokens, budget, 7, epoch, world_size)
    assert len(batches) % world_size == 0
    assert all(0 < sum(tokens[i] for i in batch) <= budget for batch in batches)
    unpadded = [i for batch in batches for i in batch]
    assert set(unpadded) == set(range(len(tokens)))
    repeated = len(unpadded) - len(tokens)
    assert repeated == 0 or world_size > 1
    assert batches == epoch_batches(tokens, budget, 7, epoch, world_size)


def test_epochs_and_seeds_differ_and_batches_hold_similar_sizes():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 1000, 3000).tolist()
    first, second = (epoch_batches(tokens, 4000, 7, epoch, 1) for epoch in (0, 1))
    assert first != second
    assert first != epoch_batches(tokens, 4000, 8, 0, 1)
    filled = np.array([sum(tokens[i] for i in batch) for batch in first])
    assert filled.mean() > 0.85 * 4000
    spread = [np.ptp([tokens[i] for i in batch]) for batch in first]
    assert np.mean(spread) < 150  # a random batch of this size spreads over about 750


def test_a_batch_holds_what_the_shards_hold(root, samples):
    batch = next(iter(make(root, samples, views=True, budget=1000)))
    assert batch.coords.dtype == torch.int32
    assert batch.tokens == len(batch.coords) == sum(s.tokens for s in samples)
    order = [s.asset_id for s in samples]
    for row, asset_id in enumerate(batch.asset_ids):
        index = order.index(asset_id)
        sdf = sphere_sdf(0.3 + 0.6 * index / (COUNT - 1), 32)
        rows = batch.coords[:, 0] == row
        assert torch.equal(batch.coords[rows][:, 1:], torch.from_numpy(sdf.blocks))
        error = (batch.values[rows] - torch.from_numpy(sdf.values)).abs().max()
        assert error < 5e-5  # 1.5 codes of 1 / 32768
        assert torch.equal(batch.sharp[rows], torch.from_numpy(sdf.sharp))
    assert batch.rgba.shape == (COUNT, 4, 28, 28)
    assert batch.rgba.max() == 1
    assert make(root, samples, kind="blocks").dataset[0, 0].keys() == {
        "asset_id",
        "resolution",
        "tokens",
        "coords",
    }


def test_the_last_view_is_never_drawn_and_the_others_all_are(root, samples):
    filesystem, base = open_filesystem(root)
    sample = samples[0]
    path = f"{base}/{sample.views_path}"
    held_out = read_image(filesystem, path, sample.views_row_group, VIEWS - 1)
    held_out = held_out.transpose(2, 0, 1).astype(np.float32) / 255
    dataset = make(root, samples, kind="blocks", views=True).dataset
    drawn = [dataset[0, epoch]["rgba"] for epoch in range(20)]
    assert not any(np.array_equal(image, held_out) for image in drawn)
    assert len({image.tobytes() for image in drawn}) == VIEWS - 1


def test_one_view_is_too_few(tmp_path):
    samples = write_spheres(tmp_path, 1, views=1)
    with pytest.raises(ValueError, match=r"1 view.*at least 2"):
        next(iter(make(tmp_path, samples, views=True)))


@pytest.mark.parametrize("consumed", [0, 3, 4, 9])
def test_a_loader_resumes_in_place(root, samples, consumed):
    whole = list(islice(make(root, samples, views=True), consumed + 5))
    first = make(root, samples, views=True)
    batches = list(islice(first, consumed))
    second = make(root, samples, views=True)
    second.load_state_dict(first.state_dict())
    batches += islice(second, 5)
    assert all(same(a, b) for a, b in zip(whole, batches, strict=True))


def test_worker_processes_give_the_same_batches(root, samples):
    alone = list(islice(make(root, samples, views=True), 6))
    helped = list(islice(make(root, samples, views=True, workers=1), 6))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_ranks_share_an_epoch(root, samples):
    ranks = [make(root, samples, rank=r, world_size=2) for r in range(2)]
    length = len(ranks[0]._batches(0))
    assert length == len(ranks[1]._batches(0))
    seen = {a for rank in ranks for batch in islice(rank, length) for a in batch.asset_ids}
    assert seen == {s.asset_id for s in samples}
    assert [(r.epoch, r.position) for r in ranks] == [(1, 0), (1, 0)]


def test_other_ranks_only_at_the_end_of_an_epoch(root, samples):
    loader = make(root, samples)
    length = len(loader._batches(0))
    list(islice(loader, 1))
    with pytest.raises(ValueError, match=r"batch 1 of epoch 0 on 1 rank\(s\).* on 2"):
        make(root, samples, world_size=2).load_state_dict(loader.state_dict())
    list(islice(loader, length - 1))
    resumed = make(root, samples, world_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.epoch, resumed.position) == (1, 0)


@pytest.mark.parametrize("change", [{"seed": 4}, {"budget": 90}])
def test_other_data_is_refused(root, samples, change):
    state = make(root, samples).state_dict()
    with pytest.raises(ValueError, match="other samples, token budget or seed"):
        make(root, samples, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="other samples"):
        make(root, samples[:-1]).load_state_dict(state)


def test_samples_above_the_budget_are_left_out_and_said_so(root, samples, caplog):
    largest = max(s.tokens for s in samples)
    loader = make(root, samples, budget=largest - 1)
    assert loader.left_out == sum(s.tokens == largest for s in samples)
    assert "exceed the token budget" in caplog.text
    with pytest.raises(ValueError, match="no sample fits"):
        make(root, samples, budget=1)


def test_an_index_keeps_references_and_metadata(tmp_path, samples):
    filesystem, base = open_filesystem(tmp_path)
    write_index(filesystem, f"{base}/index.parquet", samples, {"version": "3"})
    assert read_index(filesystem, f"{base}/index.parquet") == (samples, {"version": "3"})
    write_index(filesystem, f"{base}/none.parquet", [])
    assert read_index(filesystem, f"{base}/none.parquet")[0] == []


def test_a_split_depends_on_the_asset_alone():
    def sample(i, resolution):
        asset_id = hashlib.sha256(str(i).encode()).hexdigest()
        return SampleRef(asset_id, resolution, 1, "", 0, "", 0)

    many = [sample(i, r) for i in range(500) for r in (64, 128)]
    training, held_out = split(many, 0.2)
    assert 0.15 < len(held_out) / len(many) < 0.25
    assert not {s.asset_id for s in training} & {s.asset_id for s in held_out}
    assert split(many[:10], 0.2)[1] == [s for s in held_out if s in many[:10]]
    assert split(many, 0.0) == (many, [])


class Encoder:
    """Latents that tell samples apart; counts its calls, and may be killed at one of them."""

    def __init__(self, fail_at=-1):
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, sample):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        rng = np.random.default_rng(int(sample.asset_id[:8], 16))
        coords = np.argwhere(np.ones((2, 2, 2)))[: 1 + sample.tokens % 7].astype(np.int32)
        mean = rng.normal((1, -20), (2, 0.5), (len(coords), 2))
        return coords, mean.astype(np.float32)


def test_latents_are_kept_normalised_and_resumed(root, samples, monkeypatch):
    monkeypatch.setattr("tasks.latents.PART_SAMPLES", 2)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(Encoder(fail_at=5), samples, root, "digest")
    with pytest.raises(LatentsError, match="run encode-latents"):
        open_latents(root, "digest")
    second = Encoder()
    found = encode_latents(second, samples, root, "digest")
    assert second.calls == COUNT - 4  # two parts of two were complete

    expected = [Encoder()(sample) for sample in samples]
    filesystem, base = open_filesystem(root)
    for sample, (coords, mean) in zip(found.samples, expected, strict=True):
        stored = read_latents(filesystem, f"{base}/{sample.path}", sample.row_group)
        assert np.array_equal(stored[0], coords)
        assert np.array_equal(stored[1], mean)
        assert sample.tokens == len(coords)
    together = np.concatenate([mean for _, mean in expected])
    assert np.allclose(found.mean, together.mean(0), atol=1e-5)
    assert np.allclose(found.scale, together.std(0), rtol=1e-4)

    again = Encoder()
    assert encode_latents(again, samples, root, "digest").samples == found.samples
    assert again.calls == 0
    fewer = encode_latents(again, samples[:4], root, "digest")
    assert again.calls == 0
    assert len(fewer.samples) == 4

    batch = next(iter(make(root, list(found.samples), kind="latents", views=True)))
    assert batch.latents.shape == (len(batch.coords), 2)
    assert batch.tokens == len(batch.coords)


def test_pictures_of_a_rebuilt_shard_are_found_and_nothing_is_encoded_again(tmp_path, samples):
    made = encode_latents(Encoder(), samples, tmp_path, "digest")
    moved = [replace(s, views_path="shards/new/assets.parquet", path="new") for s in samples]
    encoder = Encoder()
    again = encode_latents(encoder, moved, tmp_path, "digest")
    assert encoder.calls == 0
    assert {s.views_path for s in again.samples} == {"shards/new/assets.parquet"}
    assert [s.path for s in again.samples] == [s.path for s in made.samples]
    reopened = open_latents(tmp_path, "digest")
    assert reopened.samples == again.samples
    assert np.array_equal(reopened.mean, made.mean)
    assert np.array_equal(reopened.scale, made.scale)

    # A training that opens the set finds the dataset version's pictures too.
    back = place_views(reopened, samples, tmp_path)
    assert back.samples == made.samples
    assert open_latents(tmp_path, "digest").samples == made.samples
    with pytest.raises(LatentsError, match=r"digest has 7 samples and the dataset version 6"):
        place_views(reopened, samples[1:], tmp_path)


def test_latents_are_of_weights_and_not_of_a_models_name():
    dataset = DatasetVersion("root", 3, "ab" * 32)
    vae = ModelFiles("gigashape-tiny-vae/1", "12" * 32, "sqlite:///a.db")
    anew = replace(vae, weights="34" * 32)  # version 1 of a registry that was made anew
    elsewhere = replace(vae, reference="gigashape-tiny-vae/7", uri="http://server")
    assert latent_set_digest(dataset, vae, 64) == latent_set_digest(dataset, elsewhere, 64)
    digests = {latent_set_digest(dataset, m, r) for m in (vae, anew) for r in (64, 128)}
    assert len(digests) == 4


def test_latents_that_are_not_finite_are_refused(tmp_path, samples):
    def encode(sample):
        return np.zeros((1, 3)), np.full((1, 2), np.nan)

    with pytest.raises(LatentsError, match="aren't finite"):
        encode_latents(encode, samples, tmp_path, "digest")
    assert not list(Path(tmp_path).rglob("*.parquet"))
