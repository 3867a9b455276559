"""The guided-diffusion U-Net: official names into our ADM, and blocks left out at run time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.nn.network import Network
from gen.pretrained import adm
from gen.pretrained.systems import locate
from tests.parity.conftest import fixtures
from tests.parity.toys import nchw, nhwc


@pytest.mark.parametrize("fx", fixtures("autodiffusion-dynamic-unet*"), ids=str)
def test_network_and_left_out_blocks(fx):
    o = fx.config["unet"]
    importer = adm.NEW_IMPORTER if o.get("use_new_attention_order") else adm.IMPORTER
    # -1 channels per head: as many heads as named
    head_width = o.get("num_head_channels", -1)
    heads = {"heads": o.get("num_heads", 1)} if head_width == -1 else {"head_width": head_width, "heads": 0}
    config = importer.infer(fx.weights, size=o["image_size"], **heads)
    assert (config.width, config.mult, config.blocks) == (
        o["model_channels"],
        tuple(o.get("channel_mult", (1, 2, 4, 8))),
        o["num_res_blocks"],
    )
    assert config.adaptive == o.get("use_scale_shift_norm", False)
    if len(config.mult) > 1:
        assert (config.resample == "blocks") == o.get("resblock_updown", False)
    config, params, report = importer.load(fx.weights, config)
    assert report.clean
    for name, value in importer.save(config, params).items():
        np.testing.assert_array_equal(value, fx.weights[name], err_msg=name)
    x, t = nhwc(fx.io["x"]), jnp.asarray(fx.io["t"])
    cond = {"label": jnp.asarray(fx.io["y"])} if "y" in fx.io else {}
    call = jax.jit(lambda p, keep: Network(config)(p, x, (t,), cond, controls={"keep": keep})[0])
    everything = np.ones(fx.config["layer_num"], bool)
    plain = jax.jit(lambda p: Network(config)(p, x, (t,), cond)[0])(params)
    fx.close(nchw(plain), "out_full")
    fx.close(nchw(call(params, everything)), "out_full")
    for name in (n for n in fx.io if n.startswith("skip")):
        keep = everything.copy()
        keep[fx.io[name]] = False
        fx.close(nchw(call(params, keep)), f"out_{name}")


def test_published_networks_are_known_by_their_names():
    """ImageNet-64: names and shapes alone give the configuration back."""
    from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig

    config = DhariwalUNetConfig(
        64, out_channels=6, num_classes=7, width=32, mult=(1, 2, 3, 4), emb=4, blocks=1, head_width=32, groups=32
    )
    params = Network(config).init(jax.random.key(0))
    weights = adm.IMPORTER.save(config, params)
    importer = locate(None, weights).importer
    assert importer.name == "adm"
    assert importer.infer(weights, head_width=32) == config
    back = importer.load(weights, config)[1]
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))
    assert importer.generator(dataclasses.replace(config)).nfe == 250
