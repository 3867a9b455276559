"""An official DiT in diffusers' layout converts to the same network, and back exactly."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.pretrained.readers import read_weights
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.pretrained.layouts import component, dit_names


@pytest.mark.parametrize("fx", fixtures("dit-forward*"), ids=str)
def test_diffusers_layout(fx: Fixture, tmp_path: Path) -> None:
    args = fx.config["args"]
    weights = dit_names(fx.weights)
    settings = {"sample_size": args["input_size"], "num_attention_heads": args["num_heads"]}
    component(tmp_path / "pipe" / "transformer", "DiTTransformer2DModel", weights, **settings)
    assert cli.main(["convert", str(tmp_path / "pipe"), "--out", str(tmp_path / "run")]) == 0
    loaded = gen.load(tmp_path / "run")
    x, t, cond = nhwc(fx.io["x"]), jnp.asarray(fx.io["t"]), {"label": jnp.asarray(fx.io["y"])}
    fx.close(nchw(loaded.denoiser.net(loaded.params["net"], x, (t,), cond)[0]), "out")
    for system, expected in ((None, weights), ("dit", fx.weights)):
        back = tmp_path / f"{system}.safetensors"
        choice = [] if system is None else ["--system", system]
        assert cli.main(["convert", str(tmp_path / "run"), "--out", str(back), *choice]) == 0
        exported = read_weights(back)
        assert exported.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(exported[name], array, err_msg=name)
