"""The DiT, SiT, REPA, LightningDiT, LaMamba and AsCAN experiments: built abstractly at full size, trained as toys."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import gen
from gen.config import from_json, to_json
from gen.data.caches import seal
from gen.errors import GenError
from gen.experiments import build, presets
from gen.pretrained.latent_shards import LatentShards
from gen.pretrained.readers import write_weights
from gen.training.engine import abstract_states, dry_run, train
from gen.training.sharding import MeshConfig, bytes_per_device
from tests.training.conformance import same

FILES = ("dit", "sit", "lightningdit", "lamamba", "ascan")
MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] in FILES}
BIG = [name for name, preset in MINE.items() if preset.required == ("data",)]
SLOW = ("lamamba-smoke", "ascan-smoke")  # U-Nets of many different stages: half a minute of compiling
SMOKE = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MINE if name.endswith("-smoke")
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
        arrays = {
            name: rng.normal(size=(count + rank, *shape)).astype(np.float32) for name in ("latents", "latents_flip")
        }
        labels = np.arange(count + rank, dtype=np.int64) + 10 * rank
        write_weights(folder / f"latents_rank{rank:02d}_shard000.safetensors", {**arrays, "labels": labels})
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cache"
    folder.mkdir()
    np.save(folder / "latent.npy", rng.normal(size=(4, 32, 32, 4)).astype(np.float32))
    np.save(folder / "label.npy", np.arange(4, dtype=np.int32))
    return seal(folder, tokenizer="none", data="none").path


@pytest.mark.parametrize("name", BIG)
def test_full_size_presets(name: str, cache: str, tmp_path: Path) -> None:
    data = cache if "lightningdit" not in name else str(shards(tmp_path / "shards", shape=(32, 16, 16)))
    recipe = build(name, {"data": data})
    config = recipe.config
    assert from_json(to_json(config)) == config
    assert config.name == name
    states = abstract_states(config, recipe.frozen)
    sizes = {"data": 8, "fsdp": 8, "tensor": 1}
    for state in states:
        total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        assert total == COUNTS.get(name, total)
        whole = bytes_per_device(state.params, {"data": 64, "fsdp": 1, "tensor": 1}, MeshConfig().shard_from)
        assert whole == 4 * total
        assert bytes_per_device(state.params, sizes, MeshConfig().shard_from) < 1.1 * whole / 8
    lines = dry_run(config, frozen=recipe.frozen, devices=64)
    assert f"{total:,} parameters" in lines[0]
    assert set(recipe.artifacts) == {"normalizer"}
    assert config.generator.nfe in (99, 249, 250)


@pytest.mark.parametrize("name", SMOKE)
def test_smoke_presets_train_resume_and_sample(name: str, tmp_path: Path) -> None:
    recipe = build(name, {})
    (stage,) = recipe.config.stages
    config = dataclasses.replace(
        recipe.config,
        stages=(dataclasses.replace(stage, steps=4, batch=8),),
        engine=dataclasses.replace(recipe.config.engine, quiet=True),
    )
    sampler = dataclasses.replace(config.generator.sampler, steps=2)
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, sampler=sampler))
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", stop_after=2)
    assert same(train(config, tmp_path / "run"), whole)
    assert gen.load(tmp_path / "run").sample(range(2)).shape == (2, 8, 8, 1)


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
        write_weights(tmp_path / "z.safetensors", {"latents": np.zeros((1, 2, 4, 4), np.float32)})
        with pytest.raises(GenError, match=r"z.safetensors has no latents_flip; expected a shard with"):
            LatentShards(str(tmp_path)).source()
        shards(tmp_path / "other", shape=(3, 4, 4))
        (tmp_path / "other" / "latents_rank00_shard000.safetensors").replace(tmp_path / "z.safetensors")
        with pytest.raises(GenError, match=r"z.safetensors has latents \(3, 3, 4, 4\); expected \(3, 2, 4, 4\)"):
            LatentShards(str(tmp_path)).source()
