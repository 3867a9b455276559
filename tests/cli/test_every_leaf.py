"""Every setting of every smoke preset is overridden: what training, previews, sampling and evaluation build is one."""

import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen.cli.info import leaves
from gen.cli.opening import prepare
from gen.cli.overrides import override
from gen.config import config_class, from_json, to_json
from gen.data.caches import seal
from gen.errors import GenError
from gen.experiments import build, find, presets
from gen.nn.network import param_shapes
from gen.runs import Loaded
from gen.training.checks import check_run
from gen.training.run import RunConfig
from tests.autoregressive.caches import bit_cache, token_cache
from tests.test_edm_presets import image_zip
from tests.test_teacher_presets import cached


def captioned(cache: str) -> str:
    """The cache with the features of the empty caption beside it."""
    np.savez(Path(cache) / "empty.npz", prompt=np.zeros((4, 6)), pooled=np.zeros(6))
    return cache


def captions(rows: int) -> dict[str, np.ndarray]:
    """Features of captions."""
    return {"prompt": np.zeros((rows, 4, 6), np.float16), "pooled": np.zeros((rows, 6), np.float16)}


def latent_rows(folder: Path) -> str:
    """A cache of sixteen tokens of four numbers, with captions."""
    folder.mkdir(parents=True)
    for name, rows in {"latent": np.ones((4, 16, 4), np.float32), **captions(4)}.items():
        np.save(folder / f"{name}.npy", rows)
    return seal(folder, tokenizer="none", data="none").path


# toys whose data are neither images, latents nor a grid of tokens; tested where there is time
ROWS = {
    "flextok-ar-smoke": lambda folder: token_cache(folder, (16,)),
    "binary-diffusion-smoke": lambda folder: bit_cache(folder, (2, 2, 6)),
    "maskgen-vq-smoke": lambda folder: captioned(token_cache(folder, (16,), **captions(8))),
    "maskgen-kl-smoke": lambda folder: captioned(latent_rows(folder)),
    "instella-diffusion-smoke": bit_cache,
    "instella-ar-smoke": bit_cache,
}
SMOKE = sorted(
    n
    for n, p in presets().items()
    if n.endswith("-smoke") and "cifar10-t" not in n and not {"tokenizer", "teacher"} & set(p.required)
)
SMOKE = [pytest.param(n, marks=pytest.mark.slow) if n in ROWS else n for n in SMOKE]
TOKENS = ("llamagen", "rar", "maskgit")  # experiments whose data are tokens
# settings that name a thing outside the configuration, or say how a run is carried out and never what is built
OUTSIDE = ("engine.", "name", "frozen.", ".data.", ".name")


def recipe(name: str, folder: Path) -> Any:
    inputs = {}
    if name in ROWS:
        inputs["data"] = ROWS[name](folder / "cache")
    elif "data" in find(name).required:
        tokens = find(name).module.rpartition(".")[2] in TOKENS
        cache = {"encoder_0": np.zeros((4, 64, 16), np.float16)}
        inputs["data"] = token_cache(folder / "cache") if tokens else cached(folder / "cache", **cache)
    return build(name, inputs)


def another(value: Any, options: tuple[Any, ...]) -> list[str]:
    """Other values for a leaf, as typed on a command line, the likelier first."""
    if options:
        return [str(option) for option in options if option != value]
    if isinstance(value, bool):
        return [str(not value).lower()]
    if isinstance(value, int):
        return [str(2 * value), str(value + 1), "1"]
    if isinstance(value, float):
        return [str(0.5 * value + 0.125), str(2.0 * value)]
    if isinstance(value, list):
        return [str([2 * v if isinstance(v, int | float) else v for v in value]), str(value[:-1])]
    return ["1", "0.5", "null"]


def choices(config: Any, path: str) -> tuple[Any, ...]:
    """The values that the type of the field at `path` allows, where it names them."""
    *parents, last = path.split(".")
    for head in parents:
        config = config[int(head)] if isinstance(config, tuple) else getattr(config, head)
    if isinstance(config, tuple | dict):
        return ()
    hint = typing.get_type_hints(type(config))[last]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


@pytest.mark.parametrize("built", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["said", "built"])
@pytest.mark.parametrize("name", SMOKE)
def test_an_override_reaches_everything_or_is_refused(name: str, built: bool, tmp_path: Path) -> None:
    """`built`: as far as the shapes of every network, which a run takes before its first step."""
    base: RunConfig = recipe(name, tmp_path).config
    changed, refused = 0, 0
    for path, text in leaves(base):
        if any(part in path for part in OUTSIDE) or path == "stages.0.steps":
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:  # the kind of a component, whose own settings follow
            continue
        for new in another(value, choices(base, path)):
            try:
                config = override(base, [(path, new)])
            except GenError:
                continue
            break
        else:
            refused += 1
            continue
        if config == base:
            continue
        (role, trained), *_ = ((role, model.config) for role, model in config.stages[-1].task.models().items())
        network = trained if role == "tokenizer" else trained.network
        try:
            if role != "tokenizer":
                config.generator(config.stages[0])  # what a run asks before its first step
            if built:
                param_shapes(network)
        except GenError:
            refused += 1
            continue
        changed += 1
        stored = from_json(to_json(config), RunConfig)  # what sampling and evaluation read from config.json
        CHECKS[role](config, stored, trained, path)
    assert changed > max(10, refused)


def check_denoiser(config: RunConfig, stored: RunConfig, trained: Any, path: str) -> None:
    loaded = Loaded(Path("run"), stored, {}, "ema", 0)
    for generator in (config.generator(config.stages[0]), stored.generator(), loaded.generator):
        assert generator.subject == trained, path
        assert generator.sampler == config.sampler, path
        assert generator.shape == trained.network.shape, path
    assert loaded.denoiser == trained
    assert config.stages[0].task.parts[0].network == trained.network


def check_tokenizer(config: RunConfig, stored: RunConfig, trained: Any, path: str) -> None:
    """One tokenizer is trained, or parts of it, and that is what encodes, decodes and is previewed."""
    loaded = Loaded(Path("run"), stored, {"tokenizer": {}}, "ema", 0)
    assert loaded.tokenizer == config.stages[0].task.tokenizer == trained, path
    assert config.stages[0].task.shape == trained.spec.image, path


CHECKS = {"net": check_denoiser, "tokenizer": check_tokenizer}


def test_the_faults_that_had_three_homes(tmp_path: Path) -> None:
    """sigma_data and the U-Net's levels once stood in the task, its previews and the generator."""
    overrides = (
        ("stages.0.task.denoiser.process.sigma_data", "2.0"),
        ("stages.0.task.denoiser.network.mult", "[1, 1]"),
    )
    config = prepare("edm-smoke", {}, overrides).config
    for generator in (config.generator(), config.generator(config.stages[0])):
        assert generator.denoiser == config.stages[0].task.denoiser
        assert (generator.denoiser.process.sigma_data, generator.denoiser.network.mult) == (2.0, (1, 1))
    assert config_class("edm-precondition")() == config.stages[0].task.denoiser.parameterization


def test_a_schedule_is_as_long_as_its_stage(tmp_path: Path) -> None:
    """--steps lengthens the cosine with it: the rate ends where the preset says, at the last step."""
    for steps in (300, 3000):
        stage = prepare("demo-tokenizer", {}, (), {"steps": steps}).config.stages[0]
        optim = stage.task.optim
        rates = [float(stage.task.inputs(step, stage.steps)["lr/tokenizer"]) for step in (steps // 2, steps - 1)]
        assert rates[0] > 0.3 * optim.lr
        assert rates[1] == pytest.approx(optim.final * optim.lr, rel=0.3)


def test_zip_presets_change_alike(tmp_path: Path) -> None:
    data = image_zip(tmp_path / "images.zip", 32)
    config = prepare("dit-smoke", {"data": data}, (("stages.0.task.denoiser.network.depth", "1"),)).config
    assert config.generator().denoiser.network.depth == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((("stages.0.task.denoiser.network.num_classes", "0"),), "guidance on a model without conditioning"),
        ((("sampler.grid", "respaced"),), "needs the discrete ddpm process"),
    ],
)
def test_what_could_not_be_sampled_is_not_trained(changes: Any, message: str) -> None:
    config = prepare("sit-smoke", {}, changes).config
    with pytest.raises(GenError, match="could train stage 'teacher' but not sample what it makes") as caught:
        check_run(config)
    assert message in str(caught.value)
