"""Training a denoiser with its native objective: diffusion and flow teachers, in pixels or latents."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Denoiser, drop
from gen.diffusion.objectives import Draws, VelocityMatching
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.ema import numbered
from gen.training.optim import OptimConfig, begin, update
from gen.training.task import Batch, Frozen, Metrics, Program, State, label_pictures

__all__ = ["DenoiserTask"]


@dataclasses.dataclass(frozen=True)
class DenoiserTask:
    """Trains ``net``, the network of `denoiser`, with label dropout for classifier-free guidance.

    Batches: "latent" (B, ...) float32 on the normalised scale, or "image" (B, H, W, C) uint8 for pixel models, and
    the conditioning arrays by name.

    Attributes:
      denoiser: network, process and parameterization.
      objective: the loss (`gen.diffusion.objectives`).
      optim: the optimiser.
      emas: averages (`gen.training.ema`): the first is ``net`` and is exported, the i-th further one ``net@i``.
      dropout: share of samples trained on the network's null condition; 0 for networks without one. Networks that drop
        activations receive their keys as the condition "dropout".
      augment: changes the images on the device and says how: (key, images) -> (images, labels), where the labels become
        the condition "augment" (`gen.data.edm_augment`); None for none.
      cond: names of the batch's conditioning arrays.
      generator: the generator that draws previews from ``net`` and the frozen arrays, or None for none.
      labels: the previews' labels; the pictures of a label keep their noise through the run.
    """

    denoiser: Denoiser
    objective: Any = VelocityMatching()
    optim: OptimConfig = OptimConfig()
    emas: tuple[Any, ...] = ()
    dropout: float = 0.1
    augment: Any = None
    cond: tuple[str, ...] = ("label",)
    generator: Any = None
    labels: tuple[int, ...] = tuple(range(8))

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise GenError(f"label dropout is {self.dropout}; expected a share in [0, 1)")

    def loss(
        self, params: Params, x: jax.Array, cond: Cond, draws: Draws, dropped: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective's mean over the batch and the means of its terms.

        Args:
          x: (B, ...) data; draws: the objective's; dropped: (B,) bool, samples that lose their condition.
        """
        if self.dropout:
            cond = drop(self.denoiser.net, params, cond, dropped)
        taps = getattr(self.objective, "taps", ())  # features that the objective reads from the prediction's extra
        losses, terms = self.objective.loss(
            lambda x_t, t, c: self.denoiser(params, x_t, t, c, taps=taps), self.denoiser.process, x, cond, draws
        )
        return losses.mean(), {name: value.mean() for name, value in terms.items()}

    @property
    def _averages(self) -> dict[str, Any]:
        return numbered("net", self.emas)

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Fresh parameters, or those of the previous stage."""
        del frozen
        params = self.denoiser.net.init(key) if previous is None else previous.params["net"]
        return begin({"net": params}, {"net": self.optim}, self._averages)

    @property
    def programs(self) -> Mapping[str, Program]:
        """One program."""
        return {"net": self.update}

    def select(self, step: int) -> str:
        """Always the network's."""
        del step
        return "net"

    def inputs(self, step: int) -> Mapping[str, np.ndarray]:
        """No schedules."""
        del step
        return {}

    def update(self, state: State, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One step at freshly drawn times and noise."""
        del frozen
        params = self.denoiser.net.project(state.params["net"])
        state = dataclasses.replace(state, params=state.params | {"net": params})
        draw_key, drop_key, augment_key, dropout_key = jax.random.split(key, 4)
        x = batch["latent"] if "latent" in batch else batch["image"].astype(jnp.float32) / 127.5 - 1.0
        cond = {name: batch[name] for name in self.cond}
        if self.augment is not None:
            x, cond["augment"] = self.augment(augment_key, x)
        if getattr(self.denoiser.network, "dropout", 0.0):
            cond["dropout"] = jax.random.split(dropout_key, x.shape[0])
        draws = self.objective.draw(draw_key, self.denoiser.process, x)
        dropped = jax.random.bernoulli(drop_key, self.dropout, x.shape[:1])
        data = (x, cond, draws, dropped)
        return update(state, "net", lambda p, d: self.loss(p, *d), data, self.optim, self._averages)

    def preview(self, state: State, frozen: Frozen, key: jax.Array) -> Mapping[str, jax.Array]:
        """Samples of the averaged network, one for each of `labels`."""
        return label_pictures(self.generator, {**frozen, **self.export(state)}, self.labels, key)

    def export(self, state: State) -> Mapping[str, Any]:
        """The network, averaged where it is, as ``net``."""
        return {"net": state.ema.get("net", state.params["net"])}
