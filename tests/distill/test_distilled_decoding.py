"""Distilled Decoding on a toy writer: records of noise and tokens, a student of two calls, and what is refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays, runs
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.gpt import GPTConfig
from gen.autoregressive.maskgit import MaskGITConfig, MaskGITSkipConfig
from gen.autoregressive.sampler import TokenSampler
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.unmasking import MaskedSampler
from gen.autoregressive.var import VARConfig
from gen.cli import main
from gen.cli.flags import Sampling
from gen.cli.opening import open_run
from gen.config import to_json
from gen.distill.distilled_decoding import DistilledDecodingTask, distillation_loss, taught
from gen.distill.gpt_student import GPTStudentConfig
from gen.distill.maskgit_student import MaskGITStudentConfig
from gen.distill.noise_decoder import FlowedTokens, NoiseDecoder, NoiseDecoding
from gen.distill.teacher_records import make_of
from gen.distill.var_student import VARStudentConfig
from gen.errors import GenError
from gen.experiments.distilled_decoding import distilled_decoding, student_of
from gen.files import write_json
from gen.kinds import KINDS
from gen.nn.conditions import make_conditions
from gen.nn.network import Network
from gen.pretrained.systems import system as published
from gen.runs import Loaded, load
from gen.sampling.generator import Sampler
from gen.sampling.records import Records, Solved, make_records
from gen.tokenizers.code_vectors import code_table
from gen.tokenizers.quantizers.residual import Residual
from gen.training.engine import train
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.conformance.examples import CLASSES, CODES, NETWORK, SMALL, TOKENIZERS, VOCABULARY, WRITER
from tests.conformance.tokenizers import Codebook

ROWS = 24


@pytest.fixture(scope="module", autouse=True)
def _kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "test", TOKENIZERS)
        yield


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    """A toy LlamaGen of the toy tokenizer's tokens."""
    tokenizer = Codebook()
    spec = tokenizer.spec
    model = dataclasses.replace(WRITER, shape=tuple(spec.shape), vocabulary=spec.vocabulary)
    return _random("writer", model, TokenSampler(ConstantScale(1.5)), tokenizer)


@pytest.fixture(scope="module")
def records(teacher: Loaded, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("records") / "pairs"
    generator = teacher.generator
    cond = make_conditions(generator.conditions, np.arange(ROWS))
    make_records(make_of(generator), teacher.params, folder, count=ROWS, maker=teacher.origin, cond=cond, batch=ROWS)
    return str(folder)


def test_tokens_follow_from_noise_as_the_teacher_says(teacher: Loaded, records: str) -> None:
    """The first token's share is its probability; with the noise it is where the flow ends."""
    rows = Records(records, teacher.origin).source()
    noise, tokens = (np.stack([rows[i][name] for i in range(ROWS)]) for name in ("noise", "tokens"))
    model, codes = teacher.generator.model, code_table(teacher.tokenizer, teacher.params["tokenizer"])
    assert noise.shape == (ROWS, model.length, codes.shape[1])
    assert tokens.shape == (ROWS, *model.shape)
    assert len({tuple(row.ravel()) for row in tokens}) > 1
    assert 0 <= tokens.min() <= tokens.max() < model.vocabulary


def test_a_student_trains_on_them_and_makes_images(
    teacher: Loaded, records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {teacher.path: teacher, Path("row"): row()}
    monkeypatch.setattr(runs, "load", lambda path, **settings: others.get(path) or load(path, **settings))
    recipe = distilled_decoding(teacher, records, updates=3, batch=8)
    engine = dataclasses.replace(recipe.config.engine, quiet=True, log_every=1)
    train(dataclasses.replace(recipe.config, engine=engine), tmp_path, frozen=recipe.frozen, artifacts=recipe.artifacts)
    student = load(tmp_path)
    assert student.generator.nfe == 2
    images = student.sample([0, 1], labels=[0, 1])
    assert images.shape == (2, *teacher.tokenizer.spec.image)
    np.testing.assert_array_equal(student.sample([1], labels=[1])[0], images[1])

    helped = open_run(tmp_path, Sampling(guide=teacher.path), overrides=(("sampler.starts", "[0, 3]"),))
    assert helped.generator.nfe == 4  # three tokens of the teacher and the last call
    later = open_run(
        tmp_path, Sampling(guide=teacher.path), overrides=(("sampler.starts", "[0, 3]"), ("sampler.rewritten", "2"))
    )
    assert later.generator.nfe == 3
    assert later.sample([0], labels=[0]).shape == (1, *teacher.tokenizer.spec.image)
    with pytest.raises(GenError, match="is not the teacher of"):
        open_run(tmp_path, Sampling(guide=Path("row")))


def pyramid() -> Loaded:
    """A toy VAR of three maps."""
    tokenizer = SMALL["var-vqvae"]
    model = VARConfig(tokenizer.quantizer, CLASSES, 16, 2, 2, 32, scan=False)
    return _random("pyramid", model, ScaleSampler(), tokenizer)


def row() -> Loaded:
    """A toy LlamaGen of a row of tokens."""
    return _random("row", dataclasses.replace(WRITER, shape=(4,)), TokenSampler(), CODES)


SIZES = {"shape": (4,), "vocabulary": 8, "num_classes": CLASSES, "width": 16, "depth": 2, "heads": 2, "hidden": 32}


def masked(model: Any = MaskGITConfig) -> Loaded:
    """A toy MaskGIT of a row of tokens."""
    sampler = MaskedSampler(3, 4.0, annealed=False, token_temperature=1.0, guidance=ConstantScale(1.5))
    return _random("masked", model(**SIZES, scan=False), sampler, CODES)


def skips() -> Loaded:
    """The same with long skips."""
    return masked(MaskGITSkipConfig)


@pytest.mark.parametrize("token_temperature", [None, 0.5])
def test_tokens_of_a_masked_teacher_follow_from_noise_as_it_says(token_temperature: float | None) -> None:
    """Of a teacher that says the same in every round the flows keep the shares; the last round of TiTok's is cold."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0]))

    class Says(MaskGITConfig):
        def logits(self, params: Any, tokens: Any, cond: Any) -> Any:
            return jnp.broadcast_to(logits, (*tokens.shape, 8))

    of = masked(Says)
    sampler = MaskedSampler(2, 1e6 if token_temperature else 2.0, annealed=False, token_temperature=token_temperature)
    make = FlowedTokens(dataclasses.replace(of.generator, sampler=sampler), steps=100)
    keys = jax.random.split(jax.random.key(0), 1500)
    made = jax.jit(make)(of.params, keys, {"label": jnp.zeros(1500, jnp.int32)})
    share = np.array([(made["tokens"] == v).mean(axis=0) for v in range(4)])
    assert made["noise"].shape == (1500, 4, 3)
    if token_temperature:
        sharp = np.array([0.25, 0.09, 0.01, 0.01]) / 0.36
        np.testing.assert_allclose(share, np.tile(sharp[:, None], 4), atol=0.04)
    else:
        assert 0.4 < share[0].min() < 0.6 < 0.9 < share[0].max()  # which is decided last in most samples
    np.testing.assert_array_equal(
        jax.jit(make)(of.params, keys[5:7], {"label": jnp.zeros(2)})["tokens"], made["tokens"][5:7]
    )


@pytest.mark.parametrize("of", [row, pyramid])
def test_a_teacher_goes_on_where_others_began(of: Any) -> None:
    """Read in one call or written one after the other, the first tokens lead to the same next ones."""
    run = of()
    generator, keys = run.generator, jax.random.split(jax.random.key(4), 3)
    model, sampler, cond = generator.model, generator.sampler.changed(guidance=1.5), {"label": jnp.arange(3)}
    tokens = jax.jit(sampler.tokens, static_argnums=(0, 4), static_argnames="count")
    whole = tokens(model, run.params, keys, cond, run.tokenizer)
    ends = np.cumsum(model.groups)
    begun, stop = whole[:, : ends[0]], int(ends[-2])
    found = tokens(model, run.params, keys, cond, run.tokenizer, begun=begun, count=stop)
    np.testing.assert_array_equal(found, whole[:, :stop])
    assert not np.array_equal(tokens(model, run.params, keys, cond, run.tokenizer, begun=(begun + 1) % 3), whole)


def test_a_students_teacher_writes_between_its_calls() -> None:
    run = pyramid()
    model, (first, second, _) = run.generator.model, run.generator.model.groups
    generator = NoiseDecoder(student_of(run), NoiseDecoding((0, first + second), first).guided_by(ScaleSampler()))
    generator = dataclasses.replace(generator, tokenizer=run.tokenizer)
    later = dataclasses.replace(generator, sampler=dataclasses.replace(generator.sampler, rewritten=first))
    assert (generator.nfe, later.nfe) == (3, 3)  # two maps and a call; a call, a map and a call
    params = {**run.params, "net": Network(student_of(run)).init(jax.random.key(5)), "guide": run.params["net"]}
    keys, cond = jax.random.split(jax.random.key(6), 2), {"label": jnp.arange(2)}
    images = [np.asarray(jax.jit(made)(params, keys, cond)) for made in (generator, later)]
    assert images[0].shape == (2, *run.tokenizer.spec.image)
    assert not np.array_equal(*images)
    alone = jax.jit(generator)(params, keys[1:], {"label": jnp.arange(1, 2)})
    np.testing.assert_allclose(alone[0], images[0][1], atol=1e-5)

    codes, seen = jnp.arange(8.0)[:, None], []

    def student(x: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen.append((np.asarray(x)[0, :, 0].tolist(), int(known[0])))
        return jnp.full((1, 4, 8), 0.0).at[..., 2].set(1.0), jnp.full((1, 4, 1), 0.5)

    def write(begun: jax.Array | None) -> jax.Array:
        return jnp.concatenate([jnp.array([[7]]) if begun is None else begun, jnp.array([[5]])], axis=1)

    noise = jnp.full((1, 4, 1), -1.0)
    found = [taught(student, noise, codes, write, rewritten, 3)[0, :, 0].tolist() for rewritten in (0, 1)]
    assert found == [[7.0, 5.0, 2.0, 0.5], [2.0, 5.0, 2.0, 0.5]]
    assert seen == [([7.0, 5.0, -1.0, -1.0], 2), ([-1.0] * 4, 0), ([2.0, 5.0, -1.0, -1.0], 2)]
    with pytest.raises(GenError, match=r"3 tokens of a model whose maps end after \[1, "):
        ScaleSampler().tokens(model, run.params, keys, cond, run.tokenizer, count=3)
    for bad, message in (
        ({"rewritten": 1}, "no teacher writes here; give it"),
        ({"writer": ScaleSampler()}, r"between the calls \(0,\); expected two calls"),
        ({"writer": ScaleSampler(), "starts": (0, 2), "rewritten": 2}, "a token before K"),
    ):
        with pytest.raises(GenError, match=message):
            NoiseDecoding(**bad)


def _random(name: str, model: Any, sampler: Any, tokenizer: Any) -> Loaded:
    """A run of a model whose random weights say something."""
    params = jax.tree.map(
        lambda v: v + 0.3 * jax.random.normal(jax.random.key(v.size), v.shape), model.net.init(jax.random.key(0))
    )
    config = RunConfig(name, sampler=sampler, tokenizer=tokenizer, models={"net": Model(model)})
    made = {"net": params, "tokenizer": Network(tokenizer).init(jax.random.key(1))}
    return Loaded(Path(name), config, made, "ema", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "starts"), [(pyramid, (0, 1)), (masked, (0,)), (skips, (0,))]
)  # of three maps the first
def test_a_student_trains_on_its_teachers_records(of: Any, starts: tuple[int, ...], tmp_path: Path) -> None:
    teacher, folder = of(), tmp_path / "pairs"
    generator = teacher.generator
    cond = make_conditions(generator.conditions, np.arange(ROWS))
    make_records(make_of(generator), teacher.params, folder, count=ROWS, maker=teacher.origin, cond=cond, batch=ROWS)
    recipe = distilled_decoding(teacher, str(folder), updates=3, batch=8)
    engine = dataclasses.replace(recipe.config.engine, quiet=True, log_every=1)
    out = tmp_path / "run"
    train(dataclasses.replace(recipe.config, engine=engine), out, frozen=recipe.frozen, artifacts=recipe.artifacts)
    student = load(out)
    assert student.generator.nfe == len(starts)
    assert student.generator.sampler.starts == starts
    images = student.sample([0, 1], labels=[0, 1])
    np.testing.assert_array_equal(student.sample([1], labels=[1])[0], images[1])


def test_a_student_of_a_masked_model_is_its_teacher_with_other_ears() -> None:
    """Where it hears what the teacher reads it says what the teacher says; without a teacher in between."""
    teacher = masked()
    student, own = student_of(teacher), teacher.params["net"]
    assert isinstance(student, MaskGITStudentConfig)
    task = _task(teacher, student=student)
    frozen = {"teacher": own, "tokenizer": teacher.params["tokenizer"]}
    begun = task.start(jax.random.key(2), frozen, None)["student"]
    jax.tree.map(np.testing.assert_array_equal, begun["body"], own)
    ids, cond = jnp.array([[1, 2, 3, 8]]), {"label": jnp.zeros(1, jnp.int32)}
    rows = jax.random.normal(jax.random.key(3), (9, 3)) @ jnp.eye(3, 16)
    table = {**own, "embedding": {"embedding": own["embedding"]["embedding"].at[:9].set(rows)}}
    heard = {
        **begun,
        "body": table,
        "tokens": {"kernel": jnp.eye(3, 16), "bias": jnp.zeros(16)},
        "known": {"embedding": jnp.zeros((2, 16))},
    }
    said, _ = Network(student)(heard, rows[ids][..., :3], jnp.zeros(1, jnp.int32), cond)
    np.testing.assert_allclose(said, teacher.generator.model.logits(table, ids, cond), atol=1e-5)
    with pytest.raises(GenError, match="writes no first tokens for its student"):
        NoiseDecoding((0, 2)).guided_by(teacher.config.sampler)


def test_a_student_of_maps_starts_as_its_teacher() -> None:
    """The class token keeps its place and level; blocks and heads are the teacher's."""
    teacher = pyramid()
    task = _task(teacher, student=student_of(teacher))
    frozen = {"teacher": teacher.params["net"], "tokenizer": teacher.params["tokenizer"]}
    begun, own = task.start(jax.random.key(2), frozen, None)["student"], teacher.params["net"]
    for name in ("positions", "levels"):
        np.testing.assert_array_equal(begun[name][1:], own[name])
        np.testing.assert_array_equal(begun[name][0], own[name][0])
    for name in ("label", "enter", "head", "start"):
        jax.tree.map(np.testing.assert_array_equal, begun[name], own[name])
    jax.tree.map(np.testing.assert_array_equal, begun["blocks"]["attn"], own["blocks"]["attn"])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["llamagen-dd", "var-dd"])
def test_students_go_to_files_and_back(system: str, tmp_path: Path) -> None:
    """`gen convert` writes a student under official names; read back with the tokenizer it makes the same images."""
    of, importer = pyramid() if system == "var-dd" else row(), published(system)
    params = Network(student_of(of)).init(jax.random.key(3))
    generator = dataclasses.replace(importer.generator(student_of(of)), tokenizer=of.tokenizer)
    folders = {name: tmp_path / name for name in ("student", "tokenizer")}
    run = RunConfig("x", models={"net": Model(student_of(of))}, sampler=generator.sampler, tokenizer=of.tokenizer)
    for name, config in (("student", run), ("tokenizer", RunConfig("y", models={"tokenizer": Model(of.tokenizer)}))):
        held = {"tokenizer": of.params["tokenizer"]} | ({"net": params} if name == "student" else {})
        for role, tree in held.items():
            arrays.save(folders[name] / "artifacts" / f"{role}.safetensors", jax.device_get(tree), {"origin": "here"})
        write_json(folders[name] / "config.json", to_json(config))
    file, back = str(tmp_path / "model.safetensors"), str(tmp_path / "back")
    assert main(["convert", str(folders["student"]), "--system", system, "--out", file]) == 0
    assert main(["convert", file, "--out", back, "--vae", str(folders["tokenizer"])]) == 0
    again = load(back)
    assert again.generator == generator
    np.testing.assert_array_equal(again.sample([0, 1]), load(folders["student"]).sample([0, 1]))


def test_only_tokens_that_are_asked_count() -> None:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    logits, vectors = (jnp.asarray(rng.normal(size=(2, 4, n)), jnp.float32) for n in (5, 2))
    ids, known = jnp.asarray(rng.integers(0, 5, (2, 4))), jnp.asarray([0, 3])
    losses, terms = distillation_loss(logits, vectors, ids, codes, known, 2.0)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    said = [-log_p[0, np.arange(4), ids[0]].mean(), -log_p[1, 3, ids[1, 3]]]
    off = [np.square(vectors[0] - codes[ids[0]]).mean(), np.square(vectors[1, 3] - codes[ids[1, 3]]).mean()]
    np.testing.assert_allclose(terms["cross_entropy"], said, rtol=1e-5)
    np.testing.assert_allclose(losses, np.asarray(said) + 2.0 * np.asarray(off), rtol=1e-5)


def _task(teacher: Loaded, **changes: Any) -> DistilledDecodingTask:
    model, tokenizer = teacher.generator.model, teacher.tokenizer
    student = changes.get("student") or GPTStudentConfig(model, tokenizer.spec.width)
    return DistilledDecodingTask(**({"teacher": model, "tokenizer": tokenizer, "student": student} | changes))


def test_refusals(teacher: Loaded, records: str) -> None:
    model, other = teacher.generator.model, GPTStudentConfig(WRITER, 7)
    with pytest.raises(GenError, match=r"a student of .* vectors of 7, and a teacher of"):
        _task(teacher, student=other)
    with pytest.raises(GenError, match=r"starts \(99,\) of .* tokens"):
        _task(teacher, starts=(99,))
    with pytest.raises(GenError, match=r"no noise; this student needs noise .* make records of the teacher"):
        _task(teacher).check({"tokens": np.zeros((1, *model.shape), np.int32), "label": np.zeros(1, np.int32)})
    with pytest.raises(GenError, match="needs the frozen role 'tokenizer'"):
        _task(teacher).init(jax.random.key(0), {"teacher": teacher.params["net"]}, None)
    with pytest.raises(GenError, match="flows end in code vectors, and this teacher has no tokenizer"):
        FlowedTokens(dataclasses.replace(teacher.generator, tokenizer=None))
    with pytest.raises(GenError, match="expected numbers rising from 0"):
        NoiseDecoding((1, 2))
    with pytest.raises(GenError, match="makes code vectors, which only its teacher's tokenizer decodes"):
        NoiseDecoder(GPTStudentConfig(model, 2))({}, jax.random.split(jax.random.key(0), 2), {})
    with pytest.raises(GenError, match="keep fewer"):
        NoiseDecoder(GPTStudentConfig(model, 2), NoiseDecoding((0, 50)), teacher.tokenizer)
    with pytest.raises(GenError, match=r"has its own calls; change sampler\.starts"):
        NoiseDecoding().changed(guidance=2.0)
    with pytest.raises(GenError, match="begin with side 2; a student's begin with 1"):
        VARStudentConfig(VARConfig(Residual(8, 3, (2, 4)), CLASSES, 16, 1, 2, 32))
    with pytest.raises(GenError, match="has no published form"):
        GPTStudentConfig(GPTConfig((2, 2), 8, 16, 1, 2, 16, num_classes=0, text=(3, 4)))
    flow = RunConfig("flow", sampler=Sampler(steps=2), models={"net": Model(VOCABULARY["denoiser"])})
    denoiser = Loaded(Path("flow"), flow, {"net": Network(NETWORK).init(jax.random.key(0))}, "ema", 1)
    assert isinstance(make_of(denoiser.generator), Solved)
    with pytest.raises(GenError, match="flow is a Denoiser; distilled decoding takes a LlamaGen, a VAR or a MaskGIT"):
        distilled_decoding(denoiser, records)
    with pytest.raises(GenError, match="this student's teacher is other"):
        Records(records, "other").source()
