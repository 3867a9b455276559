"""A model of text features, from data with a mask to samples: the same path as labels."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gen
from gen.cli import main
from gen.data.images import Arrays
from gen.diffusion.backbones.backbone import BackboneConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.kinds import KINDS
from gen.nn.conditions import Condition
from gen.sampling.generator import Sampler
from gen.sampling.guidance import ClassifierFree
from gen.training.engine import train
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

LENGTH, WIDTH = 5, 3


@dataclasses.dataclass(frozen=True)
class Reader(BackboneConfig):
    """Adds a layer of the mean of the real text features to every pixel."""

    size: tuple[int, ...] = (8, 8)
    channels: int = 1

    @property
    def conditions(self) -> dict[str, Condition]:
        return {"text": Condition((LENGTH, WIDTH), mask="text_mask")}

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Reader(rngs)


class _Reader(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.mix = nnx.Linear(2, 1, rngs=rngs)
        self.read = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.nothing = nnx.Param(jnp.zeros((LENGTH, WIDTH)))

    def __call__(self, x, times, cond, *, controls=None, taps=(), stop=False):
        mask = cond["text_mask"][..., None]
        text = jnp.where(mask, cond["text"], 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)
        both = jnp.stack([x[..., 0], jnp.broadcast_to(times[0][:, None, None], x.shape[:-1])], axis=-1)
        return self.mix(both) + self.read(text)[:, None, None], {}

    def null(self, cond):
        text = jnp.broadcast_to(self.nothing[...], cond["text"].shape)
        return {**cond, "text": text, "text_mask": jnp.ones_like(cond["text_mask"])}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(KINDS, "conformance", {"toy-reader": f"{__name__}:Reader"})
    rng = np.random.default_rng(0)
    text = rng.normal(size=(16, LENGTH, WIDTH)).astype(np.float16)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (16, 1))
    image = rng.integers(0, 256, (16, 8, 8, 1), np.uint8)
    (tmp_path / "rows").mkdir()
    for name, values in {"image": image, "text": text, "text_mask": mask}.items():
        np.save(tmp_path / "rows" / f"{name}.npy", values)
    task = DenoiserTask(Denoiser(Reader(), Linear()), dropout=0.3)
    stage = Stage("only", task, 3, 8, Arrays(str(tmp_path / "rows")))
    sampler = Sampler(steps=2, guidance=ClassifierFree(2.0))
    train(RunConfig("text", (stage,), sampler=sampler, engine=EngineConfig(quiet=True)), tmp_path / "run")
    return tmp_path / "run"


def test_text_is_read_and_padding_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = gen.load(run)
    rng = np.random.default_rng(1)
    text, mask = rng.normal(size=(2, LENGTH, WIDTH)).astype(np.float32), np.arange(LENGTH) < np.array([[2], [4]])
    images = loaded.sample(range(2), cond={"text": text, "text_mask": mask})
    assert images.shape == (2, 8, 8, 1)
    padded = np.where(mask[..., None], text, 100.0)
    np.testing.assert_array_equal(loaded.sample(range(2), cond={"text": padded, "text_mask": mask}), images)
    assert (loaded.sample(range(2), cond={"text": text[::-1], "text_mask": mask[::-1]}) != images).any()
    with pytest.raises(GenError, match=r"'text' .* has no default; give an array of it"):
        loaded.sample(range(2))
    with pytest.raises(GenError, match="not class-conditional; leave the label out"):
        loaded.sample(range(2), 3, cond={"text": text})
    np.save(run / "text.npy", text)
    np.save(run / "mask.npy", mask)
    args = ["sample", str(run), "--seeds", "0-1", "--out", str(run / "x.npz")]
    assert main([*args, "--cond", f"text={run}/text.npy", f"text_mask={run}/mask.npy"]) == 0
    with np.load(run / "x.npz") as file:
        np.testing.assert_allclose(file["arr_0"].astype(int), images.astype(int), atol=1)
    assert main([*args, "--cond", f"text={run}/nothing.npy"]) == 2
    assert "cannot be read as an array" in capsys.readouterr().err
    np.savez(run / "real.npz", np.random.default_rng(2).integers(0, 256, (6, 8, 8, 1), np.uint8))
    np.save(run / "text.npy", text[0])
    assert main(["evaluate", str(run), "--reference", str(run / "real.npz"), "--cond", f"text={run}/text.npy"]) == 0
    assert f"scores 6 samples, as many as {run}/real.npz holds; --count N for another number" in capsys.readouterr().out


def test_data_without_the_text_are_refused() -> None:
    task = DenoiserTask(Denoiser(Reader(), Linear()))
    row = {"image": np.zeros((1, 8, 8, 1), np.uint8)}
    with pytest.raises(GenError, match="'text' is missing; the model takes"):
        task.check(row)
    with pytest.raises(GenError, match="'text_mask' is missing"):
        task.check(row | {"text": np.zeros((1, LENGTH, WIDTH))})
