"""EDM's augmentation, from the official draws."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gen.data.edm_augment import EDMAugment
from tests.parity.conftest import fixtures
from tests.parity.toys import nchw, nhwc

CASES = [pytest.param(fx, case, id=f"{fx}-{case}") for fx in fixtures("edm-augment*") for case in fx.config]
NAMES = {
    "rotate_frac": "rotate",
    "aniso": "anisotropic",
    "translate_frac": "translate",
    "rotate_frac_max": "rotate_max",
    "aniso_std": "anisotropic_std",
    "aniso_rotate_prob": "anisotropic_turned",
    "translate_frac_std": "translate_std",
}
# the official order of draws in each operation
ORDER = {
    "xflip": ("w", "gate"),
    "yflip": ("w", "gate"),
    "rotate_int": ("w", "gate"),
    "translate_int": ("xy", "gate"),
    "scale": ("w", "gate"),
    "rotate": ("u", "gate"),
    "anisotropic": ("w", "axis", "gate", "turned"),
    "translate": ("xy", "gate"),
    "brightness": ("w", "gate"),
    "contrast": ("w", "gate"),
    "lumaflip": ("w", "gate"),
    "hue": ("u", "gate"),
    "saturation": ("w", "gate"),
}


def pipeline(options: dict[str, float]) -> EDMAugment:
    """The configuration of official constructor arguments; what is not given is off."""
    off = dict.fromkeys(ORDER, 0.0)
    return EDMAugment(**{"p": 1.0, **off, **{NAMES.get(k, k): float(v) for k, v in options.items()}})


def draws_of(fx: Any, case: str, pipe: EDMAugment) -> dict[str, dict[str, jax.Array]]:
    stored = iter(sorted(name for name in fx.io if name.startswith(f"{case}.draw")))
    draws: dict[str, dict[str, jax.Array]] = {}
    for operation in pipe.operations:
        values: dict[str, jax.Array] = {}
        for name in ORDER[operation]:
            array = jnp.asarray(fx.io[next(stored)])
            if name == "xy":
                values |= {"x": array[0].reshape(-1), "y": array[1].reshape(-1)}
            else:
                values[name] = array.reshape(-1)
        draws[operation] = values
    assert next(stored, None) is None
    return draws


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_images_and_labels(fx, case):
    pipe = pipeline(fx.config[case])
    draws = draws_of(fx, case, pipe)
    images, labels = jax.jit(pipe.apply)(nhwc(fx.io[f"{case}.images"]), draws)
    fx.close(nchw(images), f"{case}.out", rtol=0, atol=1e-4)
    fx.close(labels, f"{case}.labels", rtol=0, atol=1e-5)
    own = pipe.draw(jax.random.key(0), labels.shape[0])
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, draws)
    assert pipe.width == labels.shape[1]
