"""Training a model of continuous tokens on latents, or on pixels, with the loss that it states itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from gen.autoregressive.base import Draws
from gen.autoregressive.latent_tokens import LatentTokenModel
from gen.nn.network import Cond, Params
from gen.training.method import Method
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["LatentTokenTask"]


@dataclasses.dataclass(frozen=True)
class LatentTokenTask(Method):
    """Trains ``net``, a `gen.autoregressive.latent_tokens.LatentTokenModel`, transformer and head together.

    Attributes:
      latent_model: the model, which draws what is random in a step and states its loss.
    """

    latent_model: Any

    @property
    def classes_at(self) -> str:
        """Gives the path of the model's number of classes."""
        return f"latent_model.{self.latent_model.classes_at}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, the network with its head."""
        return (Part("net", self.latent_model, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the model as ``net``."""
        return {"net": Model(self.latent_model)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives fresh parameters, or those of the previous stage."""
        del frozen
        return {"net": self.latent_model.net.init(key) if previous is None else previous.params["net"]}

    def loss(self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws) -> tuple[jax.Array, Aux]:
        """Gives the mean over the batch of the model's loss, and of its further terms."""
        losses, terms = self.latent_model.loss(params, tokens, cond, draws)
        return losses.mean(), Aux({name: value.mean() for name, value in terms.items()})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step with fresh orders, times and noise."""
        model: LatentTokenModel = self.latent_model
        tokens = model.sequence(self.data(batch))
        cond = {**self.cond(batch), **model.forced(frozen, len(tokens))}
        data = (tokens, cond, model.draw(key, tokens))
        state, metrics, _ = self.parts[0].update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics
