"""The entropies that keep codes in use: of each vector's soft codes, to be small, and of their mean, to be large."""

import jax
import jax.numpy as jnp

__all__ = ["entropies"]


def entropies(logits: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """Entropies in nats of distributions over codes, added over groups of bits.

    Args:
      logits: (N, groups, codes).
      floor: added to probabilities within the second logarithm.

    Returns:
      that of each (N,), and that of their mean ().
    """
    logs = jax.nn.log_softmax(logits)
    p = jnp.exp(logs)
    mean = p.mean(axis=0)
    return -(p * logs).sum(axis=(1, 2)), -(mean * jnp.log(mean + floor)).sum()
