"""Distilled Decoding's student of a VAR: the teacher's blocks read noise and write the tokens of all scales at once.

The sequence is the class token and the code vectors of all token maps, of which the first are data and the rest noise.
A position looks at itself and at the maps coarser than its own, and what it gives is said of itself (Liu et al. 2024,
arXiv 2412.17153; names and order of the published networks). Whether a position holds data or noise is told again in
every block, between its attention and its MLP. Two heads answer, as in `gen.distill.gpt_student`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.var import VAR, Block, VARConfig
from gen.distill.gpt_student import CodeHead
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import Embed, linear, run_stack
from gen.nn.network import Cond, Params
from gen.training.sharding import constrain

__all__ = ["VARStudent", "VARStudentConfig"]


@dataclasses.dataclass(frozen=True)
class VARStudentConfig:
    """The student's network, called as `gen.distill.gpt_student.GPTStudentConfig` says.

    Attributes:
      of: the teacher, whose first map is one token.

    Raises GenError for a teacher that begins with a larger map.
    """

    of: VARConfig

    def __post_init__(self) -> None:
        if self.of.scales[0] != 1:
            raise GenError(f"the teacher's token maps begin with side {self.of.scales[0]}; a student's begin with 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Gives the shape (N, channels) of what it reads and writes."""
        return self.of.length, self.of.quantizer.width

    @property
    def conditions(self) -> Conditions:
        """Gives the teacher's conditions."""
        return self.of.conditions

    @property
    def inner(self) -> VARConfig:
        """Gives the teacher with one map more, of one token: the class token, which comes first."""
        quantizer = dataclasses.replace(self.of.quantizer, scales=(1, *self.of.scales))
        return dataclasses.replace(self.of, quantizer=quantizer)

    def begun(self, teacher: Params) -> Params:
        """Gives a teacher's parameters in the student's places.

        The class token keeps the teacher's first place and level, where the class stands there too; those of the
        first token, which the teacher never read, are its copies.
        """
        double = {name: jnp.concatenate([teacher[name][:1], teacher[name]]) for name in ("positions", "levels")}
        return {**teacher, **double}

    def build(self, rngs: nnx.Rngs) -> "VARStudent":
        """Gives the module with freshly drawn parameters."""
        return VARStudent(self, rngs)


class _Block(Block):
    """The teacher's block; between attention and MLP a layer of what tells data from noise is added."""

    def __init__(self, config: VARConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.known = linear(config.width, config.width, init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, mask: jax.Array | None, known: jax.Array) -> Any:  # type: ignore[override]
        return super().__call__(x, c, mask, between=self.known(known))


class VARStudent(VAR):
    """The network of a `VARStudentConfig`."""

    block: ClassVar[Any] = _Block

    def __init__(self, config: VARStudentConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config.inner, rngs)
        init, width = nnx.initializers.normal(0.02), config.of.width
        self.known = Embed(2, width, init=init, rngs=rngs)
        self.last = linear(width, width, init=init, rngs=rngs)
        self.codes = CodeHead(width, config.of.quantizer.width, rngs)

    def __call__(self, x: jax.Array, known: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array]:  # type: ignore[override]
        """Gives logits and vectors; see `gen.distill.gpt_student.GPTStudentConfig`."""
        config = self.config
        c, given = self.condition(cond["label"])
        places = jnp.arange(x.shape[1] + 1) <= known[:, None]  # the class token is data
        told, mask = self.known(places.astype(jnp.int32)), self.mask()
        h = jnp.concatenate([self.first(c), self.later(x, 1)], axis=1) + told
        h = run_stack(
            self.blocks,
            h,
            lambda block, h, _: (block(constrain(h), given, mask, told)[0], None),
            remat=config.remat,
            scan=config.scan,
        ).x
        h = (h + self.last(told))[:, 1:]
        return self.logits(h, c), self.codes(h, c)

    def mask(self) -> jax.Array:
        """Tells where each position may look: at itself and at the maps coarser than its own."""
        own = jnp.eye(self.config.length, dtype=bool)
        return own | (super().mask() & ~super().mask().T)
