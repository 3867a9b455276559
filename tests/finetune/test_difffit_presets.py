"""Presets of adaptation: the data's classes, their normaliser, and the paper's numbers of parameters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gen.data.caches import seal
from gen.errors import GenError
from gen.experiments import difffit
from gen.experiments.demo import SAMPLER, TEACHER
from gen.nn.network import count, param_shapes
from gen.training.checks import check_run
from tests.test_matching_presets import loaded

RNG = np.random.default_rng(0)


def cache(folder: Path, classes: int) -> str:
    folder.mkdir()
    np.save(folder / "latent.npy", (3.0 + 2.0 * RNG.normal(size=(40, *TEACHER.network.shape))).astype(np.float32))
    np.save(folder / "label.npy", np.arange(40, dtype=np.int32) % classes)
    seal(folder, tokenizer="", data="none")
    return str(folder)


@pytest.mark.parametrize("name", ["difffit", "bitfit", "lora", "full-tuning"])
def test_a_teacher_is_adapted_to_the_data(name: str, tmp_path: Path) -> None:
    teacher = loaded(TEACHER, SAMPLER)
    shape = jax.ShapeDtypeStruct((TEACHER.network.channels,), np.float32)
    teacher = dataclasses.replace(teacher, params={**teacher.params, "normalizer": {"shift": shape, "scale": shape}})
    normaliser = {"shift": np.full(8, 1.0, np.float32), "scale": np.full(8, 2.0, np.float32)}
    teacher = dataclasses.replace(teacher, params={**teacher.params, "normalizer": normaliser})
    recipe = difffit.PRESETS[name](teacher, cache(tmp_path / "latents", 5))
    check_run(recipe.config, recipe.frozen)
    task = recipe.config.stages[0].task
    assert task.denoiser.network.num_classes == 5
    share = count(param_shapes(task.adapted)) / count(teacher.params["net"])
    assert (share > 0.9) == (name == "full-tuning")
    # the data on the teacher's scale are the stored ones: (raw - 1) / 2
    data = next(recipe.config.stages[0].data.batches(batch=4, seed=0, start=0))
    own = recipe.config.stages[0].data.normalizer()
    raw = data["latent"] * own["scale"] + own["shift"]
    np.testing.assert_allclose(task.data(data), (raw - 1.0) / 2.0, atol=1e-5)
    assert set(recipe.artifacts) == {"teacher", "normalizer"}


def test_normalisers_of_places_are_refused(tmp_path: Path) -> None:
    teacher = loaded(TEACHER, SAMPLER)
    maps = np.ones(TEACHER.network.shape, np.float32)
    teacher = dataclasses.replace(teacher, params={**teacher.params, "normalizer": {"shift": maps, "scale": maps}})
    with pytest.raises(GenError, match="place by place"):
        difffit.difffit(teacher, cache(tmp_path / "latents", 10))


def test_larger_images_lie_on_the_old_coordinates() -> None:
    from gen.diffusion.backbones.dit import dit
    from gen.experiments.dit import SAMPLER as ANCESTRAL
    from gen.experiments.dit import _denoiser

    recipe = difffit.difffit_512(loaded(_denoiser(dit("XL/2")), ANCESTRAL), "random")
    network = recipe.config.stages[0].task.denoiser.network
    assert (network.size, network.spacing) == ((64, 64), 0.5)
    assert count(param_shapes(recipe.config.stages[0].task.adapted)) == 489_632 + 1001 * 1152 + 2 * 32_256
