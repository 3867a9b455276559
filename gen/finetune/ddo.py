"""DDO: a likelihood model as its own discriminator (Zheng et al. 2025, arXiv 2503.01103).

A model is tuned against its frozen self, the reference, which also made the generated samples. The discriminator is
d(x) = sigmoid(log p_theta(x) - log p_ref(x)), and its loss trains theta alone: likelihood rises on real data and falls
on what the reference makes. After a short round the best theta is the next reference (self-play).

For a diffusion model log p is minus its native loss, summed over the data and at one time and noise that all four
evaluations share; the expectation over both is taken outside of the log-sigmoid. For a model that writes tokens in one
order log p is exact, the sum over the tokens.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.objectives import Draws
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.method import Method, given
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["FAKE", "DDOMethod", "DDOTask", "TokenDDOTask", "ddo_losses", "quantised"]

FAKE = "fake_"  # before the names of a batch's arrays that the reference made


def ddo_losses(real: jax.Array, fake: jax.Array, alpha: float, beta: float) -> tuple[jax.Array, jax.Array]:
    """Gives -log sigmoid(beta r(real)) and -alpha log sigmoid(-beta r(fake)), each (B,).

    Args:
      real, fake: (B,) log ratios r = log p_theta - log p_ref, of real data and of the reference's samples.
    """
    return jax.nn.softplus(-beta * real), alpha * jax.nn.softplus(beta * fake)


def quantised(x: jax.Array) -> jax.Array:
    """Gives images (B, H, W, C) in [-1, 1] on the 256 levels of stored ones, which real images have."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDOMethod(Method):
    """What both tasks share: they tune ``net`` from the frozen ``teacher``, which is the reference.

    Batches hold real data and conditions by name, and what the reference made under the same names after ``fake_``
    (`gen.data.alongside.Alongside`). Train in float32: differences of nearly equal losses are lost in half precision.

    Attributes:
      teacher: the reference's model.
      alpha: weight of the generated samples.
      beta: temperature; it scales like one over the numbers in a sample.

    Raises GenError for an alpha or beta that is not positive.
    """

    teacher: Any = given("teacher")
    alpha: float = 1.0
    beta: float = 0.02

    def __post_init__(self) -> None:
        if self.alpha <= 0.0 or self.beta <= 0.0:
            raise GenError(f"DDO with alpha {self.alpha} and beta {self.beta}; give positive numbers")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, the network."""
        return (Part("net", self.teacher.network, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the model as ``net``."""
        return {"net": Model(self.teacher)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the reference's parameters, or those of the previous stage.

        Raises GenError for a missing frozen teacher.
        """
        del key
        if "teacher" not in frozen:
            raise GenError(f"DDO needs the frozen role 'teacher', its reference; got {', '.join(frozen) or 'none'}")
        return {"net": frozen["teacher"] if previous is None else previous.params["net"]}

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what `Method.check` does, for the real data and for the reference's samples.

        Raises GenError for data without the reference's samples.
        """
        super().check(row)
        made = {name.removeprefix(FAKE): value for name, value in row.items() if name.startswith(FAKE)}
        if not made:
            raise GenError(
                "the data hold nothing that the reference made; give its records beside the real data (gen distill ddo "
                "--teacher RUN --pairs N)"
            )
        super().check(made)

    @abc.abstractmethod
    def log_likelihood(self, params: Params, x: jax.Array, cond: Cond, draws: Any) -> jax.Array:
        """Gives log p (B,) of data x (B, ...) up to a constant, under the randomness of `draws`."""

    @abc.abstractmethod
    def drawn(self, key: jax.Array, x: jax.Array) -> Any:
        """Draws what `log_likelihood` needs for data like x (B, ...); every array has leading axis B."""

    def pairs(self, frozen: Frozen, batch: Batch, made: Batch) -> tuple[tuple[jax.Array, Cond], tuple[jax.Array, Cond]]:
        """Gives real data with their conditions, and the reference's samples with theirs."""
        del frozen
        return (self.data(batch), self.cond(batch)), (self.data(made), self.cond(made))

    def loss(
        self, params: Params, reference: Params, real: tuple[jax.Array, Cond], fake: tuple[jax.Array, Cond], draws: Any
    ) -> tuple[jax.Array, Aux]:
        """Gives the loss on real data and the reference's samples, each with its conditions, under the same draws."""
        on_real, on_fake = (
            self.log_likelihood(params, *data, draws)
            - jax.lax.stop_gradient(self.log_likelihood(reference, *data, draws))
            for data in (real, fake)
        )
        losses = ddo_losses(on_real, on_fake, self.alpha, self.beta)
        terms = {
            "loss_real": losses[0].mean(),
            "loss_fake": losses[1].mean(),
            "ratio_real": on_real.mean(),
            "ratio_fake": on_fake.mean(),
            "right": 0.5 * ((on_real > 0.0).mean() + (on_fake < 0.0).mean()),
        }
        return (losses[0] + losses[1]).mean(), Aux(terms)

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step against the reference."""
        made = {name.removeprefix(FAKE): value for name, value in batch.items() if name.startswith(FAKE)}
        real, fake = self.pairs(frozen, batch, made)
        data = (real, fake, self.drawn(key, real[0]))
        state, metrics, _ = self.parts[0].update(
            state, lambda p, d: self.loss(p, frozen["teacher"], *d), data, schedule
        )
        return state, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDOTask(DDOMethod):
    """DDO of a Denoiser.

    Attributes:
      teacher: the reference's Denoiser.
      objective: whose loss is -log p / the numbers in a sample; None for the denoiser's own. A learned uncertainty is
        left out.
    """

    objective: Any = None

    def log_likelihood(self, params: Params, x: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Does what `DDOMethod.log_likelihood` says, at the times and noises of `draws`."""
        denoiser = self.teacher
        objective = self.objective or denoiser.objective
        losses, _ = objective.loss(
            lambda x_t, t, c: denoiser(params, x_t, t, c, taps=objective.taps), denoiser.process, x, cond, draws
        )
        found: jax.Array = -losses * np.prod(x.shape[1:])
        return found

    def drawn(self, key: jax.Array, x: jax.Array) -> Draws:
        """Draws times and noises."""
        found: Draws = (self.objective or self.teacher.objective).draw(key, self.teacher.process, x)
        return found

    def pairs(self, frozen: Frozen, batch: Batch, made: Batch) -> tuple[tuple[jax.Array, Cond], tuple[jax.Array, Cond]]:
        """Does what `DDOMethod.pairs` says; samples beside stored images lie on their levels."""
        real, (y, cond) = super().pairs(frozen, batch, made)
        return real, (quantised(y) if "image" in batch and "image" not in made else y, cond)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDDOTask(DDOMethod):
    """DDO of a model that writes tokens or bits in one order; see the paper's section on autoregressive models.

    The loss is divided by the larger of alpha and 1, so that the size of gradients does not grow with alpha.

    Attributes:
      teacher: the reference's `gen.autoregressive.base.TokenModel`. One of several scales reads codes of the frozen
        role ``tokenizer``.

    Raises GenError for a model without an exact likelihood.
    """

    takes = ("tokens", "bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher.exact:
            raise GenError(
                f"a {type(self.teacher).__name__} has no exact likelihood, which DDO compares; give one that writes "
                "its tokens in one order"
            )

    def log_likelihood(self, params: Params, x: jax.Array, cond: Cond, draws: None) -> jax.Array:
        """Gives log p (B,) of sequences x; `cond` holds what `TokenModel.forced` gives, and nothing is drawn."""
        del draws
        surprise = self.teacher.surprise(self.teacher.logits(params, x, cond), x)
        found: jax.Array = -surprise.reshape(len(x), -1).sum(axis=-1)
        return found

    def drawn(self, key: jax.Array, x: jax.Array) -> None:
        """Draws nothing, for log p is exact."""
        del key, x

    def pairs(self, frozen: Frozen, batch: Batch, made: Batch) -> tuple[tuple[jax.Array, Cond], tuple[jax.Array, Cond]]:
        """Does what `DDOMethod.pairs` says, of sequences."""

        def of(rows: Batch) -> tuple[jax.Array, Cond]:
            ids = self.teacher.sequence(self.data(rows))
            return ids, {**self.cond(rows), **self.teacher.forced(frozen, ids)}

        return of(batch), of(made)

    def loss(
        self, params: Params, reference: Params, real: tuple[jax.Array, Cond], fake: tuple[jax.Array, Cond], draws: Any
    ) -> tuple[jax.Array, Aux]:
        """Does what `DDOMethod.loss` says."""
        loss, aux = super().loss(params, reference, real, fake, draws)
        return loss / max(self.alpha, 1.0), aux
