"""Training an adapter of a frozen denoiser with the denoiser's own loss: new classes, styles, resolutions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.finetune.adapters import Adapted
from gen.finetune.difffit import DiffFit
from gen.nn.network import Params
from gen.training.part import Part, begin
from gen.training.task import Batch, Frozen, State

__all__ = ["AdaptTask"]


@dataclasses.dataclass(frozen=True)
class AdaptTask(DenoiserTask):
    """Trains ``net`` as an adapter of the frozen ``teacher``.

    Checkpoints hold the adapter alone. The run keeps the teacher's arrays as an artifact, once, and a loaded run has
    merged weights: a plain network.

    Attributes:
      denoiser: the teacher's, with the classes or the size that are wanted.
      adapter: what is trained (`gen.finetune.difffit.DiffFit`, `gen.finetune.lora.LoRA`).
      shift, scale: bring latents that another normaliser has scaled to the teacher's scale, channel by channel:
        x scale + shift; () where they are on it.
    """

    adapter: Any = DiffFit()
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def data(self, batch: Batch) -> jax.Array:
        """Gives the data of a batch on the teacher's scale."""
        x = super().data(batch)
        return x * jnp.asarray(self.scale) + jnp.asarray(self.shift) if self.scale else x

    @property
    def adapted(self) -> Adapted:
        """Gives the network whose parameters are the adapter's arrays."""
        return Adapted(self.denoiser.network, self.adapter)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, the adapter."""
        return (Part("net", self.adapted, self.optim, self.emas),)

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives an adapter that changes nothing, or that of the previous stage.

        Raises GenError for a missing frozen teacher.
        """
        if "teacher" not in frozen:
            raise GenError(f"an adapter needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        return {"net": self.adapted.start(key, frozen["teacher"]) if previous is None else previous.params["net"]}

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Task.init` says. Raises GenError for weights to start from other than the teacher's."""
        if "start" in frozen:
            raise GenError("an adapter starts from its teacher; give that (--teacher RUN) and leave out --from")
        return begin(self.parts, self.start(key, frozen, previous))

    def whole(self, params: Params, frozen: Frozen) -> Params:
        """Gives the merged parameters."""
        return self.adapter.merge(frozen["teacher"], params)

    def opened(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gives the merged network as ``net``, without the teacher."""
        kept = {role: arrays for role, arrays in params.items() if role != "teacher"}
        return {**kept, "net": self.adapter.merge(params["teacher"], params["net"])}
