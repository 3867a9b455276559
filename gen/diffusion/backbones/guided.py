"""A backbone that knows the guidance scale: one call gives what two calls and classifier-free guidance gave.

Meng et al. 2022, "On Distillation of Guided Diffusion Models" (arXiv 2210.03142, sec. 3.1): the scale is embedded like
a time and added to the time's embedding. Here it takes the place of a flow map's second time, which every backbone can
have and most start silent, so that the network begins as the one it is distilled from.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from gen.diffusion.backbones.backbone import Output, WrappedConfig
from gen.errors import GenError
from gen.nn.conditions import Condition, Conditions
from gen.nn.network import Cond

__all__ = ["SCALE", "GuidedConfig", "GuidedNetwork"]

SCALE = "guidance"  # the condition


@dataclasses.dataclass(frozen=True)
class GuidedConfig(WrappedConfig):
    """A backbone of two times, the second one of which is the guidance scale, given as the condition "guidance".

    Attributes:
      network: the backbone's configuration, of two times.
      factor: the second time is factor (w - 1), 0 for no guidance. The published embedding has 1000, after Kingma et
        al. 2021 (arXiv 2107.00630); sines of scales that differ by less are told apart, and hardly interpolated.
      usual: the scale where none is given.

    Raises GenError for a network that has other times than two.
    """

    network: Any
    factor: float = 1000.0
    usual: float = 1.0

    def __post_init__(self) -> None:
        if self.network.times != 2:
            raise GenError(f"a guided network of {self.network.times} time; its own times are 2, the scale is one")

    @property
    def conditions(self) -> Conditions:
        """Gives the backbone's conditions and the guidance scale."""
        return {**self.network.conditions, SCALE: Condition(default=self.usual)}

    def build(self, rngs: nnx.Rngs) -> "GuidedNetwork":
        """Gives the module with freshly drawn parameters."""
        return GuidedNetwork(self, rngs)


class GuidedNetwork(nnx.Module):
    """The network of a `GuidedConfig`: called with one time; conditions beside the backbone's: ``guidance`` (B,)."""

    def __init__(self, config: GuidedConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.network = config.network.build(rngs)

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives the backbone's controls."""
        controls: dict[str, tuple[int, ...]] = self.network.controls()
        return controls

    def features(self) -> list[str]:
        """Gives the backbone's features."""
        names: list[str] = self.network.features()
        return names

    def null(self, cond: Cond) -> Cond:
        """Gives the backbone's unconditional input; the scale stays."""
        own: Cond = self.network.null({name: value for name, value in cond.items() if name != SCALE})
        return {**own, SCALE: cond[SCALE]}

    def __call__(self, x: jax.Array, times: tuple[jax.Array, ...], cond: Cond, **options: Any) -> Output:
        """Does what `gen.diffusion.backbones.backbone.Backbone.__call__` says."""
        own = {name: value for name, value in cond.items() if name != SCALE}
        out: Output = self.network(x, (*times, self.config.factor * (cond[SCALE] - 1.0)), own, **options)
        return out
