"""Distilled Decoding 2: one call for all tokens by conditional score distillation (arXiv 2510.21003).

An autoregressive teacher says exactly what a noised code should be denoised to, given the tokens before it
(`gen.distill.code_flow`). The student writes code vectors q_1 .. q_N from noise in one call; a *fake score* learns the
same conditional denoiser of what the student writes, and at every position, with the prefix held fixed,

    x_t = (1 - t) q_i + t eps,
    gradient at q_i: (E_fake[q | x_t, q_<i] - E_teacher[q | x_t, q_<i]) / mean |q - E_teacher|.

This is DMD2's gradient (`gen.distill.dmd2.matching_gradient`) one token at a time, and descends the sum over the
positions of the divergence of the student's conditionals from the teacher's. Only the abstract of the paper is public:
the network of the fake score, that prefixes are snapped to codes, and the start from a student of Distilled Decoding 1
are this project's reading.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.decoding import filtered, mix
from gen.autoregressive.token_head import HeadConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import Draws, VelocityMatching, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear
from gen.diffusion.times import Levels
from gen.distill.code_flow import CodeDenoiser
from gen.distill.distilled_decoding import TokenStudentMethod, nearest
from gen.distill.dmd2 import matching_gradient, matching_loss
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.tokenizers.code_vectors import code_table
from gen.training.method import given
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Program, Schedule, State

__all__ = ["ConditionalScoreTask", "score_head"]

PROCESS = Linear()


def score_head(channels: int, z: int, width: int, depth: int) -> Denoiser:
    """Gives the denoiser of one code vector on the linear flow, given what a transformer says of its prefix.

    It is MAR's head (`gen.autoregressive.token_head`), asked for the velocity; its variance is not used.

    Args:
      channels: of a code vector; z: the transformer's width.
      width, depth: of the head.
    """
    head = HeadConfig(channels, z, width, depth)
    return Denoiser(head, PROCESS, Predict("velocity", learned_variance=True), VelocityMatching())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalScoreTask(TokenStudentMethod):
    """Trains ``student`` and ``fake_score``: the teacher's transformer over clean tokens, with a head for noised ones.

    Batches hold the teacher's "tokens" (B, *shape) and conditions by name; of the tokens only the number is used.

    Attributes:
      sampler: how the teacher is sampled: its guidance, temperature and filters make the distribution that is matched.
      levels: times of matching, and of the fake score.
      head_width, head_depth: of the fake score's head.
      ratio: updates of the fake score for each of the student.
      aligned: first updates that the fake score makes alone, until it knows the student that training begins with.
      fake_optim: the optimiser of the fake score.

    Raises GenError for a ratio below 1, and a teacher that does not write in one order.
    """

    sampler: Any = given("teacher")
    levels: Levels = Levels(0.02, 0.98)
    head_width: int = 256
    head_depth: int = 3
    ratio: int = 5
    aligned: int = 0
    fake_optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio < 1 or self.aligned < 0:
            raise GenError(f"ratio {self.ratio}, aligned {self.aligned}; expected at least 1, and 0 or more updates")
        if not hasattr(self.sampler, "top_k"):
            raise GenError(
                f"{type(self.sampler).__name__} does not draw from probabilities of the next tokens; give a teacher "
                "that writes token by token or map by map"
            )

    @property
    def score(self) -> Denoiser:
        """Gives the head of the fake score."""
        return score_head(self.student.shape[1], self.teacher.width, self.head_width, self.head_depth)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student, and the fake score with its head."""
        networks = {"net": self.teacher, "head": self.score.network}
        return (*super().parts, Part("fake_score", networks, self.fake_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the student of the previous stage or what fits of the teacher; the fake score starts as the teacher."""
        started = super().start(key, frozen, previous)
        head = self.score.net.init(jax.random.fold_in(key, 1))
        return {**started, "fake_score": {"net": frozen["teacher"], "head": head}}

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives ``student`` (student, then fake score, on the same vectors) and ``fake_score`` alone."""
        return {"student": self.update_both, "fake_score": self.update_fake_score}

    def select(self, step: int) -> str:
        """Moves the student at every `ratio`-th step after the aligning ones."""
        ahead = step - self.aligned
        return "student" if ahead >= 0 and ahead % self.ratio == 0 else "fake_score"

    def updates(self, part: str, steps: int) -> int:
        """Counts the updates of a part in the first `steps` steps."""
        return -(-max(steps - self.aligned, 0) // self.ratio) if part == "student" else steps

    def draw(self, key: jax.Array, count: int) -> dict[str, Any]:
        """Draws all randomness of a step for `count` samples: the student's ``noise``, and times (B, N) and noises of
        the ``matching`` and of the ``fake`` score's loss.
        """
        noise_key, *others = jax.random.split(key, 5)
        shape = (count, *self.student.shape)

        def draws(level: jax.Array, eps: jax.Array) -> Draws:
            times = self.levels(level, PROCESS, count * shape[1]).reshape(shape[:2])
            return Draws(times, jax.random.normal(eps, shape))

        return {
            "noise": jax.random.normal(noise_key, shape),
            "matching": draws(*others[:2]),
            "fake": draws(*others[2:]),
        }

    def generate(self, student: Params, noise: jax.Array, cond: Cond) -> jax.Array:
        """Gives the student's code vectors (B, N, D) of noise (B, N, D)."""
        vectors: jax.Array = Network(self.student)(student, noise, jnp.zeros(len(noise), jnp.int32), cond)[1]
        return vectors

    def log_probabilities(self, frozen: Frozen, ids: jax.Array, cond: Cond) -> jax.Array:
        """Gives log p(token | those before it) (B, N, V) as the teacher is sampled: guided and filtered."""
        model, params, sampler = self.teacher, frozen["teacher"], self.sampler
        given = model.forced(frozen, ids)
        logits = model.logits(params, ids, {**cond, **given})
        if sampler.guidance.guides:
            null = model.logits(params, ids, {**model.null(params, cond), **given})
            scales = np.repeat(sampler.guidance.scales(len(model.groups)), model.groups)
            logits = mix(logits, null, jnp.asarray(scales, jnp.float32)[:, None])
        temperature = getattr(sampler, "temperature", 1.0)
        return jax.nn.log_softmax(filtered(logits, temperature=temperature, k=sampler.top_k, p=sampler.top_p))

    def fake(
        self, params: Params, frozen: Frozen, ids: jax.Array, x: jax.Array, t: jax.Array, cond: Cond
    ) -> Prediction:
        """Gives what the fake score says of noised vectors x (B, N, D) at t (B, N), each after its prefix of ids."""
        z = self.teacher.before(params["net"], ids, {**cond, **self.teacher.forced(frozen, ids)})
        rows = {"z": z.reshape(-1, z.shape[-1]).astype(jnp.float32)}
        found = self.score(params["head"], x.reshape(-1, x.shape[-1]), t.reshape(-1), rows)
        return Prediction(found.velocity.reshape(x.shape), x, t, {}, PROCESS, "velocity")

    def student_loss(
        self, student: Params, fake: Params, frozen: Frozen, codes: jax.Array, data: tuple[Cond, Mapping[str, Any]]
    ) -> tuple[jax.Array, Aux]:
        """Gives the loss whose gradient in the vectors is that of the matching."""
        cond, drawn = data
        q = self.generate(student, drawn["noise"], cond)
        fixed = jax.lax.stop_gradient(q)
        ids, draws = nearest(codes, fixed), drawn["matching"]
        x_t = noised(PROCESS, fixed, draws)
        exact = CodeDenoiser(PROCESS, self.log_probabilities(frozen, ids, cond), codes)
        real, _ = exact(x_t, draws.t, {}, jnp.int32(0), ())
        fake_mean = self.fake(fake, frozen, ids, x_t, draws.t, cond).denoised
        gradient = matching_gradient(fixed, real.denoised, fake_mean)
        used = (jax.nn.one_hot(ids, len(codes)).sum((0, 1)) > 0).mean()
        off = jnp.square(fixed - codes[ids]).mean()
        return matching_loss(q, gradient), Aux({"codes_used": used, "off_codes": off})

    def fake_score_loss(
        self, fake: Params, frozen: Frozen, ids: jax.Array, q: jax.Array, cond: Cond, draws: Draws
    ) -> jax.Array:
        """Gives the mean squared error () of the fake score's velocity on the student's vectors q (B, N, D)."""
        losses, _ = self.score.objective.loss(
            lambda x_t, t, c: self.fake(fake, frozen, ids, x_t, t, c), PROCESS, q, cond, draws
        )
        return losses.mean()

    def update_both(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the student; the fake score then learns from the vectors it was judged by."""
        codes, data = code_table(self.tokenizer, frozen["tokenizer"]), self._data(batch, key)
        before, fake = state.params["student"], state.params["fake_score"]
        part = self.parts[0]
        state, metrics, _ = part.update(
            state, lambda p, d: self.student_loss(p, fake, frozen, codes, d), data, schedule
        )
        state, more = self._update_fake_score(state, frozen, before, codes, data, schedule)
        return state, {**part.named(metrics), **more}

    def update_fake_score(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the fake score."""
        codes = code_table(self.tokenizer, frozen["tokenizer"])
        return self._update_fake_score(state, frozen, state.params["student"], codes, self._data(batch, key), schedule)

    def _update_fake_score(
        self, state: State, frozen: Frozen, student: Params, codes: jax.Array, data: Any, schedule: Schedule
    ) -> tuple[State, Metrics]:
        def loss(fake: Params, data: Any) -> tuple[jax.Array, Aux]:
            cond, drawn = data
            q = jax.lax.stop_gradient(self.generate(student, drawn["noise"], cond))
            return self.fake_score_loss(fake, frozen, nearest(codes, q), q, cond, drawn["fake"]), Aux()

        part = self.parts[1]
        state, metrics, _ = part.update(state, loss, data, schedule)
        return state, part.named(metrics)

    def _data(self, batch: Batch, key: jax.Array) -> tuple[Cond, Mapping[str, Any]]:
        return self.cond(batch), self.draw(key, len(batch["tokens"]))
