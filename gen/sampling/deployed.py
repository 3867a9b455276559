"""A generator as one file of StableHLO with its weights, which needs jax alone to run (`jax.export`).

JAX reads and writes such files by the package flatbuffers, which it does not install itself.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.sampling.generator import Generator
from gen.training.indexed import sample_keys

__all__ = ["LOADER", "PLATFORMS", "card", "exported"]

PLATFORMS = ("cpu", "cuda", "tpu")

LOADER = '''"""Makes images with model.stablehlo; needs jax and flatbuffers: python load.py SEED CLASS."""

import pathlib
import sys

import jax.export
import numpy as np

if not jax.config.jax_compilation_cache_dir:  # compiled programs are kept for the next start
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "gen" / "jax"))
program = jax.export.deserialize(pathlib.Path(__file__).with_name("model.stablehlo").read_bytes())


def sample(seeds, labels):  # (B,) integers each -> (B, H, W, C) uint8; labels do not matter to a model without classes
    images = program.call(np.asarray(seeds, np.int32), np.asarray(labels, np.int32))
    return np.clip(np.rint((np.asarray(images) + 1.0) * 127.5), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    print(sample([int(sys.argv[1])], [int(sys.argv[2])])[0, ..., 0])
'''


def exported(generator: Generator, params: Mapping[str, Any], platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Gives the program ``(seeds (B,) int32, labels (B,) int32) -> images (B, H, W, C) float32``, serialised.

    B is free, images are in [-1, 1], unclipped. The weights are constants of the program. Image i is that of `seeds[i]`
    and `labels[i]` in the run.

    Raises GenError for a generator that is conditioned on more than a label, and for one that jax cannot export for one
    of the platforms.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise GenError("jax exports programs by the package flatbuffers, which is missing; pip install flatbuffers")
    further = [name for name in generator.conditions if name != "label"]
    if further:
        raise GenError(f"this model also takes {', '.join(further)}; only models of classes or none are exported")

    def sample(seeds: jax.Array, labels: jax.Array) -> jax.Array:
        cond = {"label": labels} if "label" in generator.conditions else {}
        images: jax.Array = generator(constants, sample_keys(0, seeds), cond)
        return images.astype(jnp.float32)

    constants = jax.tree.map(np.asarray, dict(params))
    (batch,) = jax.export.symbolic_shape("b")
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    try:
        program = jax.export.export(jax.jit(sample), platforms=tuple(platforms))(rows, rows)
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
    text += "`load.py` makes images with `model.stablehlo`; it needs jax and flatbuffers.\n"
    text += "`weights.safetensors` holds the arrays by role and path, as the run has them.\n"
    if scores is not None:
        values = ", ".join(f"{key} {value:.4g}" for key, value in scores["values"].items())
        text += f"\n## Scores\n\n{values}\n\nProtocol: `{json.dumps(scores['protocol'])}`\n"
    return text
