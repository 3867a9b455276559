"""Commands on a run folder: a tiny untrained generator of 8x8 digits, made once."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import gen
from gen import (
    DiffusionGenerator,
    DiTConfig,
    Heun,
    Karras,
    Linear,
    Predict,
    RunConfig,
    Sampler,
    Uniform,
    arrays,
)
from gen.cli import main
from gen.cli.flags import Sampling
from gen.cli.opening import open_run
from gen.cli.sample import parse_labels
from gen.config import config_class, fingerprint, to_json
from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.kinds import KINDS
from gen.metrics.protocol import Result
from gen.nn.network import Network, param_shapes
from gen.sampling.generate import quantise
from gen.sampling.generator import FewSteps
from gen.sampling.grids import Explicit
from gen.sampling.guidance import Autoguidance
from gen.sampling.solvers import Renoise
from gen.training import engine
from gen.training.indexed import sample_keys
from gen.training.task import Model
from tests.processes import ended

NETWORK = DiTConfig(size=(8, 8), channels=1, patch=4, width=16, depth=1, heads=2, num_classes=10)
GENERATOR = DiffusionGenerator(Denoiser(NETWORK, Linear(), Predict("velocity")), Sampler(Heun(), Uniform(), steps=2))


def published(generator: DiffusionGenerator, name: str = "tiny") -> RunConfig:
    """The configuration of a run without training, that makes what `generator` makes."""
    models = {"net": Model(generator.denoiser)}
    return RunConfig(name, models=models, sampler=generator.sampler, tokenizer=generator.tokenizer)


def write_run(path: Path, network: DiTConfig = NETWORK) -> Path:
    params = Network(network).init(jax.random.key(0))
    # gates and output start at zero; move everything so that images depend on all inputs
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * np.random.default_rng(a.size).standard_normal(a.shape), params
    )
    arrays.save(path / "artifacts" / "net.safetensors", jax.tree.map(np.float32, params))
    (path / "config.json").write_text(json.dumps(to_json(published(GENERATOR))))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "tiny")
    return tmp_path / "tiny"


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command that must fail with one line, and gives it."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_loaded_run_samples_each_seed_alone(run: Path) -> None:
    loaded = gen.load(run)
    together = loaded.sample(range(5))
    assert together.shape == (5, 8, 8, 1)
    assert together.dtype == np.uint8
    np.testing.assert_allclose(loaded.sample([3, 1], batch=1), together[[3, 1]], atol=1)
    np.testing.assert_allclose(loaded.sample([13], labels=3), loaded.sample([13]), atol=1)
    assert np.abs(loaded.sample([3], labels=4).astype(int) - together[3]).max() > 1
    assert len(np.unique(together.reshape(5, -1), axis=0)) == 5


def test_a_loaded_run_says_what_it_is_not(run: Path) -> None:
    loaded = gen.load(run)
    assert loaded.denoiser == GENERATOR.denoiser
    assert loaded.weights == "raw"
    with pytest.raises(GenError, match="holds no tokenizer"):
        _ = loaded.tokenizer
    no_generator = dataclasses.replace(loaded, config=RunConfig("x", ()))
    with pytest.raises(GenError, match="holds no generator"):
        _ = no_generator.generator


def test_a_run_stays_itself_when_settings_are_added_or_its_sampler_is_changed(run: Path, tmp_path: Path) -> None:
    """Students, records and caches ask for the run by its origin."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    written = json.loads((old / "config.json").read_text())
    del written["engine"]["keep"]  # as an earlier version would have written it
    (old / "config.json").write_text(json.dumps(written, indent=1))
    now, then = gen.load(run), gen.load(old)
    assert then.config == now.config
    assert then.origin == f"{then.config.name} {fingerprint(written)} step {then.step} raw"
    assert then.origin != now.origin == f"{now.config.name} {fingerprint(now.config)} step {now.step} raw"
    assert then.with_sampler(now.config.sampler.changed(steps=1)).origin == then.origin


@pytest.mark.parametrize("label", [10, -1, [0, 1, 10]])
def test_labels_out_of_range(run: Path, label: object) -> None:
    with pytest.raises(GenError, match="out of range; this model has classes 0 to 9"):
        gen.load(run).sample([0, 1, 2], label)


def test_sample_writes_what_load_gives(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.npz"
    assert main(["sample", str(run), "--seeds", "3-9", "--out", str(out), "--batch", "4"]) == 0
    said = capsys.readouterr().out
    assert "raw weights, 3 network calls per image" in said
    with np.load(out) as file:
        np.testing.assert_allclose(file["arr_0"], gen.load(run).sample(range(3, 10)), atol=1)
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_1"], np.arange(3, 10))


def test_sampler_flags_and_paths_change_the_sampler(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "3", "--solver", "euler", "--cfg-scale", "2", "--class", "7,1"]
    path = ["--sampler.grid", json.dumps(to_json(Karras(rho=3.0, sigma_max=9.0)))]
    out = tmp_path / "images"
    assert main(["sample", str(run), "--seeds", "0-1", "--out", str(out), *flags, *path]) == 0
    assert "3 network calls" in capsys.readouterr().out
    assert {"000000.png", "000001.png"} <= {p.name for p in out.iterdir()}


def test_classes_by_name() -> None:
    names = ("cat", "dog", "2")
    assert parse_labels("dog", range(4), names) == 1
    assert parse_labels("dog,0,2", [5, 3, 7], names) == [2, 1, 0]  # a name goes before a number
    with pytest.raises(GenError, match="no class is called 'dgo'; did you mean 'dog'"):
        parse_labels("dgo", range(4), names)


def test_adaptive_steps_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against fine fixed steps from the same noise."""
    flags = ["--seeds", "0-3", "--cfg-scale", "2"]
    adaptive = ["--solver", "dopri5", "--sampler.solver.rtol", "1e-4", "--out", str(tmp_path / "adaptive.npz")]
    assert main(["sample", str(run), *flags, *adaptive]) == 0
    said = capsys.readouterr().out
    assert "raw weights, network calls measured" in said
    calls = re.search(r"([\d.]+) network calls per image, measured \((\d+) to (\d+)\)", said)
    assert 7 <= int(calls[2]) <= float(calls[1]) <= int(calls[3])
    assert int(calls[2]) % 6 == 1
    assert main(["sample", str(run), *flags, "--steps", "100", "--out", str(tmp_path / "fixed.npz")]) == 0
    with np.load(tmp_path / "fixed.npz") as fixed, np.load(tmp_path / "adaptive.npz") as adaptive:
        assert set(adaptive.files) == {"arr_0", "arr_1"}
        np.testing.assert_allclose(adaptive["arr_0"], fixed["arr_0"], atol=1)


@pytest.mark.parametrize("guidance", ["cfg", "apg", "cfg-zero-star"])
def test_guidance_without_a_null_class_is_told_before_anything_is_made(
    guidance: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax._src.compiler, "compile_or_get_cached", lambda *_, **__: pytest.fail("compiled"))
    settings = json.dumps({"kind": guidance, "scale": 2.0})
    for changes, expected in (
        ({"null_class": False}, "this DiT has no null class; train it with null_class=True"),
        ({"num_classes": 0, "null_class": False}, "guidance on a model without conditioning; use scale 1"),
    ):
        network = dataclasses.replace(NETWORK, **changes)
        generator = dataclasses.replace(GENERATOR, denoiser=dataclasses.replace(GENERATOR.denoiser, network=network))
        (copy / "config.json").write_text(json.dumps(to_json(published(generator))))
        drawn = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), param_shapes(network))
        arrays.save(copy / "artifacts" / "net.safetensors", drawn)
        assert expected in fails(capsys, "sample", copy, "--sampler.guidance", settings)
        assert not (copy / "samples").exists()


def test_students_take_the_steps_they_support(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def student(config: RunConfig) -> None:
        (copy / "config.json").write_text(json.dumps(to_json(config)))

    def said(*flags: str) -> str:
        out = copy / f"{len(list(copy.iterdir()))}.npz"
        assert main(["sample", str(copy), "--seeds", "0-1", "--out", str(out), *flags]) == 0
        return capsys.readouterr().out

    few = Sampler(Renoise(), Uniform(), 2)
    student(published(dataclasses.replace(GENERATOR, sampler=few)))
    assert "2 network calls per image" in said()
    assert "4 network calls per image" in said("--steps", "4")
    student(published(dataclasses.replace(GENERATOR, sampler=few.changed(grid=Explicit((1.0, 0.4, 0.0))))))
    assert "2 network calls per image" in said("--steps", "2")
    assert "explicit grid has 2 steps and 4 were asked" in fails(capsys, "sample", copy, "--steps", "4")
    student(RunConfig("student", models={"net": Model(GENERATOR.denoiser, (1.0,))}, sampler=FewSteps()))
    assert "1 network call per image" in said("--steps", "1")
    assert "makes images in the steps it was trained for, 1, and not in 4; leave out steps" in fails(
        capsys, "sample", copy, "--steps", "4"
    )


def test_a_weaker_run_guides(run: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prediction is extrapolated from, as by the sampler in Python."""
    weak = arrays.load(copy / "artifacts" / "net.safetensors")
    weak = jax.tree.map(lambda a: np.asarray(0.5 * a), weak)
    arrays.save(copy / "artifacts" / "net.safetensors", weak)
    args = ["sample", run, "--seeds", "0-2", "--guide", copy]
    assert main([*map(str, args), "--cfg-scale", "3", "--out", str(tmp_path / "x.npz")]) == 0
    guided = dataclasses.replace(GENERATOR.sampler, guidance=Autoguidance(3.0))
    params = {**gen.load(run).params, "guide": weak}
    expected = jax.jit(dataclasses.replace(GENERATOR, sampler=guided))(
        params, sample_keys(0, np.arange(3)), {"label": np.arange(3)}
    )
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_allclose(file["arr_0"], quantise(expected), atol=1)
    assert "--guide without a guidance scale" in fails(capsys, *args)
    smaller = dataclasses.replace(GENERATOR.denoiser, network=dataclasses.replace(NETWORK, size=(4, 4)))
    (copy / "config.json").write_text(json.dumps(to_json(published(dataclasses.replace(GENERATOR, denoiser=smaller)))))
    assert "makes (4, 4, 1)" in fails(capsys, *args, "--cfg-scale", "2")


@pytest.mark.parametrize("kind", [*KINDS["solver"], *KINDS["adaptive"]])
def test_every_solver_is_named_by_its_kind(run: Path, kind: str) -> None:
    """As far as the loaded, overridden generator; what it makes is tested beside the solvers."""
    loaded = open_run(run, Sampling(solver=kind))
    found = loaded.generator.sampler.solver
    assert type(found) is config_class(kind)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class", "10"], "label 10 is out of range; this model has classes 0 to 9"),
        (
            ["--class", "cat"],
            "class 'cat' is not a number, and this run knows no names of its classes; write",
        ),
        (["--seeds", "9-3"], "seeds '9-3' are not a range; write FIRST-LAST such as 0-63"),
        (["--seeds", "a"], "seeds 'a' are not a range"),
        (["--seeds", "0,5,x"], "seeds 'x' are not a range"),
        (["--seeds", "0-7,5"], "seeds '0-7,5' name one seed twice"),
        (["--out", "x.jpg"], "samples are not written as .jpg (x.jpg); write .png"),
        (["--solver", "hein"], "unknown solver 'hein'; did you mean 'heun'?"),
        (["--steps", "0"], "steps"),
        (
            ["--steps", "1", "--sampler.grid", '{"kind": "explicit", "times": [1.5, 0.0]}'],
            "spans times 0 to 1.5; Linear has",
        ),
        (["--sampler.grid", '{"kind": "explicit", "times": [0.5, 0.7]}', "--steps", "1"], "does not fall strictly"),
        (["--sampler.grid", '{"kind": "uniform", "start": 1.2}'], "uniform grid from 1.2 to 0; expected 1 >= start"),
        (["--sampler.grid", '{"kind": "respaced"}'], "needs the discrete ddpm process, not Linear"),
        (["--solver", "dopri5", "--steps", "5"], "an adaptive solver chooses its steps itself; leave out steps"),
        (["--solver", "dopri5", "--sampler.solver.rtoll", "1"], "unknown key 'rtoll'; did you mean 'rtol'?"),
        (["--sampler.stepz", "3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["--out", "/dev/null/x.npz"], "/dev/null"),
    ],
)
def test_bad_sample_flags(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert message in fails(capsys, "sample", run, *flags)


def test_no_run_suggests_one_nearby(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"runs inside it: {run}" in fails(capsys, "sample", run.parent)
    assert f"did you mean '{run}'?" in fails(capsys, "sample", run.parent / "tinny")


def test_damaged_and_foreign_runs_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy / "artifacts" / "net.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole safetensors file" in fails(capsys, "sample", copy)
    weights.write_bytes(b"\xff" * 64)
    assert "is not a whole safetensors file" in fails(capsys, "sample", copy)
    write_run(copy, dataclasses.replace(NETWORK, width=32))
    assert "the weights belong to another configuration" in fails(capsys, "sample", copy)
    config = json.loads((copy / "config.json").read_text())
    config["sampler"]["stepz"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    assert "unknown key 'stepz' for Sampler; did you mean 'steps'?" in fails(capsys, "info", copy)
    (copy / "config.json").write_text("{")
    assert "is not valid JSON" in fails(capsys, "info", copy)
    (copy / "config.json").write_text('{"kind": "linear"}')
    assert "is a Linear; expected RunConfig" in fails(capsys, "info", copy)


def test_info_and_report_of_a_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "net: " in said
    assert "  sampler.steps = 2" in said
    assert main(["report", str(copy)]) == 0
    assert "tiny" in (copy / "report.html").read_text()


def test_evaluate_run_and_images_alike(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(copy), "--seeds", "0-63", "--batch", "32"]) == 0
    said = capsys.readouterr().out
    assert "frechet_distance" in said
    assert "protocol: extractor digits" in said
    scores = json.loads((copy / "scores.json").read_text())
    assert not (copy / "scores.json.partial.npz").exists()
    out = tmp_path / "x.npz"
    assert main(["sample", str(copy), "--seeds", "0-63", "--out", str(out)]) == 0
    # quantiser and label rule stand in the note that gen sample left, so the two may be compared
    assert main(["evaluate", str(out)]) == 0
    assert main(["compare", f"{out}.scores.json", str(copy)]) == 0
    again = json.loads((tmp_path / "x.npz.scores.json").read_text())
    assert again["values"]["frechet_distance"] == pytest.approx(scores["values"]["frechet_distance"], rel=2e-2)
    np.savez(tmp_path / "bare.npz", **{name: np.load(out)[name] for name in ("arr_0", "arr_1")})
    assert main(["evaluate", str(tmp_path / "bare.npz")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "bare.npz.scores.json"), str(copy)]) == 2
    said = capsys.readouterr().err
    assert "were scored under different protocols: quantiser is 'given' and 'round' (and 1 more fields)" in said


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gen.pretrained.readers import read_weights
    from gen.pretrained.systems import system

    network = dataclasses.replace(NETWORK, channels=4, patch=2, learned_variance=True)
    params = Network(network).init(jax.random.key(1))
    arrays.write(tmp_path / "official.safetensors", system("dit").save(network, params))
    source = tmp_path / "official.safetensors"
    assert "number of attention heads" in fails(capsys, "convert", source, "--out", tmp_path / "r")
    args = ["convert", str(source), "--out", str(tmp_path / "r"), "--network.heads", "2"]
    assert main(args) == 0
    assert "matched" in capsys.readouterr().out
    assert gen.load(tmp_path / "r").denoiser.network == network
    assert "already holds a run" in fails(capsys, *args)
    assert main(["convert", str(tmp_path / "r"), "--out", str(tmp_path / "back.safetensors")]) == 0
    first, second = read_weights(source), read_weights(tmp_path / "back.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_convert_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    arrays.write(tmp_path / "x.safetensors", {"a": np.zeros(2, np.float32)})
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 broken")
    args = ["--out", tmp_path / "r"]
    assert "none of the known systems" in fails(capsys, "convert", tmp_path / "x.safetensors", *args)
    assert "unknown system 'dti'; did you mean 'dit'?" in fails(
        capsys, "convert", tmp_path / "x.safetensors", *args, "--system", "dti"
    )
    assert str(tmp_path / "cut.pt") in fails(capsys, "convert", tmp_path / "cut.pt", *args)
    assert "unknown flag '--netwrok.heads'" in fails(
        capsys, "convert", tmp_path / "x.safetensors", *args, "--system", "dit", "--netwrok.heads", "2"
    )
    assert not (tmp_path / "r").exists()


def test_doctor_tries_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "matmul over" in said
    assert "compile cache: " in said


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained for three steps through the command line."""
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    steps = ["--stages.tokenizer.steps", "3", "--batch", "32", "--engine.quiet", "true"]
    assert main(["train", "demo-tokenizer", "--outdir", str(out), *steps]) == 0
    return out


def test_train_resumes_and_refuses_another_configuration(
    tokenizer_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tokenizer_run / "config.json").read_text())
    assert config["stages"][0]["steps"] == 3
    assert config["stages"][0]["batch"] == 32
    args = ["train", "demo-tokenizer", "--outdir", tokenizer_run, "--stages.0.steps", "3"]
    assert main([str(a) for a in [*args, "--batch", "32", "--engine.quiet", "true"]]) == 0
    assert "was made with" in fails(capsys, *args, "--batch", "64")
    assert "was made with" in fails(capsys, *args, "--batch", "32", "--seed", "5")


def test_tokenizer_run_loads_reconstructs_and_encodes(
    tokenizer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = gen.load(tokenizer_run)
    assert (loaded.weights, loaded.step) == ("ema", 3)
    reconstruct = ["reconstruct", str(tokenizer_run), "--extractor", "digits-extractor", "--measures", "kid"]
    assert main([*reconstruct, "--out", str(tmp_path / "r.npz"), "--batch", "100"]) == 0
    shown = capsys.readouterr().out
    scores = Result.load(tokenizer_run / "reconstruction.json")
    for name in ("psnr", "ssim_skimage", "frechet_distance", "kid"):
        assert name in scores.values
        assert name in shown
    assert "originals" in scores.protocol.beside
    assert (scores.protocol.count, scores.protocol.reference, scores.protocol.split) == (359, "digits", "test")
    assert "no weights at" in fails(capsys, *reconstruct, "--lpips", "vgg")
    assert "give --extractor too" in fails(capsys, *reconstruct[:2], "--measures", "kid")
    from gen.data.caches import Cache
    from gen.data.sources import digits

    images = digits("test").arrays["image"]
    with np.load(tmp_path / "r.npz") as file:
        np.testing.assert_allclose(file["arr_0"], loaded.decode(loaded.encode(images)), atol=1)
    with Image.open(tokenizer_run / "reconstruction.png") as picture:
        assert picture.width > 4 * picture.height  # sixteen before above sixteen after
    with pytest.raises(GenError, match="row 2 holds nan; this tokenizer decodes finite latents"):
        loaded.decode(np.where(np.arange(3)[:, None, None] == 2, np.nan, np.zeros((3, 4, 8))))
    encode = ["encode", str(tokenizer_run), "--data", "digits:test", "--out", str(tmp_path / "cache")]
    assert main(encode) == 0
    rows = Cache(str(tmp_path / "cache")).source()
    latents = rows.rows.arrays["latent"]
    np.testing.assert_allclose(latents, loaded.encode(images), atol=1e-4)
    assert main(encode) == 0  # done already
    assert "another" in fails(capsys, *encode[:3], "digits:train", *encode[4:])
    assert "holds no generator" in fails(capsys, "sample", tokenizer_run)
    raw = gen.load(tokenizer_run, weights="raw")
    assert raw.weights == "raw"
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(raw.params), jax.tree.leaves(loaded.params), strict=True)
    )


def test_a_run_starts_another(tokenizer_run: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the arrays that fit; what does not is named."""
    args = ["train", "demo-tokenizer", "--from", str(tokenizer_run), "--dry-run"]
    assert main(args) == 0
    assert re.search(r"starts from (\d+) of \1 arrays of \S+tokenizer\n", capsys.readouterr().out)
    assert main([*args, "--stages.0.task.tokenizer.channels", "4"]) == 0
    assert "; afresh: decoder_embed/kernel, encoder_out/bias, encoder_out/kernel\n" in capsys.readouterr().out
    assert "this preset starts from a 'tokenizer'" in fails(capsys, *args[:3], run, "--dry-run")


def test_a_missing_step_is_refused(tokenizer_run: Path) -> None:
    with pytest.raises(GenError, match="is not a whole checkpoint"):
        gen.load(tokenizer_run, step=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo-tokeniser"], "unknown preset 'demo-tokeniser'; did you mean 'demo-tokenizer'?"),
        (["demo-teacher"], "preset 'demo-teacher' needs a tokenizer; add --tokenizer RUN"),
        (["demo-tokenizer", "--data", "x"], "preset 'demo-tokenizer' takes no --data; leave it out"),
        (["demo-tokenizer", "--stages.0.task.optim.lrr", "1"], "unknown key 'lrr'; did you mean 'lr'?"),
        (["demo-tokenizer", "--stages.0.task.optim.lr", "fast"], "lr is 'fast'; expected float"),
        (["demo-tokenizer", "--engine.mesh.fsdp", "3"], "mesh data=-1 x fsdp=3 x tensor=1 does not fit 1 devices"),
        (["dit-smoke", "--stages.0.task.denoiser.network.size", "[9, 9]"], "size (9, 9) is not cut evenly by patch 2"),
        (["demo-tokenizer", "--batch-gpu", "7"], "batch-gpu 7 does not divide"),
        (["demo-tokenizer", "--outdir", "/dev/null/x"], "cannot write /dev/null/x"),
    ],
)
def test_bad_train_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str) -> None:
    if "--outdir" not in flags:
        flags = [*flags, "--outdir", str(tmp_path / "run")]
    assert message in fails(capsys, "train", *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_short_flags_of_train_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    from gen.cli.opening import prepare

    config = prepare("demo-tokenizer", {}, (), {"steps": 7, "batch": 32, "seed": 5, "profile": "2-3"}).config
    assert (config.stages[0].steps, config.stages[0].batch) == (7, 32)
    assert (config.engine.seed, config.engine.profile) == (5, (2, 3))
    assert main(["train", "--preset", "demo-tokenizer", "--dry-run"]) == 0
    assert "105,834 parameters" in capsys.readouterr().out
    message = fails(capsys, "train", "demo-tokenizer", "--dry-run", "--profile", "3-x")
    assert message.startswith("error: steps '3-x' are not a range")


def test_dry_run_and_info_of_a_preset_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo-tokenizer", "--dry-run"]) == 0
    assert main(["info", "demo-tokenizer", "--devices", "8", "--engine.mesh.fsdp", "4"]) == 0
    said = capsys.readouterr().out
    assert "mesh data=2 x fsdp=4 x tensor=1" in said
    assert "  stages.0.steps = " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_of_one_job_train_sample_and_score_like_one(tokenizer_run: Path, tmp_path: Path) -> None:
    def job(*args: object) -> list[str]:
        """The same command in two processes with the variables that SLURM sets."""
        processes = []
        for number in range(2):
            slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
            slurm |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "JAX_PLATFORMS": "cpu"}
            command = [str(Path(sys.executable).parent / "gen"), *map(str, args), "--multihost"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=os.environ | slurm, **pipes))
        found = ended(*processes)
        assert [status for status, _ in found] == [0, 0], found
        return [text for _, text in found]

    steps = ["--stages.0.steps", "3", "--batch", "32", "--engine.quiet", "true"]
    job("train", "demo-tokenizer", "--outdir", tmp_path / "two", *steps)
    one, two = gen.load(tokenizer_run), gen.load(tmp_path / "two")
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    run = write_run(tmp_path / "tiny")
    job("sample", run, "--seeds", "0-9", "--batch", "4", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_allclose(file["arr_0"], gen.load(run).sample(range(10)), atol=1)
    job("evaluate", run, "--seeds", "0-63", "--batch", "32", "--out", tmp_path / "two.json")
    assert main(["evaluate", str(run), "--seeds", "0-63", "--batch", "32", "--out", str(tmp_path / "one.json")]) == 0
    first, second = (json.loads((tmp_path / name).read_text())["values"] for name in ("one.json", "two.json"))
    assert first == pytest.approx(second, rel=1e-3)


def test_without_a_job_multihost_says_so(run: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "JAX_CO"))}
    command = [Path(sys.executable).parent / "gen", "sample", run, "--multihost"]
    result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --multihost found no job to join")
    assert result.stderr.count("\n") == 1


def test_an_interrupted_run_has_the_signals_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise engine.Interrupted("saved at step 3", 15)

    monkeypatch.setattr(engine, "train", interrupted)
    assert main(["train", "demo-tokenizer", "--outdir", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "saved at step 3\n"


def test_classes_are_asked_for_by_name(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the data that the run was trained on called them."""
    names = (*(f"class {i}" for i in range(9)), "cat")
    config = dataclasses.replace(published(GENERATOR), class_names=names)
    (copy / "config.json").write_text(json.dumps(to_json(config)))
    args = ["sample", str(copy), "--seeds", "0-1", "--class", "cat,2", "--out", str(tmp_path / "x.npz")]
    assert main(args) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_1"].tolist() == [9, 2]
    assert "no class is called 'cta'; did you mean 'cat'?" in fails(capsys, "sample", copy, "--class", "cta")
