"""Parameters of test networks, none of them zero, made without compiling anything."""

from typing import Any

import jax
import numpy as np

from gen.nn.network import param_shapes


def drawn(config: Any, scale: float = 0.2) -> Any:
    """Normal numbers of this deviation in the place of every parameter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(s.dtype), param_shapes(config))
