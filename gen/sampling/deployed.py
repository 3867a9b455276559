"""A generator as a StableHLO program that takes its weights from a safetensors file; running it needs jax alone
(`jax.export`).

JAX reads and writes such programs by the package flatbuffers, which it does not install itself, and which ends at 2 GB:
the weights are arguments of the program, and no part of it.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten, unflatten
from gen.errors import GenError
from gen.sampling.generator import Generator
from gen.training.indexed import sample_keys

__all__ = ["LOADER", "PLATFORMS", "card", "deployed_weights", "exported"]

PLATFORMS = ("cpu", "cuda", "tpu")

LOADER = '''"""Makes images with model.stablehlo; needs jax and flatbuffers: python load.py SEED CLASS."""

import json
import pathlib
import sys

import jax.export
import numpy as np

if not jax.config.jax_compilation_cache_dir:  # compiled programs are kept for the next start
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "gen" / "jax"))
folder = pathlib.Path(__file__).parent
program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
(expected, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)  # shapes and types of the weights by name
data = np.memmap(folder / "weights.safetensors", np.uint8, "r")  # the length of the header, the header, the numbers
end = 8 + int(data[:8].view("<u8")[0])
header = json.loads(bytes(data[8:end]))
rows = {name: data[end:][slice(*header[name]["data_offsets"])] for name in expected}
weights = {name: jax.device_put(rows[name].view(a.dtype).reshape(a.shape)) for name, a in expected.items()}


def sample(seeds, labels):  # (B,) integers each -> (B, H, W, C) uint8; labels do not matter to a model without classes
    images = program.call(weights, np.asarray(seeds, np.int32), np.asarray(labels, np.int32))
    return np.clip(np.rint((np.asarray(images) + 1.0) * 127.5), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    print(sample([int(sys.argv[1])], [int(sys.argv[2])])[0, ..., 0])
'''


def deployed_weights(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Gives the arrays that the program takes, by path, in the types that jax computes with."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    return {name: a.astype(jax.dtypes.canonicalize_dtype(a.dtype), copy=False) for name, a in flat.items()}


def exported(generator: Generator, params: Mapping[str, Any], platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Gives the program ``(weights, seeds (B,) int32, labels (B,) int32) -> images (B, H, W, C) float32``, serialised.

    B is free, images are in [-1, 1], unclipped. Image i is that of `seeds[i]` and `labels[i]` in the run.

    Args:
      params: arrays by path, `deployed_weights` or their shapes.

    Raises GenError for a generator that is conditioned on more than a label, and for one that jax cannot export for one
    of the platforms.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise GenError("jax exports programs by the package flatbuffers, which is missing; pip install flatbuffers")
    further = [name for name in generator.conditions if name != "label"]
    if further:
        raise GenError(f"this model also takes {', '.join(further)}; only models of classes or none are exported")

    def sample(weights: dict[str, jax.Array], seeds: jax.Array, labels: jax.Array) -> jax.Array:
        cond = {"label": labels} if "label" in generator.conditions else {}
        images: jax.Array = generator(unflatten(weights), sample_keys(0, seeds), cond)
        return images.astype(jnp.float32)

    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    (batch,) = jax.export.symbolic_shape("b")
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    try:
        program = jax.export.export(jax.jit(sample), platforms=tuple(platforms))(shapes, rows, rows)
    except (NotImplementedError, TypeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise GenError(
            f"this model cannot be exported for {', '.join(platforms)}: {line}; try fewer --platforms"
        ) from None
    return bytes(program.serialize())


def card(name: str, facts: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    """Gives a model card in Markdown: what it is, how it is called, and its scores with their protocol."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    text = f"# {name}\n\n| | |\n|---|---|\n{rows}\n\n"
    text += "`load.py` makes images with `model.stablehlo` and `weights.safetensors`; it needs jax and flatbuffers.\n"
    if scores is not None:
        values = ", ".join(f"{key} {value:.4g}" for key, value in scores["values"].items())
        text += f"\n## Scores\n\n{values}\n\nProtocol: `{json.dumps(scores['protocol'])}`\n"
    return text
