"""Sign, Bernoulli and multi-scale quantizers against the official code: ids, codes, losses and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.features.resize import axis_weights, resize
from gen.nn.network import Network, param_shapes
from gen.pretrained.rules import load, save
from gen.pretrained.var import quantizer_rules
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.quantizers.entropy import entropies
from gen.tokenizers.quantizers.lfq import BSQ, LFQ
from gen.tokenizers.quantizers.residual import Residual
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def one(value: Any) -> np.ndarray:
    """A scalar as the fixtures store it."""
    return np.asarray(value).reshape(1)


def place(bits: Any, first: bool) -> np.ndarray:
    """The number that bits (..., n) spell, the first bit the highest or the lowest."""
    bits = np.asarray(bits)[..., ::-1] if first else np.asarray(bits)
    return (bits.astype(np.int64) << np.arange(bits.shape[-1])).sum(-1)


@pytest.mark.parametrize("grouped", [True, False], ids=["group", "analytic"])
@pytest.mark.parametrize("fx", fixtures("binary-lfq-bsq*"), ids=str)
def test_spherical_signs(fx: Fixture, grouped: bool) -> None:
    given, prefix = fx.config, "bsq_group" if grouped else "bsq_analytic"
    group = given["group_size"] if grouped else 1
    config = BSQ(given["dim"], 1.0 / given["inv_temperature"], given["gamma"] / given["gamma0"], group)
    module = Network(config).module({})

    def loss(h: jax.Array) -> tuple[jax.Array, Any]:
        found = module(h)
        losses = {name: value.mean() for name, value in found.losses.items()}
        entropy = given["gamma0"] * losses["entropy"] / given["inv_temperature"]
        total = given["beta"] * losses["commitment"] + given["zeta"] * entropy
        return (found.codes * fx.io["upstream_grad"]).sum() + total, (found, total)

    h = jnp.asarray(fx.io["h"])
    grad, (found, total) = jax.grad(loss, has_aux=True)(h)
    fx.close(found.codes, f"{prefix}_zq")
    fx.close(one(total), f"{prefix}_loss")
    fx.close(grad, f"{prefix}_grad_h")
    fx.close(place(found.ids, first=True), f"{prefix}_indices")
    groups = found.ids.reshape(*h.shape[:-1], -1, group)
    fx.close(place(groups, first=True), f"{prefix}_group_indices")
    unit = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
    soft = module.soft(unit.reshape(-1, given["dim"]))
    fx.close(jax.nn.softmax(soft).mean(axis=0), f"{prefix}_avg_prob")
    sample, batch = entropies(soft, config.floor)
    fx.close(one(sample.mean()), f"{prefix}_persample_entropy")
    fx.close(one(batch), f"{prefix}_codebook_entropy")


@pytest.mark.parametrize("fx", fixtures("binary-lfq-bsq*"), ids=str)
def test_lookup_free_signs(fx: Fixture) -> None:
    x, upstream = (jnp.asarray(nhwc(fx.io[name])) for name in ("lfq_x", "lfq_upstream_grad"))
    module = Network(LFQ(x.shape[-1])).module({})

    def loss(x: jax.Array) -> tuple[jax.Array, Any]:
        found = module(x)
        losses = {name: value.mean() for name, value in found.losses.items()}
        total = (found.codes * upstream).sum() + 0.1 * losses["entropy"] + 0.25 * losses["commitment"]
        return total, (found, losses)

    grad, (found, losses) = jax.grad(loss, has_aux=True)(x)
    fx.close(nchw(found.codes), "lfq_quantized")
    fx.close(place(found.ids, first=False).reshape(-1), "lfq_indices")
    sample, batch = entropies(module.soft(x.reshape(-1, x.shape[-1])), module.config.floor)
    fx.close(one(sample.mean()), "lfq_persample_entropy")
    fx.close(one(batch), "lfq_codebook_entropy")
    fx.close(one(losses["commitment"]), "lfq_commitment")
    fx.close(one(losses["entropy"]), "lfq_entropy_loss")
    fx.close(nchw(grad), "lfq_grad_x")


@pytest.mark.parametrize("fx", fixtures("binary-quantizer*"), ids=str)
def test_bernoulli_bits(fx: Fixture) -> None:
    """Both published quantizers: the projections stand in the tokenizers, here in the test."""
    for system, case, drawn in [
        ("instella", "train", True),
        ("instella", "eval", False),
        *[(system, f"{system}_{kind}", kind == "sto") for system in ("bld", "bld_tanh") for kind in ("sto", "det")],
    ]:
        grid = system != "instella"
        channels = nhwc if grid else np.asarray
        back = nchw if grid else np.asarray
        kernel, bias = (fx.weights[f"{system}.proj.0.{name}"] for name in ("weight", "bias"))
        kernel = kernel.reshape(kernel.shape[:2])
        table = fx.weights[f"{system}.embed{'.weight' if grid else ''}"]
        h, upstream = (channels(fx.io[f"{system}_{n}" if grid else n]) for n in ("h", "upstream_grad"))
        tanh = system == "bld_tanh"
        temperature = 1.0 if grid else fx.config["train_temp"]
        config = Binary(fx.config["bits"], "tanh" if tanh else "sigmoid", temperature, squashed_loss=grid)
        module = Network(config).module({})
        uniforms = channels(fx.io[f"{case}_uniforms"]) if drawn else None

        def loss(
            h: Any, kernel: Any, table: Any, *, u: Any = uniforms, m: Any = module, b: Any = bias, w: Any = upstream
        ):
            logits = h @ kernel.T + b
            found = m.quantize(logits, u)
            z_q = found.sample(None) @ table
            commitment = found.losses["commitment"].mean()
            return (z_q * w).sum() + commitment, (logits, found, z_q, commitment)

        values = (jnp.asarray(h), jnp.asarray(kernel), jnp.asarray(table))
        grads, (logits, found, z_q, commitment) = jax.grad(loss, (0, 1, 2), has_aux=True)(*values)
        if not grid:
            fx.close(logits, "logits")
            fx.close(grads[1], f"{case}_grad_proj_weight")
        fx.close(back(found.sample(None)), f"{case}_code")
        if not drawn:
            np.testing.assert_array_equal(module.embed(found.ids), np.round(found.codes))
        fx.close(back(z_q), f"{case}_z_q")
        fx.close(one(commitment), f"{case}_code_loss")
        fx.close(back(grads[0]), f"{case}_grad_h")
        fx.close(grads[2], f"{case}_grad_embed")


def pyramid(fx: Fixture) -> tuple[Residual, Any]:
    given = fx.config
    config = Residual(
        given["vocab_size"],
        given["Cvae"],
        tuple(given["v_patch_nums"]),
        given["using_znorm"],
        abs(given["quant_resi"]),
        given["share_quant_resi"],
    )
    rules = quantizer_rules(config, "", "")
    hits = np.zeros((len(config.scales), config.vocabulary), np.float32)
    params, report = load(rules, fx.weights, param_shapes(config), fresh={"hits": hits})
    assert len(report.matched) == len(fx.weights)
    saved = save(rules, {name: value for name, value in params.items() if name != "hits"})
    assert saved.keys() == fx.weights.keys()
    assert all(np.array_equal(saved[name], array) for name, array in fx.weights.items())
    return config, params


@pytest.mark.parametrize("fx", fixtures("var-quantizer*"), ids=str)
def test_pyramid_of_maps(fx: Fixture) -> None:
    config, params = pyramid(fx)
    net, f, probe = Network(config), nhwc(fx.io["f"]), nhwc(fx.io["grad_probe_w"])

    def loss(f: Any, params: Any) -> tuple[jax.Array, Any]:
        found = net(params, f)
        losses = {name: value.mean() for name, value in found.losses.items()}
        total = fx.config["beta"] * losses["commitment"] + losses["codebook"]
        return (found.codes * probe).sum() + total, (found, total)

    (grad_f, grad_params), (found, total) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(f, params)
    fx.close(found.ids, "idx")
    fx.close(nchw(found.codes), "train_f_hat")
    fx.close(total, "vq_loss")
    fx.close(nchw(grad_f), "grad_f")
    fx.close(grad_params["embedding"], "grad_codebook")
    module = net.module(params)
    sums = module.sums(found.ids)
    fx.close(np.stack([nchw(total) for total in sums], axis=1), "f_hat_per_scale")
    fx.close(nchw(module.embed(found.ids)), "embed_to_fhat_last")
    fx.close(module.inputs(found.ids), "var_input")
    assert found.statistics["hits"].sum() == pytest.approx((1 - config.decay) * config.tokens, rel=1e-5)


@pytest.mark.parametrize("fx", fixtures("var-quantizer*"), ids=str)
def test_how_maps_are_resized_and_share_convolutions(fx: Fixture) -> None:
    config, side = pyramid(fx)[0], fx.config["v_patch_nums"][-1]
    for name in fx.io:
        if name.startswith("bicubic_1d_"):
            size, out = map(int, name.removeprefix("bicubic_1d_").split("_to_"))
            fx.close(axis_weights(size, out, "torch-bicubic"), name)
        if name.startswith("area_to_"):
            out = int(name.removeprefix("area_to_"))
            fx.close(nchw(resize(nhwc(fx.io["area_in"]), (out, out), "torch-area")), name)
    assert side == config.scales[-1]
    if "phi_ticks" in fx.io:
        fx.close(np.array(config.places, np.float32), "phi_ticks")
    fx.close(np.array(config.chosen), "phi_index_per_scale")
