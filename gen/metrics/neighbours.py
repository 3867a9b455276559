"""Nearest-neighbour measures on features: precision, recall, density, coverage, realism, authenticity, near-copies.

All distances are Euclidean, computed as float32 sums of squared differences (not in the expanded form
|u|^2 - 2 u.v + |v|^2, whose rounding decides ties), block by block: no N x M matrix is ever held. Under a mesh the
queries may be sharded along their first axis; every row is worked out on its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.metrics.intervals import mean_error

__all__ = ["Manifold", "Neighbours", "authenticity", "manifold", "nearest", "neighbours", "radii_sq"]

_BLOCK_ELEMENTS = 1 << 23  # distances held at a time: 32 MB of float32
_REALISM_FLOOR = 1e-5  # added to squared distances by the ADM evaluator


class Neighbours(NamedTuple):
    """What each query sees among a set of points with balls around them.

    Attributes:
      inside: (Q,) int32, number of balls that hold the query: d^2 < r^2.
      touching: (Q,) int32, the same with d^2 <= r^2.
      distance_sq: (Q,) float32, squared distance to the nearest point.
      closest: (Q,) int32, which point that is (the lowest index at a tie).
      realism_sq: (Q,) float32, max over points of r^2 / (d^2 + 1e-5) (Kynkaanniemi et al. 2019, equation 3, squared).
    """

    inside: jax.Array
    touching: jax.Array
    distance_sq: jax.Array
    closest: jax.Array
    realism_sq: jax.Array


class Manifold(NamedTuple):
    """Fidelity and diversity of `fake` against `real` for one k.

    Attributes:
      precision: fraction of fakes inside some real ball.
      recall: fraction of reals inside some fake ball (Kynkaanniemi et al. 2019).
      density, density_error: mean number of real balls around a fake, over k, and its standard error over fakes.
      coverage: fraction of reals whose nearest fake lies within their own ball (Naeem et al. 2020).
      realism_sq: (M,) squared realism of every fake.
    """

    precision: float
    recall: float
    density: float
    density_error: float
    coverage: float
    realism_sq: np.ndarray


def radii_sq(points: np.ndarray | jax.Array, k: int) -> jax.Array:
    """Gives the squared distance of every point to its k-th nearest other point: (N, D) -> (N,) float32.

    Raises GenError unless 1 <= k < N.
    """
    points = _features(points, "points")
    if not 1 <= k < len(points):
        raise GenError(
            f"{k} neighbours asked of {len(points)} points; expected at least 1 and fewer than the points; "
            "lower k or use more samples"
        )
    return _radii_sq(points, k, _block(len(points)))


def neighbours(
    queries: np.ndarray | jax.Array, points: np.ndarray | jax.Array, points_radii_sq: jax.Array | None = None
) -> Neighbours:
    """Compares every query (Q, D) with all points (N, D) with their squared ball radii (N,) (0 when not given).

    Raises GenError for features of different lengths.
    """
    queries, points = _features(queries, "queries"), _features(points, "points")
    if queries.shape[1] != points.shape[1]:
        raise GenError(
            f"distances between {queries.shape[1]} and {points.shape[1]} features; expected equally many; "
            "use one feature network"
        )
    radii = jnp.zeros(len(points), jnp.float32) if points_radii_sq is None else points_radii_sq
    return _neighbours(queries, points, radii, _block(len(queries)))


def nearest(queries: np.ndarray | jax.Array, points: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Gives the distance (Q,) float32 to the nearest point and its index (Q,) int32."""
    found = neighbours(queries, points)
    return np.sqrt(np.asarray(found.distance_sq)), np.asarray(found.closest)


def manifold(real: np.ndarray | jax.Array, fake: np.ndarray | jax.Array, k: int, *, strict: bool = False) -> Manifold:
    """Gives precision, recall, density and coverage of `fake` (M, D) against `real` (N, D).

    Args:
      k: neighbours that set the radius of a ball (the point itself not counted).
      strict: False: a ball holds its surface, d <= r (original, ADM, torch-fidelity); True: d < r (prdc, StudioGAN,
        dgm-eval). The two differ at ties only.

    Raises:
      GenError: k out of range or feature sizes that differ.
    """
    fakes = neighbours(fake, real, real_radii := radii_sq(real, k))
    reals = neighbours(real, fake, radii_sq(fake, k))
    balls, covered = (fakes.inside, reals.inside) if strict else (fakes.touching, reals.touching)
    near = reals.distance_sq < real_radii if strict else reals.distance_sq <= real_radii
    return Manifold(
        precision=_fraction(balls > 0),
        recall=_fraction(covered > 0),
        density=float(np.asarray(balls, np.float64).mean() / k),
        density_error=mean_error(np.asarray(balls)) / k,
        coverage=_fraction(near),
        realism_sq=np.asarray(fakes.realism_sq),
    )


def authenticity(real: np.ndarray | jax.Array, fake: np.ndarray | jax.Array) -> float:
    """Gives the fraction of fakes whose nearest real point is closer to another real point than to the fake.

    Alaa et al. 2022 ("How faithful is your synthetic data?"), as in dgm-eval, which reports it in percent.
    Features are (N, D) and (M, D); the fraction is in [0, 1].
    """
    found = neighbours(fake, real)
    return _fraction(radii_sq(real, 1)[found.closest] < found.distance_sq)


def _fraction(mask: jax.Array) -> float:
    return float(np.asarray(mask).mean(dtype=np.float64))


def _features(x: np.ndarray | jax.Array, name: str) -> jax.Array:
    if np.ndim(x) != 2 or len(x) == 0:
        raise GenError(f"{name} have shape {np.shape(x)}; expected features (N, D) with N > 0; check the samples")
    return jnp.asarray(x, jnp.float32)


def _block(queries: int) -> int:
    return max(1, min(1024, _BLOCK_ELEMENTS // queries))


def _blocks(points: jax.Array, extra: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Points (n, block, D), extra (n, block) and indices (n, block); the padded tail has index -1."""
    count = len(points)
    pad = -count % block
    index = jnp.pad(jnp.arange(count, dtype=jnp.int32), (0, pad), constant_values=-1)
    return (
        jnp.pad(points, ((0, pad), (0, 0))).reshape(-1, block, points.shape[1]),
        jnp.pad(extra, (0, pad)).reshape(-1, block),
        index.reshape(-1, block),
    )


def _distances_sq(queries: jax.Array, points: jax.Array, index: jax.Array) -> jax.Array:
    exact = jnp.sum(jnp.square(queries[:, None, :] - points[None, :, :]), axis=-1)  # XLA fuses: no (Q, block, D) held
    return jnp.where(index >= 0, exact, jnp.inf)


@functools.partial(jax.jit, static_argnames=("k", "block"))
def _radii_sq(points: jax.Array, k: int, block: int) -> jax.Array:
    def step(smallest: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        candidates = jnp.concatenate([smallest, _distances_sq(points, *part)], axis=1)
        return -jax.lax.top_k(-candidates, k + 1)[0], None

    blocks, _, index = _blocks(points, jnp.zeros(len(points)), block)
    start = jnp.full((len(points), k + 1), jnp.inf, jnp.float32)
    return jax.lax.scan(step, start, (blocks, index))[0][:, k]  # entry 0 is the point itself


@functools.partial(jax.jit, static_argnames="block")
def _neighbours(queries: jax.Array, points: jax.Array, radii: jax.Array, block: int) -> Neighbours:
    def step(so_far: Neighbours, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Neighbours, None]:
        block_points, block_radii, index = part
        d = _distances_sq(queries, block_points, index)
        best = jnp.argmin(d, axis=1)
        least = jnp.take_along_axis(d, best[:, None], axis=1)[:, 0]
        closer = least < so_far.distance_sq
        valid = index >= 0
        return Neighbours(
            inside=so_far.inside + jnp.sum(valid & (d < block_radii), axis=1, dtype=jnp.int32),
            touching=so_far.touching + jnp.sum(valid & (d <= block_radii), axis=1, dtype=jnp.int32),
            distance_sq=jnp.where(closer, least, so_far.distance_sq),
            closest=jnp.where(closer, index[best], so_far.closest),
            realism_sq=jnp.maximum(so_far.realism_sq, jnp.max(block_radii / (d + _REALISM_FLOOR), axis=1)),
        ), None

    zero = jnp.zeros(len(queries), jnp.int32)
    start = Neighbours(zero, zero, jnp.full(len(queries), jnp.inf, jnp.float32), zero, jnp.zeros(len(queries)))
    return jax.lax.scan(step, start, _blocks(points, radii, block))[0]
