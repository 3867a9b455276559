"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867), and DMD before it.

The student's output x is noised; the frozen teacher ("real score") and a trained copy that models the student's own
distribution ("fake score") both denoise it, and their difference is a gradient on x: an approximate reverse KL.
A discriminator head on the fake score's features adds a GAN loss against real data. The fake score is updated at
every step, the student at every `ratio`-th, before the fake score and on the same x.

DMD (Yin et al. 2024, arXiv 2311.18828) updated both equally often, without a discriminator, and held the student to
stored pairs of its teacher by regression: `ratio` 1 and `regression`.

Everything goes through `Prediction.denoised`, so that teachers of any process and parameterization (EDM, noise
prediction, flows) are distilled by the same lines.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.config import check_choices
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import pair
from gen.diffusion.times import Levels
from gen.distill.discriminator import AdversarialStudent
from gen.distill.kd import regression_loss
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.sampling.guidance import ClassifierFree
from gen.tokenizers.losses import expect_frozen
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
class DMD2Task(AdversarialStudent):
    """Trains ``student`` and ``fake_score`` (the fake score's network, and the discriminator head where there is one).

    Batches hold real data and conditions by name. The student is conditioned on a shuffle of the batch's own
    conditions, so that real and generated conditions are independent. Several times (see `StudentMethod`) are trained
    on inputs simulated with the current student.

    Attributes:
      levels: noise levels of distribution matching.
      fake_levels: noise levels of the fake score's objective; None keeps the objective's own.
      fake_objective: the loss of the fake score (`gen.diffusion.objectives`); None for the teacher's native one.
      guidance: applied to the teacher only.
      features: whose features the discriminator's head is on: those of the fake score, which the discriminator's loss
        trains as well, or those of the frozen teacher.
      gan_weight, head_weight: of the student's GAN loss and of the discriminator's. The student's is best chosen so
        that the logged ``dm_grad`` and ``gan_weight * gan_grad`` are of one size.
      regression: weight of DMD's loss between the student and its teacher on stored pairs, 0 for none. Batches are then
        records: what the teacher made is the data, and "noise" (B, ...) what it made them of.
      regression_term: the distance of images that it takes (`gen.tokenizers.losses.ImageTerm`: DMD took LPIPS), whose
        network is a frozen role; None for half the mean squared error.
      ratio: fake-score updates per student update.
      fake_optim: the optimiser of fake score and head together.

    Raises GenError for a ratio below 1, and regression with several times.
    """

    levels: Levels = Levels(0.02, 0.98)
    fake_levels: Levels | None = Levels()
    fake_objective: Any = None
    guidance: Any = ClassifierFree()
    features: Literal["fake", "teacher"] = "fake"
    gan_weight: float = 3e-3
    head_weight: float = 1e-2
    regression: float = 0.0
    regression_term: Any = None
    ratio: int = 5
    optim: OptimConfig = OptimConfig(lr=2e-6, weight_decay=0.01, warmup=500, clip=10.0)
    fake_optim: OptimConfig = OptimConfig(lr=2e-6, weight_decay=0.01, warmup=500, clip=10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.ratio < 1:
            raise GenError(f"ratio is {self.ratio}; expected fake-score updates per student update, at least 1")
        if self.regression and len(self.times) > 1:
            raise GenError("regression on stored pairs is for one-step students; leave it 0, or give one time")

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what `Method.check` does, and the pairs of the regression.

        Raises GenError for data without noise, where regression needs it.
        """
        super().check(row)
        if self.regression and "noise" not in row:
            raise GenError(
                "the data hold no 'noise': DMD's regression needs what a teacher made; make records of it first (gen "
                "distill PRESET --teacher RUN --pairs N), or set regression to 0"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student, and the fake score with its head."""
        networks = {"net": self.teacher.network} | ({} if self.head is None else {"head": self.head})
        return (self.student_part, Part("fake_score", networks, self.fake_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Student and fake score of the previous stage, or else from the teacher."""
        if self.regression_term is not None:
            expect_frozen(frozen, self.regression_term)
        student = super().start(key, frozen, previous)
        followed = {} if previous is None else previous.params.get("fake_score", {})
        fake = {"net": followed.get("net", frozen["teacher"])}
        if self.head is not None:
            fresh = Network(self.head).init(key)
            kept = followed.get("head", {})
            same = jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, fresh)
            fake["head"] = kept if same else fresh
        return {**student, "fake_score": fake}

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
        before, fixed = state.params["student"], (frozen["teacher"], state.params["fake_score"])

        def loss(student: Params, data: Any) -> tuple[jax.Array, Aux]:
            noise, real, real_cond, cond, draws = data
            loss, aux = self.student_loss(student, *fixed, cond, draws, state.aux)
            if self.regression:
                distance = self.pair_loss(student, noise, real, real_cond, frozen)
                loss = loss + self.regression * distance
                aux = dataclasses.replace(aux, metrics={**aux.metrics, "regression": distance})
            return loss, aux

        state, metrics, out = self.student_part.update(state, loss, data, schedule)
        state = self.followed(state, out, metrics["skipped"] == 0.0)
        state, fake_metrics = self._update_fake_score(state, frozen, before, data, schedule)
        return state, {**self.student_part.named(metrics), **fake_metrics}

    def update_fake_score(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the fake score and the discriminator head."""
        return self._update_fake_score(state, frozen, state.params["student"], self._draws(batch, key), schedule)

    def _update_fake_score(
        self, state: State, frozen: Frozen, student: Params, data: Any, schedule: Schedule
    ) -> tuple[State, Metrics]:
        def loss(fake: Params, data: Any) -> tuple[jax.Array, Aux]:
            _, real, real_cond, cond, draws = data
            x = self.generate(student, cond, draws)
            return self.fake_score_loss(fake, frozen["teacher"], x, cond, real, real_cond, draws)

        part = self.parts[1]
        state, metrics, _ = part.update(state, loss, data, schedule)
        return state, part.named(metrics)

    def followed(self, state: State, out: Any, ok: jax.Array) -> State:
        """Gives the state after a student update whose `Aux.out` is `out`; `ok` () bool says whether it was finite."""
        del out, ok
        return state

    def _draws(self, batch: Batch, key: jax.Array) -> tuple[jax.Array | None, jax.Array, Cond, Cond, DMD2Draws]:
        """(noise of stored pairs, real data, its conditions, the generated samples' conditions, draws)."""
        real, real_cond = self.data(batch), self.cond(batch)
        draws = self.draw(key, real)
        return (
            batch["noise"] if self.regression else None,
            real,
            real_cond,
            {name: v[draws.order] for name, v in real_cond.items()},
            draws,
        )

    def draw(self, key: jax.Array, x: jax.Array) -> DMD2Draws:
        """Draws all random numbers of a step for data shaped like x (B, ...)."""
        order, noise, stop, simulated, matching, gan_student, fake, fake_level, gan_fake, gan_real = jax.random.split(
            key, 10
        )
        process, n, b = self.teacher.process, len(self.times), x.shape[0]

        matching_level, matching_noise = jax.random.split(matching)
        own = self.objective.draw(fake, process, x)
        if self.fake_levels is not None:
            own = dataclasses.replace(own, t=self.fake_levels(fake_level, process, b))
        return DMD2Draws(
            order=jax.random.permutation(order, b).astype(jnp.int32),
            noise=jax.random.normal(noise, x.shape),
            stop=jnp.broadcast_to(jax.random.randint(stop, (), 0, n), (b,)),
            simulated=jax.random.normal(simulated, (b, n if n > 1 else 0, *x.shape[1:])),
            matching=Draws(self.levels(matching_level, process, b), jax.random.normal(matching_noise, x.shape)),
            gan_student=self.judging(gan_student, x),
            fake=own,
            gan_fake=self.judging(gan_fake, x),
            gan_real=self.judging(gan_real, x),
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

    def seen(self, teacher: Params, fake: Params) -> tuple[Params, Params]:
        """Gives the parameters of the network whose features are judged, and of the head."""
        return (fake["net"] if self.features == "fake" else teacher), fake["head"]

    def matching(
        self, x: jax.Array, teacher: Params, fake: Params, cond: Cond, draws: DMD2Draws, aux: Mapping[str, Any]
    ) -> tuple[jax.Array, Any]:
        """Gives the distribution-matching gradient on generated x, and per-sample outputs for `followed`."""
        del aux
        return matching_gradient(x, *self.scores(teacher, fake, x, cond, draws.matching)), None

    def student_loss(
        self,
        student: Params,
        teacher: Params,
        fake: Params,
        cond: Cond,
        draws: DMD2Draws,
        aux: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Gives the student's loss and its terms, with the norms of both gradients at the generated data.

        Both gradients are taken at x, which gives the norms; x then carries their weighted sum back.

        Args:
          aux: the state's further arrays, which a divergence may need.
        """
        x = self.generate(student, cond, draws)
        fixed = jax.lax.stop_gradient(x)
        matched, out = self.matching(fixed, teacher, fake, cond, draws, aux or {})
        loss, gradient = jax.value_and_grad(matching_loss)(fixed, jax.lax.stop_gradient(matched))
        terms = {"dm_loss": loss, "dm_grad": sample_norm(gradient)}
        if self.head is not None:
            seen = self.seen(teacher, fake)
            gan, gan_gradient = jax.value_and_grad(self.gan_loss, argnums=2)(*seen, fixed, cond, draws.gan_student)
            terms |= {"gan_loss": gan, "gan_grad": sample_norm(gan_gradient)}
            loss, gradient = loss + self.gan_weight * gan, gradient + self.gan_weight * gan_gradient
        return loss + jnp.sum((x - fixed) * gradient), Aux(terms, out=out)

    def pair_loss(self, student: Params, noise: jax.Array, made: jax.Array, cond: Cond, frozen: Frozen) -> jax.Array:
        """Gives the distance of what student and teacher make of the same noise (DMD, section 3.3)."""
        x = self.denoiser(student, noise, jnp.float32(self.times[0]), cond).denoised
        term = self.regression_term
        if term is None:
            return regression_loss(x, made)
        distance: jax.Array = term(frozen[term.name], made, x)
        return term.weight * distance.mean()

    @property
    def objective(self) -> Any:
        """Gives the fake score's loss."""
        return self.fake_objective or self.teacher.objective

    def fake_score_loss(
        self,
        fake: Params,
        teacher: Params,
        x: jax.Array,
        cond: Cond,
        real: jax.Array,
        real_cond: Cond,
        draws: DMD2Draws,
    ) -> tuple[jax.Array, Aux]:
        """Gives the fake score's denoising loss on generated x, plus the discriminator's loss against real data."""

        def evaluate(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            return self.teacher(fake["net"], x_t, t, cond)

        x = jax.lax.stop_gradient(x)
        losses, _ = self.objective.loss(evaluate, self.teacher.process, x, cond, draws.fake)
        loss = losses.mean()
        terms = {"fake_loss": loss}
        if self.head is not None:
            judged = (x, cond, draws.gan_fake), (real, real_cond, draws.gan_real)
            gan, gan_terms = self.head_loss(*self.seen(teacher, fake), *judged)
            terms |= gan_terms
            loss = loss + self.head_weight * gan
        return loss, Aux(terms)
