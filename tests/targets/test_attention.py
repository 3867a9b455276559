"""Attention compiled for an H200: cuDNN's kernel forward and backward, whatever the mask and the number of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gen.nn.attention import attention
from gen.training.ahead import estimate
from gen.training.sharding import MeshConfig, make_mesh
from gen.training.targets import find_target

HEADS = 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 72},
        {"shared": 2},
        {"causal": True},
        {"masked": "padding"},
        {"masked": "square"},
        {"queries": 321, "keys": 321},
        {"queries": 77, "keys": 77, "masked": "padding"},
        {"queries": 321, "keys": 321, "causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["h200", "h200:2"])
def test_attention_on_gpus_is_one_kernel_each_way(name: str, options: dict[str, Any]) -> None:
    """Over several devices each handles its own samples: nothing travels but the sum of the loss."""
    target = find_target(name)
    mesh = make_mesh(MeshConfig(data=target.count), target.devices())
    batch, queries, keys = 2 * target.count, options.get("queries", 256), options.get("keys", 256)
    size, shared = options.get("size", 64), options.get("shared", 1)
    whole = {"padding": (batch, 1, 1, keys), "square": (batch, 1, queries, keys)}

    def given(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return attention(q, k, v, mask=mask, causal=options.get("causal", False)).astype(jnp.float32).sum()

    q, k = given((batch, queries, HEADS, size)), given((batch, keys, HEADS // shared, size))
    mask = given(whole[options["masked"]], jnp.bool_) if "masked" in options else None
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, k, mask)
    found = estimate("attention", traced, target)
    assert sorted(found.attention.values()) == [1, 1], found.attention
    assert sum("Backward" in kernel for kernel in found.attention) == 1
    assert set(found.traffic) <= {"all-reduce"}
    assert found.sent <= 8
