"""Training a denoiser with its native objective: diffusion and flow teachers, in pixels or latents."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from gen.diffusion.denoiser import Denoiser, drop
from gen.diffusion.objectives import Draws
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.method import Method
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["DenoiserTask"]


@dataclasses.dataclass(frozen=True)
class DenoiserTask(Method):
    """Trains ``net``, the network of `denoiser`, with label dropout for classifier-free guidance.

    Attributes:
      denoiser: network, process, parameterization and native objective.
      dropout: share of samples trained on the network's null condition; models without conditions have none to drop.
        Networks that drop activations receive their keys as the condition "dropout".
      augment: changes the images on the device and says how: (key, images) -> (images, labels), where the labels become
        the condition "augment" (`gen.data.edm_augment`); None for none.
    """

    denoiser: Denoiser
    dropout: float = 0.1
    augment: Any = None

    @property
    def classes_at(self) -> str:
        """Gives the path of the network's number of classes."""
        return f"denoiser.network.{self.denoiser.network.classes_at}"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise GenError(f"label dropout is {self.dropout}; expected a share in [0, 1)")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, the network."""
        return (Part("net", self.denoiser.network, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the denoiser as ``net``."""
        return {"net": Model(self.denoiser)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives fresh parameters, or those of the previous stage."""
        del frozen
        return {"net": self.denoiser.net.init(key) if previous is None else previous.params["net"]}

    def loss(self, params: Params, x: jax.Array, cond: Cond, draws: Draws, dropped: jax.Array) -> tuple[jax.Array, Aux]:
        """Gives the objective's mean over the batch and the means of its terms.

        Args:
          x: (B, ...) data; draws: the objective's; dropped: (B,) bool, samples that lose their condition.
        """
        denoiser, objective = self.denoiser, self.denoiser.objective
        if self._drops:
            cond = drop(denoiser.net, params, cond, dropped)
        losses, terms = objective.loss(
            lambda x_t, t, c: denoiser(params, x_t, t, c, taps=objective.taps), denoiser.process, x, cond, draws
        )
        return losses.mean(), Aux({name: value.mean() for name, value in terms.items()})

    def whole(self, params: Params, frozen: Frozen) -> Params:
        """Gives the network's parameters of what is trained: these."""
        del frozen
        return params

    @property
    def _drops(self) -> bool:
        return bool(self.dropout and self.conditions)

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise."""
        draw_key, drop_key, augment_key, dropout_key = jax.random.split(key, 4)
        denoiser, x, cond = self.denoiser, self.data(batch), self.cond(batch)
        cond |= {name: batch[name] for name in denoiser.objective.inputs}
        if self.augment is not None:
            x, cond["augment"] = self.augment(augment_key, x)
        if denoiser.network.dropout:
            cond["dropout"] = jax.random.split(dropout_key, x.shape[0])
        draws = denoiser.objective.draw(draw_key, denoiser.process, x)
        dropped = jax.random.bernoulli(drop_key, self.dropout, x.shape[:1])
        data = (x, cond, draws, dropped)
        state, metrics, _ = self.parts[0].update(
            state, lambda p, d: self.loss(self.whole(p, frozen), *d), data, schedule
        )
        return state, metrics
