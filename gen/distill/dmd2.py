"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's output x is noised; the frozen teacher ("real score") and a trained copy that models the student's own
distribution ("fake score") both denoise it, and their difference is a gradient on x: an approximate reverse KL.
A discriminator head on the fake score's features adds a GAN loss against real data. The fake score is updated at
every step, the student at every `ratio`-th, before the fake score and on the same x.

Everything goes through `Prediction.denoised`, so that teachers of any process and parameterization (EDM, noise
prediction, flows) are distilled by the same lines.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.objectives import Draws, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import pair
from gen.diffusion.times import Levels
from gen.errors import GenError
from gen.nn.adversarial import logistic_discriminator_loss, logistic_generator_loss
from gen.nn.network import Cond, Network, Params
from gen.sampling.guidance import ClassifierFree
from gen.training.method import StudentMethod
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Program, Schedule, State

__all__ = [
    "DMD2Draws",
    "DMD2Task",
    "backward_simulation",
    "matching_gradient",
    "matching_loss",
    "sample_norm",
]


def matching_gradient(x: jax.Array, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Gives the distribution-matching gradient on x (B, ...): (fake - real) / mean |x - real|.

    Args:
      real, fake: denoised x_t by the teacher and by the fake score.

    Returns:
      like x; the mean is per sample over all other axes; non-finite entries become 0 or the largest finite number.
    """
    weight = jnp.abs(x - real).mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    return jnp.nan_to_num((fake - real) / weight)


def matching_loss(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gives a scalar whose gradient in x is `gradient` / x.size: 0.5 mean (x - stop(x - gradient))^2."""
    return 0.5 * jnp.square(x - jax.lax.stop_gradient(x - gradient)).mean()


def sample_norm(gradient: jax.Array) -> jax.Array:
    """Gives the mean over samples of the norm of each sample's own gradient, from the gradient (B, ...) of a batch
    mean.
    """
    b = gradient.shape[0]
    return b * jnp.linalg.norm(gradient.reshape(b, -1), axis=1).mean()


def backward_simulation(
    student: Callable[[jax.Array, jax.Array], jax.Array],
    process: Any,
    times: tuple[float, ...],
    noises: jax.Array,
    stop: jax.Array | int,
) -> jax.Array:
    """Gives the image that `stop` calls of a multi-step student make from noise (DMD2 section 4.5); no gradient.

    Args:
      student: (x_t, t) -> denoised.
      times: the student's times, noise end first (n entries).
      noises: (n, B, ...); noises[0] is the starting point, noises[j] re-noises to times[j].
      stop: 0 .. n - 1, may be traced; 0 returns noises[0].
    """
    clock = jnp.asarray(times, jnp.float32)

    def body(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        clean = student(state[0], clock[j])
        a, s = pair(process, clock[j + 1], clean)
        return a * clean + s * noises[j + 1], clean

    return jax.lax.fori_loop(0, stop, body, (noises[0], noises[0]))[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DMD2Draws:
    """All randomness of one step, shared by its student and fake-score updates. Every array has leading axis B.

    Attributes:
      order: (B,) int32, a permutation: which of the batch's conditions each generated sample gets.
      noise: (B, ...) unit normal, what the student's input is made with.
      stop: (B,) int32, all equal: the student step that is trained (0 for one-step students).
      simulated: (B, n, ...) unit normals of the backward simulation; (B, 0, ...) for one-step students.
      matching, gan_student: levels and noises of the student's two losses.
      fake: draws of the fake score's own objective.
      gan_fake, gan_real: levels and noises of the discriminator's two inputs.
    """

    order: jax.Array
    noise: jax.Array
    stop: jax.Array
    simulated: jax.Array
    matching: Draws
    gan_student: Draws
    fake: Draws
    gan_fake: Draws
    gan_real: Draws


@dataclasses.dataclass(frozen=True)
class DMD2Task(StudentMethod):
    """Trains ``student`` and ``fake_score`` (the fake score's network, and the discriminator head where there is one).

    Batches hold real data and conditions by name. The student is conditioned on a shuffle of the batch's own
    conditions, so that real and generated conditions are independent. The fake score is trained with the teacher's
    native objective. Several times (see `StudentMethod`) are trained on inputs simulated with the current student.

    Attributes:
      levels, gan_levels: noise levels of distribution matching and of the discriminator's inputs.
      fake_levels: noise levels of the fake score's objective; None keeps the objective's own.
      guidance: applied to the teacher only.
      head: the discriminator head on the fake score's features (`gen.nn.adversarial`), None for no GAN loss.
      taps: names of those features; several are joined on the channel axis.
      gan_weight, head_weight: of the student's GAN loss and of the discriminator's. The student's is best chosen so
        that the logged ``dm_grad`` and ``gan_weight * gan_grad`` are of one size.
      ratio: fake-score updates per student update.
      fake_optim: the optimiser of fake score and head together.
    """

    levels: Levels = Levels(0.02, 0.98)
    fake_levels: Levels | None = Levels()
    gan_levels: Levels = Levels()
    guidance: Any = ClassifierFree()
    head: Any = None
    taps: tuple[str, ...] = ()
    gan_weight: float = 3e-3
    head_weight: float = 1e-2
    ratio: int = 5
    optim: OptimConfig = OptimConfig(lr=2e-6, weight_decay=0.01, warmup=500, clip=10.0)
    fake_optim: OptimConfig = OptimConfig(lr=2e-6, weight_decay=0.01, warmup=500, clip=10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.head is None) != (not self.taps):
            raise GenError("a discriminator head reads taps: give both `head` and `taps`, or neither")
        if self.ratio < 1:
            raise GenError(f"ratio is {self.ratio}; expected fake-score updates per student update, at least 1")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student, and the fake score with its head."""
        networks = {"net": self.teacher.network} | ({} if self.head is None else {"head": self.head})
        return (self.student_part, Part("fake_score", networks, self.fake_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fake score from the teacher; student from the previous stage's student, or else from the teacher."""
        student = super().start(key, frozen, previous)
        head = {} if self.head is None else {"head": Network(self.head).init(key)}
        return {**student, "fake_score": {"net": frozen["teacher"], **head}}

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives ``student`` (student, then fake score, on the same x) and ``fake_score`` alone.

        Metrics bear the name of the part that they are of: ``student/loss``, ``fake_score/loss``.
        """
        return {"student": self.update_both, "fake_score": self.update_fake_score}

    def select(self, step: int) -> str:
        """Moves the student at every `ratio`-th step, the first included."""
        return "student" if step % self.ratio == 0 else "fake_score"

    def updates(self, part: str, steps: int) -> int:
        """Counts the student's updates, one at every `ratio`-th step, and the fake score's, one at each."""
        return -(-steps // self.ratio) if part == "student" else steps

    def update_both(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the student; the fake score then learns from the x it was judged by."""
        data = self._draws(batch, key)
        before = state.params["student"]

        def loss(student: Params, data: Any) -> tuple[jax.Array, Aux]:
            _, _, cond, draws = data
            return self.student_loss(student, frozen["teacher"], state.params["fake_score"], cond, draws)

        state, metrics, _ = self.student_part.update(state, loss, data, schedule)
        state, fake_metrics = self._update_fake_score(state, before, data, schedule)
        return state, {**self.student_part.named(metrics), **fake_metrics}

    def update_fake_score(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the fake score and the discriminator head."""
        del frozen
        return self._update_fake_score(state, state.params["student"], self._draws(batch, key), schedule)

    def _update_fake_score(self, state: State, student: Params, data: Any, schedule: Schedule) -> tuple[State, Metrics]:
        def loss(fake: Params, data: Any) -> tuple[jax.Array, Aux]:
            real, real_cond, cond, draws = data
            x = self.generate(student, cond, draws)
            return self.fake_score_loss(fake, x, cond, real, real_cond, draws)

        part = self.parts[1]
        state, metrics, _ = part.update(state, loss, data, schedule)
        return state, part.named(metrics)

    def _draws(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Cond, Cond, DMD2Draws]:
        """(real data, its conditions, the generated samples' conditions, draws), all with leading axis B."""
        real, real_cond = self.data(batch), self.cond(batch)
        draws = self.draw(key, real)
        return real, real_cond, {name: v[draws.order] for name, v in real_cond.items()}, draws

    def draw(self, key: jax.Array, x: jax.Array) -> DMD2Draws:
        """Draws all random numbers of a step for data shaped like x (B, ...)."""
        order, noise, stop, simulated, matching, gan_student, fake, fake_level, gan_fake, gan_real = jax.random.split(
            key, 10
        )
        process, n, b = self.teacher.process, len(self.times), x.shape[0]

        def draws(key: jax.Array, levels: Levels) -> Draws:
            first, second = jax.random.split(key)
            return Draws(levels(first, process, b), jax.random.normal(second, x.shape))

        own = self.teacher.objective.draw(fake, process, x)
        if self.fake_levels is not None:
            own = dataclasses.replace(own, t=self.fake_levels(fake_level, process, b))
        return DMD2Draws(
            order=jax.random.permutation(order, b).astype(jnp.int32),
            noise=jax.random.normal(noise, x.shape),
            stop=jnp.broadcast_to(jax.random.randint(stop, (), 0, n), (b,)),
            simulated=jax.random.normal(simulated, (b, n if n > 1 else 0, *x.shape[1:])),
            matching=draws(matching, self.levels),
            gan_student=draws(gan_student, self.gan_levels),
            fake=own,
            gan_fake=draws(gan_fake, self.gan_levels),
            gan_real=draws(gan_real, self.gan_levels),
        )

    def student_input(self, student: Params, cond: Cond, draws: DMD2Draws) -> tuple[jax.Array, jax.Array]:
        """Gives (x_t, t) that the student is trained at; without gradient."""
        start = self.first_scale * draws.noise
        if len(self.times) == 1:
            return start, jnp.float32(self.times[0])
        process, frozen = self.denoiser.process, jax.lax.stop_gradient(student)
        noises = jnp.moveaxis(draws.simulated, 1, 0).at[0].multiply(self.first_scale)
        stop = draws.stop[0]
        clean = backward_simulation(
            lambda x, t: self.denoiser(frozen, x, t, cond).denoised, process, self.times, noises, stop
        )
        t = jnp.asarray(self.times, jnp.float32)[stop]
        a, s = pair(process, t, clean)
        return jnp.where(stop == 0, start, a * clean + s * draws.noise), t

    def generate(self, student: Params, cond: Cond, draws: DMD2Draws) -> jax.Array:
        """Gives the student's output x, which all losses judge."""
        x_t, t = self.student_input(student, cond, draws)
        return self.denoiser(student, x_t, t, cond).denoised

    def scores(
        self, teacher: Params, fake: Params, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, jax.Array]:
        """Gives x, noised, as denoised by the (guided) teacher and by the fake score."""
        score = self.teacher
        x_t = noised(score.process, x, draws)
        real = self.guidance(score.bind(teacher), lambda c: score.net.apply(teacher, c, method="null"))
        prediction, _ = real(x_t, draws.t, cond, jnp.int32(0), self.guidance.init(x_t))
        return prediction.denoised, score(fake["net"], x_t, draws.t, cond).denoised

    def logits(self, fake: Params, x: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Gives the discriminator's logits (B, positions) of x noised by `draws`."""
        x_t = noised(self.teacher.process, x, draws)
        features = self.teacher.features(fake["net"], x_t, draws.t, cond, self.taps)
        return Network(self.head)(fake["head"], jnp.concatenate([features[k] for k in self.taps], axis=-1))

    def matching_term(self, x: jax.Array, teacher: Params, fake: Params, cond: Cond, draws: DMD2Draws) -> jax.Array:
        """Gives the distribution-matching loss of generated x; no gradient through the two scores."""
        fixed = jax.lax.stop_gradient(x)
        return matching_loss(x, matching_gradient(fixed, *self.scores(teacher, fake, fixed, cond, draws.matching)))

    def gan_term(self, x: jax.Array, fake: Params, cond: Cond, draws: DMD2Draws) -> jax.Array:
        """Gives the student's GAN loss of generated x, differentiable through the fake score's features."""
        return logistic_generator_loss(self.logits(fake, x, cond, draws.gan_student))

    def student_loss(
        self, student: Params, teacher: Params, fake: Params, cond: Cond, draws: DMD2Draws
    ) -> tuple[jax.Array, Aux]:
        """Gives the student's loss and its terms, with the norms of both gradients at the generated data.

        The terms are differentiated at x once, which gives the norms; x then carries their weighted sum back.
        """
        x = self.generate(student, cond, draws)
        fixed = jax.lax.stop_gradient(x)
        loss, gradient = jax.value_and_grad(self.matching_term)(fixed, teacher, fake, cond, draws)
        terms = {"dm_loss": loss, "dm_grad": sample_norm(gradient)}
        if self.head is not None:
            gan, gan_gradient = jax.value_and_grad(self.gan_term)(fixed, fake, cond, draws)
            terms |= {"gan_loss": gan, "gan_grad": sample_norm(gan_gradient)}
            loss, gradient = loss + self.gan_weight * gan, gradient + self.gan_weight * gan_gradient
        return loss + jnp.sum((x - fixed) * gradient), Aux(terms)

    def fake_score_loss(
        self, fake: Params, x: jax.Array, cond: Cond, real: jax.Array, real_cond: Cond, draws: DMD2Draws
    ) -> tuple[jax.Array, Aux]:
        """Gives the fake score's denoising loss on generated x, plus the discriminator's loss against real data."""

        def evaluate(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            return self.teacher(fake["net"], x_t, t, cond)

        x = jax.lax.stop_gradient(x)
        losses, _ = self.teacher.objective.loss(evaluate, self.teacher.process, x, cond, draws.fake)
        loss = losses.mean()
        terms = {"fake_loss": loss}
        if self.head is not None:
            both = jax.tree.map(
                lambda *v: jnp.concatenate(v), (x, cond, draws.gan_fake), (real, real_cond, draws.gan_real)
            )
            on_fake, on_real = jnp.split(self.logits(fake, *both), 2)
            gan = logistic_discriminator_loss(on_real, on_fake)
            terms |= {
                "head_loss": gan,
                "p_real": jax.nn.sigmoid(on_real).mean(),
                "p_fake": jax.nn.sigmoid(on_fake).mean(),
            }
            loss = loss + self.head_weight * gan
        return loss, Aux(terms)
