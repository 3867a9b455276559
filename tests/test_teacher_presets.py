"""The DiT, SiT, REPA, LightningDiT, LaMamba and AsCAN experiments: built abstractly at full size, trained as toys."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import gen
from gen import arrays
from gen.cli import main
from gen.config import from_json, to_json
from gen.data.caches import seal
from gen.data.images import Images
from gen.errors import GenError
from gen.experiments import Preset, build, presets
from gen.experiments._latents import carried
from gen.features.alignment import patch_features
from gen.features.vit import ViTConfig
from gen.nn.network import Network
from gen.pretrained.dinov2 import IMPORTER as DINOV2
from gen.pretrained.latent_shards import LatentShards
from gen.training.budget import abstract_states
from gen.training.checks import dry_run
from gen.training.engine import train
from gen.training.logging import read_metrics
from gen.training.run import RunConfig
from gen.training.sharding import MeshConfig, bytes_per_device
from tests.test_edm_presets import image_zip
from tests.training.conformance import same

FILES = ("dit", "sit", "lightningdit", "lamamba", "ascan")
TEACHERS = (*FILES, "edm", "edm2")


def place(preset: Preset) -> str:
    """The file it stands in."""
    return preset.module.rpartition(".")[2]


MINE = {name: p for name, p in presets().items() if place(p) in FILES}
BIG = [name for name in MINE if not name.endswith("-smoke")]
FAST = (("sit-smoke", False),)  # the rest compile for half a minute together
SMOKE = [
    pytest.param(name, real, marks=[] if (name, real) in FAST else pytest.mark.slow)
    for name, preset in MINE.items()
    for real in (False, True)
    if name not in BIG and not preset.required
]
COUNTS = {  # of the published tables; REPA has three projector layers more
    "dit-xl2": 674_834_720,
    "dit-b2": 130_315_808,
    "sit-xl2": 674_816_272,
    "repa-xl2": 674_816_272 + (1152 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 768,
    "lightningdit-xl1": 674_961_824,
    "lightningdit-xl1-long": 674_961_824,
    "lightningdit-b1": 130_359_584,
    "lamamba-xl": 652_484_648,  # "652.5 M" of the published configuration
}


def shards(folder: Path, count: int = 3, shape: tuple[int, ...] = (2, 4, 4)) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for rank in range(2):
        rows = {
            name: rng.normal(size=(count + rank, *shape)).astype(np.float32) for name in ("latents", "latents_flip")
        }
        labels = np.arange(count + rank, dtype=np.int64) + 10 * rank
        arrays.write(folder / f"latents_rank{rank:02d}_shard000.safetensors", {**rows, "labels": labels})
    return folder


def cached(folder: Path, **others: np.ndarray) -> str:
    """A cache of four random latents, and `others` beside them."""
    folder.mkdir()
    latents = np.random.default_rng(0).normal(size=(4, 32, 32, 4)).astype(np.float32)
    for name, rows in {"latent": latents, "label": np.arange(4, dtype=np.int32), **others}.items():
        np.save(folder / f"{name}.npy", rows)
    return seal(folder, tokenizer="none", data="none").path


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return cached(tmp_path / "cache", encoder_0=np.zeros((4, 256, 768), np.float16))


@pytest.mark.parametrize("name", BIG)
def test_full_size_presets(name: str, cache: str, tmp_path: Path) -> None:
    data = cache if "lightningdit" not in name else str(shards(tmp_path / "shards", shape=(32, 16, 16)))
    recipe = build(name, {"data": data})
    config = recipe.config
    assert from_json(to_json(config)) == config
    assert config.name == name
    states = abstract_states(config.stages, recipe.frozen)
    sizes = {"data": 8, "fsdp": 8, "tensor": 1}
    for state in states:
        total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        assert total == COUNTS.get(name, total)
        whole = bytes_per_device(state.params, {"data": 64, "fsdp": 1, "tensor": 1}, MeshConfig().shard_from)
        assert whole == 4 * total
        assert bytes_per_device(state.params, sizes, MeshConfig().shard_from) < 1.1 * whole / 8
    assert set(recipe.artifacts) == {"normalizer"}
    assert config.generator().nfe in (99, 249, 250)


def short(config: RunConfig) -> RunConfig:
    """The run with four steps of eight, sampled by two."""
    (stage,) = config.stages
    return dataclasses.replace(
        config,
        stages=(dataclasses.replace(stage, steps=4, batch=8),),
        engine=dataclasses.replace(config.engine, quiet=True, log_every=1),
        sampler=config.sampler.changed(steps=2),
    )


@pytest.mark.parametrize(("name", "real"), SMOKE)
def test_smoke_presets_train_resume_and_sample(name: str, real: bool, tmp_path: Path) -> None:
    """On digits, and on an EDM zip of colour images."""
    config = short(build(name, {"data": image_zip(tmp_path / "images.zip", 32)} if real else {}).config)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", stop_after=2)
    assert same(train(config, tmp_path / "run"), whole)
    assert gen.load(tmp_path / "run").sample(range(2)).shape == ((2, 32, 32, 3) if real else (2, 8, 8, 1))


@pytest.mark.parametrize(("width", "patch"), [(16, 2), (47, 2), (48, 4), (64, 4), (192, 8)])
def test_a_token_of_a_smoke_preset_carries_its_patch(width: int, patch: int) -> None:
    assert carried(width, 3) == patch


@pytest.mark.parametrize(
    "name", [n for n, p in presets().items() if n.endswith("-smoke") and "data" in p.optional and place(p) in TEACHERS]
)
def test_smoke_presets_take_the_classes_of_the_data(name: str, tmp_path: Path) -> None:
    """Two folders are two classes, of a network that knows no third; images without labels train one without any."""
    for folder, classes in (("cat", 2), ("dog", 2), ("plain", 0)):
        place = tmp_path / "data" / folder if classes else tmp_path / "plain"
        place.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(place / "a.png")
    for data, classes in (("data", 2), ("plain", 0)):
        config = build(name, {"data": str(tmp_path / data)}).config
        assert config.stages[0].task.denoiser.network.num_classes == classes
    dry_run(config)


@pytest.mark.slow
def test_repa_from_images_and_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images, an official autoencoder and an official DINOv2 to a cache with features, to an aligned model's images."""
    from tests.pretrained.test_decoder import VAE, official

    zipped = image_zip(tmp_path / "images.zip", 32)
    encoder = ViTConfig(28, 14, 64, 1, 1, 16)
    arrays.write(tmp_path / "vae.safetensors", official("sd-vae", VAE))
    drawn = jax.jit(Network(encoder).init)(jax.random.key(0))
    arrays.write(tmp_path / "dino.safetensors", DINOV2.save(encoder, drawn))
    vae, cache = str(tmp_path / "vae"), str(tmp_path / "cache")
    flags = ["--network.size", "32", "--network.groups", "2"]
    assert main(["convert", str(tmp_path / "vae.safetensors"), "--out", vae, *flags]) == 0
    encode = ["encode", vae, "--data", zipped, "--out", cache, "--batch", "4"]
    with pytest.raises(GenError, match="has no encoder_0 beside its latents; make a cache with gen encode --align"):
        build("repa-smoke", {"data": cached(tmp_path / "plain")})
    align = ["--align", str(tmp_path / "dino.safetensors"), "--tokens", "8"]
    assert main([*encode, *align]) == 0
    rows = np.load(tmp_path / "cache" / "encoder_0.npy")
    assert rows.shape == (12, 64, 64)
    assert rows.dtype == np.float16
    # the features are those of the images, in order
    pictures = Images(zipped, 32).source().gather(np.arange(12))["image"]
    expected = patch_features(encoder, drawn, jnp.asarray(pictures) / 127.5 - 1.0, 8)
    np.testing.assert_allclose(rows, expected, atol=2e-3)
    assert np.abs(rows[0] - rows[1]).max() > 0.01
    assert main([*encode[:-2], *align]) == 0  # done already
    capsys.readouterr()
    assert main(encode) == 2  # a cache with features is another one
    assert "another" in capsys.readouterr().err
    recipe = build("repa-smoke", {"data": cache, "tokenizer": gen.load(vae)})
    parts = {"frozen": recipe.frozen, "artifacts": recipe.artifacts}
    whole = train(short(recipe.config), tmp_path / "whole", **parts)
    train(short(recipe.config), tmp_path / "a", stop_after=2, **parts)
    assert same(train(short(recipe.config), tmp_path / "a", **parts), whole)
    assert any("alignment" in record for record in read_metrics(tmp_path / "a"))
    assert gen.load(tmp_path / "a").sample(range(2)).shape == (2, 32, 32, 3)


class TestLatentShards:
    def test_rows_follow_the_files_and_halves_mix(self, tmp_path: Path) -> None:
        data = LatentShards(str(shards(tmp_path)))
        source = data.source()
        assert len(source) == 7
        assert [int(source[i]["label"]) for i in range(7)] == [0, 1, 2, 10, 11, 12, 13]
        mean, deviation = data.statistics()
        raw = source.gather(np.arange(7))["latent"].astype(np.float64)
        np.testing.assert_allclose(mean, raw.mean((0, 1, 2)))
        np.testing.assert_allclose(deviation, raw.std((0, 1, 2), ddof=1))
        batches = data.batches(batch=7, seed=0, start=0)
        flips = []
        for _ in range(6):
            batch = next(batches)
            for latent, label in zip(batch["latent"], batch["label"], strict=True):
                row = source[[0, 1, 2, 10, 11, 12, 13].index(label)]
                plain, flip = ((row[k] - mean) / deviation for k in ("latent", "latent_flip"))
                flips.append(np.allclose(latent, flip, atol=1e-5))
                assert flips[-1] or np.allclose(latent, plain, atol=1e-5)
        assert 8 < sum(flips) < 34  # of 42, fixed by the seed
        scaled = LatentShards(str(tmp_path), normalize=False, multiplier=0.5).normalizer()
        np.testing.assert_array_equal(scaled["shift"], [0.0, 0.0])
        np.testing.assert_array_equal(scaled["scale"], [2.0, 2.0])
        assert from_json(to_json(data)) == data

    def test_identity_is_of_the_content(self, tmp_path: Path) -> None:
        first = LatentShards(str(shards(tmp_path / "a"))).identity()
        assert LatentShards(str(shards(tmp_path / "b"))).identity() == first
        assert LatentShards(str(tmp_path / "a"), multiplier=2.0).identity() != first
        assert LatentShards(str(shards(tmp_path / "c", count=4))).identity() != first

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(GenError, match="no latent shards in"):
            LatentShards(str(tmp_path)).source()
        shards(tmp_path)
        arrays.write(tmp_path / "z.safetensors", {"latents": np.zeros((1, 2, 4, 4), np.float32)})
        with pytest.raises(GenError, match=r"z.safetensors has no latents_flip; expected a shard with"):
            LatentShards(str(tmp_path)).source()
        shards(tmp_path / "other", shape=(3, 4, 4))
        (tmp_path / "other" / "latents_rank00_shard000.safetensors").replace(tmp_path / "z.safetensors")
        with pytest.raises(GenError, match=r"z.safetensors has latents \(3, 3, 4, 4\); expected \(3, 2, 4, 4\)"):
            LatentShards(str(tmp_path)).source()
