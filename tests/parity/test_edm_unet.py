"""EDM's networks: blocks, whole U-Nets, preconditioning, and imports under official names."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen import arrays
from gen.diffusion.backbones.edm_blocks import Conv, Style, UNetBlock
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.diffusion.process import EDM, VE, VP
from gen.experiments.skip_tuning import per_concat
from gen.nn.network import Network, param_shapes
from gen.pretrained import edm
from gen.pretrained.rules import load
from gen.pretrained.systems import locate
from gen.sampling.grids import snap
from tests.parity.conftest import fixtures
from tests.parity.toys import nchw, nhwc

NETWORKS = [fx for fx in fixtures("edm-*unet*", "skip-tuning*") if "cls" in fx.config]
BLOCKS = [pytest.param(fx, case, id=f"{fx}-{case}") for fx in fixtures("edm-unetblock*") for case in fx.config]
PRECOND = [
    pytest.param(fx, case, id=f"{fx}-{case}")
    for fx in fixtures("edm-precond*")
    for case, value in fx.config.items()
    if isinstance(value, dict)
]


def network(options: dict[str, Any]) -> SongUNetConfig | DhariwalUNetConfig:
    """The configuration of official constructor arguments."""
    known = {
        "img_resolution": "size",
        "in_channels": "channels",
        "out_channels": "out_channels",
        "label_dim": "num_classes",
        "augment_dim": "augment",
        "model_channels": "width",
        "channel_mult": "mult",
        "channel_mult_emb": "emb",
        "num_blocks": "blocks",
        "attn_resolutions": "attention",
        "dropout": "dropout",
        "embedding_type": "embedding",
        "channel_mult_noise": "noise",
        "encoder_type": "encoder",
        "decoder_type": "decoder",
        "resample_filter": "taps",
    }
    given = {known[k]: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in known}
    if "taps" in given:  # only their proportions count
        given["taps"] = tuple(v // math.gcd(*given["taps"]) for v in given["taps"])
    if options["cls"] == "DhariwalUNet":
        return DhariwalUNetConfig(**{"num_classes": 0, **given})
    return SongUNetConfig(**{"mult": (1, 2, 2, 2), **given})


@functools.cache
def loaded(fx: Any) -> tuple[Any, dict[str, Any]]:
    config = network(fx.config)
    params, _ = load(edm.rules(config, prefix=""), fx.weights, param_shapes(config))
    return config, params


def label_of(one_hot: np.ndarray) -> jax.Array:
    """Class numbers of one-hot rows; zero rows are the label of no class."""
    assert set(np.unique(one_hot)) <= {0.0, 1.0}
    return jnp.asarray(np.where(one_hot.any(axis=1), one_hot.argmax(axis=1), one_hot.shape[1]), jnp.int32)


def conditions(fx: Any) -> dict[str, jax.Array]:
    cond = {"label": label_of(fx.io["class_labels"])} if "class_labels" in fx.io else {}
    return cond | ({"augment": jnp.asarray(fx.io["augment_labels"])} if "augment_labels" in fx.io else {})


def forward(fx: Any, cond: dict[str, jax.Array], **options: Any) -> Any:
    config, params = loaded(fx)
    net = Network(config)
    taps = options.pop("taps", ())
    return jax.jit(lambda p, x, t, c: net(p, x, (t,), c, taps=taps, **options))(
        params, nhwc(fx.io["x"]), fx.io["noise_labels"], cond
    )


def layer(fx: Any, name: str) -> str:
    """Our name of an official layer: DhariwalUNet keeps its last two outside of the decoder."""
    size = fx.config["img_resolution"]
    return name.replace("out_", f"dec.{size}x{size}_aux_")


@pytest.mark.parametrize("fx", NETWORKS, ids=str)
def test_forward_and_features(fx):
    names = [name.removeprefix("act.") for name in fx.io if name.startswith("act.")]
    out, features = forward(fx, conditions(fx), taps=tuple(layer(fx, name) for name in names))
    fx.close(nchw(out), "y" if "y" in fx.io else "y_rho1")
    for name in names:
        fx.close(nchw(features[layer(fx, name)]), f"act.{name}")
    if names:
        last, kept = forward(fx, conditions(fx), taps=(layer(fx, names[0]),), stop=True)
        fx.close(nchw(last), f"act.{names[0]}")
        assert set(kept) == {layer(fx, names[0])}
    if "map_noise_out" in fx.io:
        config, params = loaded(fx)
        noise = Network(config).module(params).map.noise(jnp.asarray(fx.io["noise_labels"]))
        fx.close(noise, "map_noise_out")


@pytest.mark.parametrize("fx", NETWORKS, ids=str)
def test_without_class_and_without_augmentation(fx):
    cond = conditions(fx)
    if "y_zero_class" in fx.io:
        config, params = loaded(fx)
        null = Network(config).apply(params, cond, method="null")
        fx.close(nchw(forward(fx, null)[0]), "y_zero_class")
    if "y_no_augment" in fx.io:
        fx.close(nchw(forward(fx, {k: v for k, v in cond.items() if k != "augment"})[0]), "y_no_augment")


@pytest.mark.parametrize("fx", fixtures("skip-tuning*"), ids=str)
def test_skip_factors(fx):
    names = [row.name for row in loaded(fx)[0].plans[1] if row.takes_skip]
    assert names == fx.config["concat_order"]
    for name in (n.removeprefix("rho_") for n in fx.io if n.startswith("rho_")):
        rho = jnp.asarray(fx.io[f"rho_{name}"])
        fx.close(nchw(forward(fx, conditions(fx), controls={"skips": rho})[0]), f"y_{name}")
    line = fx.io["rho_linear"]
    fx.close(per_concat(len(line), line[0], line[-1]), "rho_linear")


@pytest.mark.parametrize("fx", NETWORKS, ids=str)
def test_configuration_is_inferred_and_weights_come_back(fx):
    weights = {f"model.{name}": value for name, value in fx.weights.items()}
    importer = locate(None, weights).importer
    assert importer.name == "edm"
    config, params, report = importer.load(weights)
    assert report.clean
    expected = loaded(fx)[0]
    named = set(config.attention)  # listed sizes that the network does not have, or without attention, do not show
    assert named <= set(expected.attention)
    expected = dataclasses.replace(expected, dropout=0.0, attention=config.attention)
    if len(config.mult) == 1 and isinstance(config, SongUNetConfig):  # nor how levels that are not there are resampled
        hidden = {"encoder": config.encoder, "decoder": config.decoder, "taps": config.taps}
        expected = dataclasses.replace(expected, **hidden)
    assert config == expected
    back = importer.save(config, params)
    assert set(back) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def block_params(fx: Any, case: str) -> dict[str, Any]:
    """The arrays of one block under our names."""
    flat: dict[str, Any] = {}
    for name, value in fx.weights.items():
        head, _, path = name.partition(".")
        if head != case or path.endswith("resample_filter"):
            continue
        *parents, leaf = path.split(".")
        norm = bool(parents) and parents[-1].startswith("norm")
        if leaf == "weight" and not norm:
            leaf, value = "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        flat["/".join([*parents, "scale" if leaf == "weight" else leaf])] = jnp.asarray(value)
    return arrays.unflatten(flat)


@pytest.mark.parametrize(("fx", "case"), BLOCKS)
def test_single_blocks(fx, case):
    o = fx.config[case]
    taps = tuple(o.get("resample_filter", (1, 1)))
    sampled = {"up": o.get("up", False), "down": o.get("down", False)}
    x = jnp.asarray(nhwc(fx.io[f"{case}.x"]))
    args: tuple[Any, ...] = (x,)
    if "kernel" in o:
        options = {**sampled, "taps": taps, "fused": o.get("fused_resample", False)}
        block: Any = Conv(o["in_channels"], o["out_channels"], o["kernel"], **options, rngs=nnx.Rngs(0))
    else:
        style = Style(
            adaptive=o.get("adaptive_scale", True),
            skip_scale=o.get("skip_scale", 1.0),
            eps=o.get("eps", 1e-5),
            project=o.get("resample_proj", False),
            taps=taps,
        )
        heads = o.get("num_heads") or o["out_channels"] // o.get("channels_per_head", 64)
        width = o["in_channels"], o["out_channels"], o["emb_channels"]
        block = UNetBlock(*width, style, **sampled, heads=heads if o.get("attention") else 0, rngs=nnx.Rngs(0))
        args = (x, (jnp.asarray(fx.io[f"{case}.emb"]),))
    graphdef, state = nnx.split(block)
    params = block_params(fx, case)
    if not o.get("bias", True):
        params["bias"] = jnp.zeros(o["out_channels"])
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, params)
    fx.close(nchw(jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a))(params, *args)), f"{case}.y")


@dataclasses.dataclass(frozen=True)
class Probe:
    """A network that answers with an image, and tells what it was given."""

    channels: int
    value: float = 0.0
    num_classes: int = 0

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Probe(self)


class _Probe(nnx.Module):
    def __init__(self, config: Probe) -> None:
        self.config = config

    def __call__(self, x: Any, times: Any, cond: Any, **_: Any) -> Any:
        raw = jnp.full((*x.shape[:-1], self.config.channels), self.config.value)
        return raw, {"x": x, "time": times[0]}


CLEAN = VE(1e-4, 1e4)  # x + sigma noise, the clock of the official wrappers


@pytest.mark.parametrize(("fx", "case"), PRECOND)
def test_wrapper_coefficients(fx, case):
    options = fx.config[case]
    x, sigma = jnp.asarray(nhwc(fx.io[f"{case}.x_noisy"])), jnp.asarray(fx.io["sigma"])
    channels = fx.io[f"{case}.F"].shape[1]

    def probe(value: float, x: jax.Array) -> Any:
        return wrapped(options, Probe(channels, value)).under(CLEAN)({}, x, sigma, {})

    known = within(fx, wrapped(options, Probe(channels)))

    def close(actual: Any, name: str) -> None:
        fx.close(np.asarray(actual)[known], fx.io[f"{case}.{name}"][known])

    seen = probe(0.0, x)
    close(nchw(seen.extra["x"]), "model_in")
    close(seen.extra["time"], "c_noise")
    close(seen.extra["x"][:, 0, 0, 0] / x[:, 0, 0, 0], "c_in")
    close(probe(0.0, jnp.ones_like(x)).denoised[:, 0, 0, 0], "c_skip")
    close(probe(1.0, jnp.zeros_like(x)).denoised[:, 0, 0, 0], "c_out")


def within(fx: Any, denoiser: Any) -> np.ndarray:
    """The rows up to the network's highest noise level: ours answers above with that one, official ones extrapolate."""
    known = fx.io["sigma"] <= edm.net_range(denoiser)[1]
    assert known.any()
    return known


def wrapped(options: dict[str, Any], inner: Any) -> Any:
    """The denoiser of official wrapper arguments."""
    known = ("sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2", "sigma_min", "sigma_max")
    return edm.precondition(options["cls"], inner, **{k: options[k] for k in known if k in options})


@pytest.mark.parametrize(("fx", "case"), PRECOND)
def test_wrapped_networks(fx, case):
    options = fx.config[case]
    prefix = f"{case}."
    weights = {name.removeprefix(prefix): v for name, v in fx.weights.items() if name.startswith(prefix)}
    if "u" in weights and {"M", "C_1", "C_2"} & set(options):  # the importer is for the published chain
        fx.close(edm.levels(wrapped(options, Probe(3))), weights.pop("u"))
    found = locate(None, weights).importer
    assert found.name == ("edm-iddpm" if "u" in weights else "edm")
    config, params, _ = found.load(weights)
    back = found.save(config, params)
    for name, value in weights.items():
        if name == "u":  # the official table is a recursion in float32
            np.testing.assert_allclose(back[name], value, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    denoiser = wrapped(options, config)
    x, sigma = jnp.asarray(nhwc(fx.io[f"{case}.x_noisy"])), jnp.asarray(fx.io["sigma"])
    cond = {"label": label_of(fx.io["class_labels"])} if options.get("label_dim") else {}
    call = jax.jit(denoiser.under(CLEAN))
    known = within(fx, denoiser)
    fx.close(nchw(call(params, x, sigma, cond).denoised)[known], fx.io[f"{case}.D"][known])
    raw, _ = Network(config)(params, nhwc(fx.io[f"{case}.model_in"]), (fx.io[f"{case}.c_noise"],), cond)
    fx.close(nchw(raw), f"{case}.F")
    if f"{case}.D_no_label" in fx.io:
        null = Network(config).apply(params, cond, method="null")
        fx.close(nchw(call(params, x, sigma, null).denoised)[known], fx.io[f"{case}.D_no_label"][known])


@pytest.mark.parametrize(("fx", "case"), PRECOND)
def test_levels_range_and_schedule(fx, case):
    denoiser = wrapped(fx.config[case], Probe(3))
    known = np.asarray(edm.levels(denoiser))
    given = fx.io[f"{case}.round_sigma_in"].astype(np.float64)
    times = snap(CLEAN, given, known if known.size else None)
    fx.close(CLEAN.sigma(times), f"{case}.round_sigma_out")
    low, high = edm.net_range(denoiser)
    if isinstance(denoiser.process, EDM):  # all levels; an official network may be given narrower bounds
        low, high = fx.config[case].get("sigma_min", low), fx.config[case].get("sigma_max", high)
    expected = fx.io[f"{case}.sigma_range"]
    # the official float32 value of VP's lowest level is off by up to 3 %
    fx.close(low, expected[0], rtol=0.05 if isinstance(denoiser.process, VP) else None)
    fx.close(-1.0 if np.isinf(high) else high, expected[1])
    if known.size:
        fx.close(known, f"{case}.u")
        np.testing.assert_array_equal(
            np.abs(given[:, None] - known[None]).argmin(1), fx.io[f"{case}.round_sigma_index"]
        )
    if f"{case}.t" in fx.io:
        process, t = denoiser.process, fx.io[f"{case}.t"].astype(np.float64)
        fx.close(process.sigma(t) / process.alpha(t), f"{case}.sigma_of_t")
        fx.close(process.time_of(-2.0 * np.log(fx.io[f"{case}.sigma_of_t"].astype(np.float64))), f"{case}.sigma_inv")
