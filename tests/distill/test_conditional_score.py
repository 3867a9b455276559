"""Distilled Decoding 2: the teacher's distribution, the fake score's view, its two programs, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale, filtered, mix
from gen.autoregressive.infilling import InfillingSampler
from gen.autoregressive.sampler import TokenSampler
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.var import VARConfig
from gen.diffusion.prediction import Prediction
from gen.distill.code_flow import CodeDenoiser
from gen.distill.conditional_score import PROCESS, ConditionalScoreTask
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
