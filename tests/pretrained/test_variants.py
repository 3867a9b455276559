"""Variants of published systems: known by their files where those tell, by an option where not, or refused by name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.objectives import DDPMLoss, EDMLoss, TimeSampler, Uncertain, VelocityMatching
from gen.diffusion.transport import NoiseMatching
from gen.errors import GenError
from gen.nn.mamba import Scan2D
from gen.nn.network import Network
from gen.pretrained import adm, dit, edm2, lamamba
from gen.pretrained.systems import system
from tests.pretrained.test_decoder import DIT, EDM2, LAMAMBA, LIGHT, official
from tests.pretrained.test_from_file import ADM, CHAIN, SONG

TIME = jnp.asarray([3.0, 500.0])


def same(importer: Any, config: Any, **options: Any) -> dict[str, np.ndarray]:
    """What `config` writes is read as `config`, with every array in its place; returns our parameters."""
    weights = official(importer.name, config)
    found = importer.infer(weights, **options)
    assert found == config
    params = importer.load(weights, found)[1]
    back = importer.save(found, params)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    return params


def test_a_dit_without_a_label_table() -> None:
    same(dit.IMPORTER, dataclasses.replace(DIT, num_classes=0, null_class=False), heads=2)


def test_a_dit_whose_label_table_is_the_null_row() -> None:
    labelled = dataclasses.replace(DIT, num_classes=1, null_class=False)
    weights = official("dit", labelled)
    alone = dataclasses.replace(DIT, num_classes=0)
    assert dit.IMPORTER.infer(weights, heads=2) == alone
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    nets = (labelled, {"label": jnp.zeros(2, jnp.int32)}), (alone, {})
    outs = [Network(c)(dit.IMPORTER.load(weights, c)[1], x, (TIME,), cond)[0] for c, cond in nets]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)


def test_a_dit_that_is_not_square() -> None:
    wide = dataclasses.replace(DIT, size=(4, 8))
    same(dit.IMPORTER, wide, heads=2, size=[4, 8])
    weights = official("dit", wide)
    with pytest.raises(GenError, match=r"8 patches of 2x2, which are not latents of 4x4; say their sides"):
        dit.IMPORTER.infer(weights, heads=2)
    with pytest.raises(GenError, match="not latents of 8x8"):
        dit.IMPORTER.infer(weights, heads=2, size=[8, 8])
    with pytest.raises(GenError, match="pos_embed with other values"):  # the same number of patches
        dit.IMPORTER.load(weights, dit.IMPORTER.infer(weights, heads=2, size=[8, 4]))


def test_other_widths_of_edm2_s_embedding_and_noise() -> None:
    config = dataclasses.replace(EDM2, noise=8, emb=24)
    params = same(edm2.IMPORTER, config, head_width=16)
    assert params["emb_noise"]["kernel"].shape == (8, 24)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    out, _ = Network(config)(params, x, (TIME,), {"label": jnp.zeros(2, jnp.int32)})
    assert out.shape == x.shape
    assert np.isfinite(out).all()


def test_a_lamamba_without_convolutions() -> None:
    params = same(lamamba.IMPORTER, dataclasses.replace(LAMAMBA, conv=1))
    assert "conv" not in params["down_0"]["scan"]
    layer = Scan2D(8, "snake", conv=1, rngs=_rngs())
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 8))
    inner, gate = layer.project(x)
    both = jax.nn.silu(layer.in_proj(x))  # the activation stays
    np.testing.assert_allclose(jnp.concatenate([inner, gate], -1), both, rtol=1e-6)


def _rngs() -> Any:
    from flax import nnx

    return nnx.Rngs(0)


def test_a_lamamba_that_concatenates_is_refused_by_name() -> None:
    weights = official("lamamba", LAMAMBA) | {"layers_up.0.skip_conv.0.weight": np.zeros((32, 64, 3, 3), np.float32)}
    with pytest.raises(GenError, match="skip_concat"):
        lamamba.IMPORTER.infer(weights)


def test_an_upsampler_is_refused_by_name() -> None:
    weights = official("adm", dataclasses.replace(ADM, channels=6))
    with pytest.raises(GenError, match="takes 6 channels: an upsampler"):
        adm.IMPORTER.infer(weights, size=8, head_width=32)


@pytest.mark.parametrize(
    ("name", "config", "objective"),
    [
        ("dit", DIT, DDPMLoss()),
        ("dit", dataclasses.replace(DIT, learned_variance=False), DDPMLoss(variance="large")),
        ("dit-diffusers", DIT, DDPMLoss()),
        ("sit", DIT, VelocityMatching()),
        ("lightningdit", LIGHT, VelocityMatching(TimeSampler("logit-normal"), cosine=1.0)),
        ("lamamba", LAMAMBA, DDPMLoss()),
        ("edm2", EDM2, Uncertain(EDMLoss(-0.4, 1.0))),
        ("edm2", dataclasses.replace(EDM2, channels=3, uncertainty=0), EDMLoss(-0.8, 1.6)),
        ("edm", SONG, EDMLoss()),
        ("edm-vp", SONG, NoiseMatching()),
        ("edm-ve", SONG, NoiseMatching()),
        ("edm-iddpm", CHAIN, DDPMLoss()),
        ("adm", ADM, DDPMLoss()),
        ("adm", dataclasses.replace(ADM, resample="convolution"), DDPMLoss(bound_weight=4.0)),
    ],
)
def test_networks_bring_the_loss_they_were_trained_with(name: str, config: Any, objective: Any) -> None:
    importer = system(name)
    assert importer.generator is not None
    assert importer.generator(config).denoiser.objective == objective


def test_adm_samples_are_clipped_as_published() -> None:
    sampler = adm.generator(ADM).sampler
    assert (sampler.guidance.low, sampler.guidance.high) == (-1.0, 1.0)
