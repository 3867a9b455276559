"""Distilled Decoding's student of a MaskGIT: the teacher's blocks read noise and write all tokens at once.

The sequence is the class and K code vectors, of which the first are data and the rest noise; every position sees all
others, as in the teacher. Two heads answer, as in `gen.distill.gpt_student`. The paper (Liu et al. 2024, arXiv
2412.17153) distils models that write in order; that a masked model, whose rounds are drawn from noise in the same way,
is distilled like them is this project's step, and the network has no published form.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.maskgit import MaskGITConfig, MaskGITSkipConfig
from gen.distill.gpt_student import CodeHead
from gen.nn.conditions import Conditions
from gen.nn.layers import Embed, linear
from gen.nn.network import Cond, Params
from gen.training.sharding import constrain

__all__ = ["MaskGITStudent", "MaskGITStudentConfig"]


@dataclasses.dataclass(frozen=True)
class MaskGITStudentConfig:
    """The student's network, called as `gen.distill.gpt_student.GPTStudentConfig` says.

    Attributes:
      of: the teacher, of either form.
      channels: of a code vector.
    """

    of: MaskGITConfig | MaskGITSkipConfig
    channels: int

    @property
    def shape(self) -> tuple[int, int]:
        """Gives the shape (N, channels) of what it reads and writes."""
        return self.of.length, self.channels

    @property
    def conditions(self) -> Conditions:
        """Gives the teacher's conditions."""
        return self.of.conditions

    def begun(self, teacher: Params) -> Params:
        """Gives a teacher's parameters in the student's places."""
        return {"body": teacher}

    def build(self, rngs: nnx.Rngs) -> "MaskGITStudent":
        """Gives the module with freshly drawn parameters."""
        return MaskGITStudent(self, rngs)


class MaskGITStudent(nnx.Module):
    """The network of a `MaskGITStudentConfig`: the whole teacher, and what reads noise and writes vectors."""

    def __init__(self, config: MaskGITStudentConfig, rngs: nnx.Rngs) -> None:
        of = config.of
        self.body, init = of.build(rngs), nnx.initializers.normal(0.02)
        self.tokens = linear(config.channels, of.width, init=init, dtype=jnp.dtype(of.dtype), rngs=rngs)
        self.known = Embed(2, of.width, init=init, rngs=rngs)
        self.codes = CodeHead(of.width, config.channels, rngs)

    def __call__(self, x: jax.Array, known: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array]:
        """Gives logits and vectors; see `gen.distill.gpt_student.GPTStudentConfig`."""
        body, (batch, length, _) = self.body, x.shape
        embedded = body.labelled(cond, batch)
        places = jnp.arange(length + 1) <= known[:, None]  # the class is data
        h = jnp.concatenate([embedded[:, None], self.tokens(x)], axis=1) + body.positions[...]
        h = body.trunk(constrain(h + self.known(places.astype(jnp.int32))), None)[:, 1:]
        return body.head(h).astype(jnp.float32), self.codes(h, embedded)
