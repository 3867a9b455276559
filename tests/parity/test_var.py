"""VAR's transformer against the official code: teacher forcing, every block, loss, guided sampling with a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.base import cross_entropy
from gen.autoregressive.decoding import LinearScale
from gen.autoregressive.scales import decode_scales
from gen.autoregressive.var import VARConfig
from gen.nn.network import Network, param_shapes
from gen.pretrained.rules import load
from gen.pretrained.var import IMPORTER, quantizer_rules
from gen.tokenizers.quantizers.residual import Residual
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw
from tests.parity.test_sdvae import check_round_trip

QUANTIZER = "vae_quantize."


def model(fx: Fixture) -> tuple[VARConfig, Any, Any]:
    """Configuration, the transformer's parameters, the quantizer's."""
    codes, given = fx.config["quantizer"], fx.config["var"]
    quantizer = Residual(
        codes["vocab_size"],
        codes["Cvae"],
        tuple(codes["v_patch_nums"]),
        codes["using_znorm"],
        codes["quant_resi"],
        codes["share_quant_resi"],
    )
    own = {name: array for name, array in fx.weights.items() if not name.startswith(QUANTIZER)}
    config = IMPORTER.infer(
        own,
        heads=given["num_heads"],
        scales=given["patch_nums"],
        strength=quantizer.strength,
        convolutions=quantizer.convolutions,
        cosine=quantizer.cosine,
        eps=given["norm_eps"],
    )
    assert config == VARConfig(
        quantizer,
        num_classes=given["num_classes"],
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        hidden=int(given["embed_dim"] * given["mlp_ratio"]),
        normed=given["attn_l2_norm"],
        shared=given["shared_aln"],
        eps=given["norm_eps"],
    )
    _, params, report = IMPORTER.load(own, config)
    assert len(report.matched) == len(own)
    check_round_trip(IMPORTER, own, config, params)
    rules = quantizer_rules(quantizer, QUANTIZER, "")
    left = {name: array for name, array in fx.weights.items() if name.startswith(QUANTIZER)}
    hits = np.zeros((len(quantizer.scales), quantizer.vocabulary), np.float32)
    codebook, _ = load(rules, left, param_shapes(quantizer), fresh={"hits": hits})
    return config, params, codebook


@pytest.mark.parametrize("fx", fixtures("var-forward*"), ids=str)
def test_next_scale_model(fx: Fixture) -> None:
    config, params, codebook = model(fx)
    ids, cond = jnp.asarray(fx.io["idx"]), {"label": jnp.asarray(fx.io["label"])}

    @jax.jit
    def forward(params: Any, codebook: Any) -> Any:
        inputs = config.forced({"tokenizer": {"quantizer": codebook}}, ids)["inputs"]
        net = Network(config).module(params)
        c, given = net.condition(cond["label"])
        x = jnp.concatenate([net.first(c), net.later(inputs, config.groups[0])], axis=1)
        blocks = net.run(x, given, mask=net.mask(), keep=tuple(range(config.depth))).kept
        return inputs, blocks, config.logits(params, ids, {**cond, "inputs": inputs})

    inputs, blocks, logits = forward(params, codebook)
    fx.close(inputs, "var_input")
    for i, output in blocks.items():
        fx.close(output, f"after_block_{i}")
    fx.close(logits, "logits")
    fx.close(cross_entropy(logits, ids), "loss_per_token")

    @jax.jit
    def decode(params: Any, codebook: Any, label: jax.Array) -> Any:
        seen: list[jax.Array] = []

        def greedy(logits: jax.Array, scale: int) -> jax.Array:
            del scale
            seen.append(logits)
            return logits.argmax(-1).astype(jnp.int32)

        guidance = LinearScale(1.0 + float(fx.io["gen_cfg"]))
        found, total = decode_scales(config, params, codebook, {"label": label}, greedy, guidance)
        return {"gen_logits": jnp.concatenate(seen, axis=1), "gen_idx": found, "gen_f_hat": total}

    for name, array in decode(params, codebook, jnp.asarray(fx.io["gen_label"])).items():
        fx.close(nchw(array) if array.ndim == 4 else array, name)
