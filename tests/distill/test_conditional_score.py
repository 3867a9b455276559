"""Distilled Decoding 2: the teacher's distribution, the fake score's view, its two programs, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale, filtered, mix
from gen.autoregressive.infilling import InfillingSampler
from gen.autoregressive.sampler import TokenSampler, write
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.var import VARConfig
from gen.diffusion.prediction import Prediction
from gen.distill.code_flow import CodeDenoiser, flow_to_codes
from gen.distill.conditional_score import PROCESS, ConditionalScoreTask
from gen.distill.distilled_decoding import DistilledDecodingTask, nearest
from gen.distill.gpt_student import GPTStudentConfig
from gen.distill.var_student import VARStudentConfig
from gen.errors import GenError
from gen.nn.network import Network, Params
from gen.tokenizers.code_vectors import code_table
from gen.training.optim import OptimConfig
from tests.conformance.examples import CLASSES, CODES, SHAPE, SMALL, WRITER

LABEL = {"label": jnp.arange(6, dtype=jnp.int32) % CLASSES}
PYRAMID = SMALL["var-vqvae"]
SETTINGS: dict[str, Any] = {
    "head_width": 8,
    "head_depth": 1,
    "optim": OptimConfig(1e-2),
    "fake_optim": OptimConfig(1e-2),
}


def speaking(config: Any) -> Params:
    """Random weights that say something."""
    params = Network(config).init(jax.random.key(0))
    return jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(v.size), v.shape, v.dtype), params)


def tasks(**changes: Any) -> dict[str, tuple[ConditionalScoreTask, dict[str, Params]]]:
    """A task of each kind of teacher, with its frozen arrays."""
    pyramid = VARConfig(PYRAMID.quantizer, CLASSES, 16, 1, 2, 32, scan=False)
    found = {
        "gpt": (WRITER, CODES, GPTStudentConfig(WRITER, SHAPE[-1]), TokenSampler(ConstantScale(1.5), 0.9, 5)),
        "var": (pyramid, PYRAMID, VARStudentConfig(pyramid), ScaleSampler(top_k=9)),
    }
    return {
        name: (
            ConditionalScoreTask(
                teacher=model, tokenizer=tokenizer, student=student, sampler=sampler, **SETTINGS | changes
            ),
            {"teacher": speaking(model), "tokenizer": Network(tokenizer).init(jax.random.key(1))},
        )
        for name, (model, tokenizer, student, sampler) in found.items()
    }


@pytest.mark.parametrize("name", ["gpt", pytest.param("var", marks=pytest.mark.slow)])
def test_a_token_is_judged_by_what_stands_before_it(name: str) -> None:
    """Neither the teacher's probabilities nor the fake score of a token depend on it or on later ones."""
    task, frozen = tasks()[name]
    n, last = task.student.shape[0], task.teacher.groups[-1]
    ids = jax.random.randint(jax.random.key(2), (6, n), 0, task.teacher.vocabulary)
    other = ids.at[:, n - last :].set((ids[:, n - last :] + 1) % task.teacher.vocabulary)
    fake = {"net": frozen["teacher"], "head": speaking(task.score.network)}
    x, t = jax.random.normal(jax.random.key(3), (6, *task.student.shape)), jnp.full((6, n), 0.5)
    run = jax.jit(
        lambda ids: (task.log_probabilities(frozen, ids, LABEL), task.fake(fake, frozen, ids, x, t, LABEL).denoised)
    )
    for one, two in zip(run(ids), run(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    earlier = run(ids.at[:, 0].set((ids[:, 0] + 1) % task.teacher.vocabulary))
    assert not np.allclose(run(ids)[1][:, -1], earlier[1][:, -1])


def test_the_teachers_distribution_is_the_one_it_is_sampled_from() -> None:
    task, frozen = tasks()["gpt"]
    model, params, sampler = task.teacher, frozen["teacher"], task.sampler
    ids = jax.random.randint(jax.random.key(2), (6, model.length), 0, model.vocabulary)
    own, null = (model.prefill(params, cond, 6)[1] for cond in (LABEL, model.null(params, LABEL)))
    expected = filtered(mix(own, null, 1.5), temperature=sampler.temperature, k=sampler.top_k)
    found = task.log_probabilities(frozen, ids, LABEL)[:, :1]
    np.testing.assert_allclose(found, jax.nn.log_softmax(expected), rtol=1e-4, atol=1e-4)
    assert np.isneginf(np.asarray(found)).any()  # filtered away, and never matched


@pytest.mark.slow
def test_the_fake_score_learns_alone_at_first_then_both_do() -> None:
    task, frozen = tasks(ratio=3, aligned=2)["gpt"]
    order = ["fake_score", "fake_score", "student", "fake_score", "fake_score", "student", "fake_score"]
    assert [task.select(step) for step in range(7)] == order
    assert task.updates("student", 7) == 2
    state = jax.jit(task.init)(jax.random.key(0), frozen, None)
    batch = {"tokens": jnp.zeros((6, *task.teacher.shape), jnp.int32), **LABEL}
    for name, moved in (("fake_score", {"fake_score"}), ("student", {"student", "fake_score"})):
        new, metrics = jax.jit(task.programs[name])(state, frozen, batch, task.inputs(50, 100), jax.random.key(1))
        assert all(np.isfinite(float(value)) for value in metrics.values())
        for part in ("student", "fake_score"):
            pairs = zip(jax.tree.leaves(new.params[part]), jax.tree.leaves(state.params[part]), strict=True)
            assert any(bool((a != b).any()) for a, b in pairs) == (part in moved)


class Exact(ConditionalScoreTask):
    """Its fake score says what the teacher says."""

    def fake(self, params: Params, frozen: Any, ids: jax.Array, x: jax.Array, t: jax.Array, cond: Any) -> Prediction:
        codes = code_table(self.tokenizer, frozen["tokenizer"])
        return CodeDenoiser(PROCESS, self.log_probabilities(frozen, ids, cond), codes)(x, t, {}, jnp.int32(0), ())[0]


def test_a_student_whose_score_is_the_teachers_stays() -> None:
    task, frozen = tasks()["gpt"]
    exact = Exact(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})
    codes, drawn = code_table(task.tokenizer, frozen["tokenizer"]), task.draw(jax.random.key(4), 6)
    student = speaking(task.student)
    fake = {"net": frozen["teacher"], "head": speaking(task.score.network)}
    for judge, still in ((exact, True), (task, False)):
        run = jax.jit(jax.grad(lambda p, judge=judge: judge.student_loss(p, fake, frozen, codes, (LABEL, drawn))[0]))
        gradient = run(student)["codes"]["linear"]["kernel"]
        assert (float(jnp.abs(gradient).max()) < 1e-6) == still


@pytest.mark.slow
def test_matching_brings_the_tokens_nearer_to_the_teachers() -> None:
    """The joint frequencies of pairs of tokens, of vectors snapped to codes, after regression and after matching."""
    model = dataclasses.replace(
        WRITER, shape=(4,), width=32, depth=2, hidden=64, num_classes=2, cond_dropout=0.0, dropout=0.0
    )
    params, tokenizer = speaking(model), Network(CODES).init(jax.random.key(1))
    embedding = tokenizer["quantizer"]["embedding"]
    tokenizer["quantizer"]["embedding"] = embedding / embedding.std()
    codes = code_table(CODES, tokenizer)
    label = {"label": jnp.arange(4096, dtype=jnp.int32) % 2}

    def written(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.normal(key, (count, 4, codes.shape[1]))

        def pick(logits: jax.Array, at: Any) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(noise, at, 1, axis=1)
            return flow_to_codes(jax.nn.log_softmax(logits), codes, own, 50)[0]

        return noise, write(model, params, {"label": label["label"][:count]}, count, pick)

    def joint(ids: jax.Array) -> jax.Array:
        hot = jax.nn.one_hot(ids, model.vocabulary)
        return jnp.einsum("bia,bjc->ijac", hot, hot)[jnp.triu_indices(4, 1)] / len(ids)

    def off(student: Params) -> float:
        noise = jax.random.normal(jax.random.key(9), (4096, 4, codes.shape[1]))
        _, vectors = Network(shared["student"])(student, noise, jnp.zeros(4096, jnp.int32), label)
        return float(0.5 * jnp.abs(joint(nearest(codes, vectors)) - expected).sum((1, 2)).mean())

    def trained(task: Any, steps: int, previous: Any) -> Any:
        state = jax.jit(lambda key: task.init(key, frozen, previous))(jax.random.key(0))
        programs = {name: jax.jit(program) for name, program in task.programs.items()}
        for step in range(steps):
            noise, ids = records[step % len(records)]
            batch = {"noise": noise, "tokens": ids, "label": label["label"][:256]}
            run, key = programs[task.select(step)], jax.random.fold_in(jax.random.key(3), step)
            state, _ = run(state, frozen, batch, task.inputs(step, steps), key)
        return state

    make = jax.jit(written, static_argnums=1)
    expected, records = joint(make(jax.random.key(100), 4096)[1]), [make(jax.random.key(i), 256) for i in range(16)]
    shared: dict[str, Any] = {
        "teacher": model,
        "tokenizer": CODES,
        "student": GPTStudentConfig(model, codes.shape[1]),
    }
    frozen = {"teacher": params, "tokenizer": tokenizer}
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=20, clip=1.0)
    first = trained(DistilledDecodingTask(**shared, optim=optim), 300, None)
    optim = OptimConfig(3e-4, betas=(0.0, 0.99), schedule="cosine", warmup=20, clip=1.0)
    matching = ConditionalScoreTask(
        **shared,
        sampler=TokenSampler(),
        head_width=64,
        head_depth=2,
        ratio=2,
        aligned=150,
        optim=optim,
        fake_optim=dataclasses.replace(optim, lr=2e-3),
    )
    second = trained(matching, 800, first)
    before, after = off(first.params["student"]), off(second.params["student"])
    assert after < 0.85 * before, f"{after:.3f} after matching, {before:.3f} before"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 0}, "expected at least 1"),
        ({"aligned": -1}, "0 or more updates"),
        ({"sampler": InfillingSampler(2, 3)}, "does not draw from probabilities of the next tokens"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    settings = {"teacher": WRITER, "tokenizer": CODES, "student": GPTStudentConfig(WRITER, SHAPE[-1])}
    with pytest.raises(GenError, match=words):
        ConditionalScoreTask(**{**settings, "sampler": TokenSampler(), **changes})
