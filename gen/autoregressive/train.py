"""Training a token model on a cache of tokens or bits, with the loss that it states itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gen.autoregressive.base import Draws, TokenModel
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.method import Method
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["TokenTask"]


@dataclasses.dataclass(frozen=True)
class TokenTask(Method):
    """Trains ``net``, a `gen.autoregressive.base.TokenModel`, on rows "tokens" or "bits" of a cache.

    Attributes:
      model: the token model, which draws what is random in a step and states its loss.

    Raises GenError for a model whose shares of dropped conditions or activations are not in [0, 1).
    """

    model: Any

    takes = ("tokens", "bits")

    def __post_init__(self) -> None:
        for name in ("cond_dropout", "dropout"):
            if not 0 <= getattr(self.model, name) < 1:
                raise GenError(f"{name} of the model is {getattr(self.model, name)}; expected a share in [0, 1)")

    @property
    def classes_at(self) -> str:
        """Gives the path of the model's number of classes."""
        return f"model.{self.model.classes_at}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, the network."""
        return (Part("net", self.model, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the model as ``net``."""
        return {"net": Model(self.model)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives fresh parameters, or those of the previous stage."""
        del frozen
        return {"net": self.model.net.init(key) if previous is None else previous.params["net"]}

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives the model's own schedules."""
        found: Mapping[str, Any] = self.model.schedules(step, steps)
        return found

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Does what `Method.check` says; raises GenError for ids beyond the vocabulary too."""
        model: TokenModel = self.model
        name = next((name for name in self.takes if name in row), None)
        if name is None:
            raise GenError(
                f"the data hold {', '.join(row) or 'nothing'}; expected {model.kind} {self.shape}: encode the images "
                "with a tokenizer first (gen encode TOKENIZER --data IMAGES --out TOKENS)"
            )
        ids = np.asarray(row[name])
        top = model.vocabulary if int(ids.max(initial=0)) < model.vocabulary else int(ids.max()) + 1
        model.check_tokens("the data's tokenizer", name, ids.shape[1:], top, None)
        super().check(row)

    def loss(self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws) -> tuple[jax.Array, Aux]:
        """Gives the mean over the batch of the model's loss, and of its further terms."""
        losses, terms = self.model.loss(params, tokens, cond, draws)
        return losses.mean(), Aux({name: value.mean() for name, value in terms.items()})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step by teacher forcing, with fresh draws."""
        model: TokenModel = self.model
        tokens = model.sequence(self.data(batch))
        cond = {**self.cond(batch), **model.forced(frozen, tokens)}
        data = (tokens, cond, model.draw(key, tokens, schedule))
        state, metrics, _ = self.parts[0].update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics
