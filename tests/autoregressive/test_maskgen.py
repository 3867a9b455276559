"""MaskGen, discrete and continuous: published sizes, captions and the empty one, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.infilling import InfillingSampler, KnownScale, LatentTokenGenerator
from gen.autoregressive.joint import TextConfig, TrunkConfig
from gen.autoregressive.maskgen import MaskGenConfig, maskgen
from gen.autoregressive.maskgen_kl import MaskGenKLConfig, maskgen_kl
from gen.autoregressive.unmasking import MaskedSampler, RisenCosineScale
from gen.data.sources import ArraySource, digits
from gen.diffusion.ddpm import DDPM
from gen.errors import GenError
from gen.nn.conditions import make_conditions
from gen.nn.network import count, param_shapes
from gen.tokenizers.encode import encode_images
from tests.autoregressive.drawn import drawn
from tests.autoregressive.learned import agreement, patch_tokenizer

TEXT = TextConfig(5, 6, 4)
TRUNK = TrunkConfig(16, 2, 2, scan=False)
VQ = MaskGenConfig(shape=(4,), vocabulary=8, trunk=TRUNK, text=TEXT)
KL = MaskGenKLConfig(shape=(4, 3), trunk=TRUNK, text=TEXT, head_depth=1, process=DDPM("linear"))
EMPTY = {"prompt": np.zeros((5, 6), np.float32), "pooled": np.zeros(6, np.float32)}


def test_published_sizes() -> None:
    vq = [count(param_shapes(maskgen(size, spare=1001))) for size in ("L", "XL")]
    kl = [count(param_shapes(maskgen_kl(size))) for size in ("L", "XL")]
    heads = [count(param_shapes(maskgen_kl(size))["head"]) for size in ("L", "XL")]
    assert vq == [604_311_552, 1_176_611_840]
    assert (kl, heads) == ([641_329_184, 1_237_301_792], [46_512_160, 72_558_112])
    with pytest.raises(GenError, match="unknown MaskGen 'M'"):
        maskgen("M")
    with pytest.raises(GenError, match="at least two blocks"):
        TrunkConfig(16, 1, 2)


def captions(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given = {"prompt": rng.normal(size=(count, 5, 6)), "pooled": rng.normal(size=(count, 6))}
    made = make_conditions(VQ.conditions, range(count), given)
    np.testing.assert_array_equal(made["aesthetic"], np.float32(6.5))
    return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}


@pytest.mark.parametrize("kind", ["vq", pytest.param("kl", marks=pytest.mark.slow)])
def test_samples_and_losses(kind: str) -> None:
    """A sample is a function of its key and caption; a dropped caption says nothing; both need the empty one."""
    model: Any = {"vq": VQ, "kl": KL}[kind]
    generator: Any = TokenGenerator(VQ, MaskedSampler(2, 3.0, guidance=RisenCosineScale(3.0)))
    if kind == "kl":
        generator = LatentTokenGenerator(KL, InfillingSampler(2, 3, guidance=KnownScale(2.0)))
    params = drawn(model)
    keys, cond, turned = jax.random.split(jax.random.key(1), 3), captions(3), np.array([2, 0, 1])
    sample = jax.jit(lambda keys, cond: generator({"net": params, "empty": EMPTY}, keys, cond))
    found = np.asarray(sample(keys, cond))
    assert found.shape == (3, *generator.shape)
    again = sample(keys[turned], {name: value[turned] for name, value in cond.items()})
    np.testing.assert_allclose(again, found[turned], rtol=1e-4, atol=1e-4)
    with pytest.raises(GenError, match="frozen role 'empty'"):
        jax.eval_shape(lambda keys: generator({"net": params}, keys, cond), keys)
    tokens = jnp.zeros((3, 4), jnp.int32) if kind == "vq" else jnp.ones((3, 4, 3))
    more = ({},) if kind == "vq" else ()
    draws = jax.jit(model.draw)(jax.random.key(2), tokens, *more) | {"dropped": jnp.array([True, False, False])}
    known = model.forced({"empty": EMPTY}, tokens if kind == "vq" else 3)
    loss = jax.jit(lambda cond: model.loss(params, tokens, {**cond, **known}, draws)[0])
    losses = loss(cond)
    other = loss({**cond, "prompt": -cond["prompt"], "pooled": -cond["pooled"]})
    assert losses.shape == (3,)
    assert (np.asarray(losses == other) == [True, False, False]).all()
    with pytest.raises(GenError, match="training with cond_dropout"):
        jax.eval_shape(lambda tokens: model.loss(params, tokens, cond, draws), tokens)


def test_continuous_refusals() -> None:
    with pytest.raises(GenError, match="drops no activations"):
        dataclasses.replace(KL, dropout=0.1)
    with pytest.raises(GenError, match="unknown MaskGen 'M'"):
        maskgen_kl("M")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_smoke_presets_learn_captions(kind: str, tmp_path: Path) -> None:
    """Digits with a caption for each class: what is made is of the class that the caption names."""
    run, out = str(tmp_path / "tokenizer"), tmp_path / "cache"
    if kind == "vq":
        patch_tokenizer(Path(run))
    else:
        assert cli.main(["train", "detok-smoke", "--outdir", run, "--engine.quiet", "true"]) == 0
    label = digits("train").arrays["label"]
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(10, 4, 8)).astype(np.float32)
    rows = tmp_path / "rows.npz"
    np.savez(rows, image=digits("train").arrays["image"], prompt=prompts[label], pooled=prompts[label].mean(1))
    _encode(run, rows, out)
    np.savez(out / "empty.npz", prompt=np.zeros((4, 8), np.float32), pooled=np.zeros(8, np.float32))
    words = [
        "train",
        f"maskgen-{kind}-smoke",
        "--data",
        str(out),
        "--tokenizer",
        run,
        "--outdir",
        str(tmp_path / "run"),
    ]
    assert cli.main([*words, "--engine.quiet", "true"]) == 0
    loaded = gen.load(tmp_path / "run")
    asked = np.arange(100) % 10
    images = loaded.sample(range(100), cond={"prompt": prompts[asked], "pooled": prompts[asked].mean(1)})
    assert agreement(images) > 0.5


def _encode(run: str, rows: Path, out: Path) -> None:
    """A cache with everything that stands beside the images."""
    loaded = gen.load(run)
    with np.load(rows) as file:
        source = ArraySource(**{name: file[name] for name in file.files})
    encode_images(loaded.tokenizer, loaded.params["tokenizer"], source, out, label="")
