"""One suite over every backbone: shapes, taps, controls, two times, derivatives, and forms that must agree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.ascan import AsCANConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm2_unet import EDM2Config
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.diffusion.backbones.lamamba import LaMambaConfig
from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.diffusion.backbones.rae_v2 import RAEv2Config
from gen.kinds import KINDS
from gen.nn.forward_mode import forward_mode
from gen.nn.network import Network, param_shapes

BATCH = 2
SMALL: dict[str, Any] = {"channels": 2, "num_classes": 3, "remat": "none"}
DIT = DiTConfig((4, 6), patch=2, width=8, depth=3, heads=2, times=2, scan=False, **SMALL)
# kind -> an example with two times, its depth unrolled, nothing recomputed: small, yet with every kind of layer
EXAMPLES: dict[str, Any] = {
    "dit": DIT,
    "lightningdit": LightningDiTConfig((4, 6), patch=2, width=16, depth=2, heads=2, times=2, scan=False, **SMALL),
    "rae-v2": RAEv2Config((4, 4), 2, 16, 3, 2, 24, 1, 2, 2, num_classes=3, times=2, remat="none", scan=False),
    "aligned": AlignedConfig(DIT, "block_1", (5,), 4),
    "lamamba": LaMambaConfig(
        (8, 8), 2, 1, 8, (1, 2, 1, 1), 1, False, (2,) * 4, window=4, num_classes=3, times=2, remat="none", scan=False
    ),
    "ascan": AsCANConfig(
        (8, 8), width=8, stages=("CT", "MM"), middle="T", head_width=4, groups=4, times=2, scan=False, **SMALL
    ),
    "edm2": EDM2Config(8, widths=(8, 16), blocks=1, attention=(4,), head_width=8, times=2, **SMALL),
    "song-unet": SongUNetConfig(
        8, width=8, mult=(1, 2), emb=2, blocks=1, attention=(4,), out_channels=2, embedding="fourier", times=2, **SMALL
    ),
    "dhariwal-unet": DhariwalUNetConfig(
        8, width=32, mult=(1, 2), emb=1, blocks=1, attention=(4,), head_width=16, out_channels=2, times=2, **SMALL
    ),
}
ORDINARY_START = ("song-unet", "dhariwal-unet")  # CTM's second path starts like any other layer
LAST_STAGE = {"lamamba": "up_3"}  # whose gradient is compared: that of all takes long to compile
COSTLY = ("lamamba", "ascan", "dhariwal-unet", "edm2")  # whose gradients take long to compile
BESIDE = ("logvar_linear", "projector_", "early")  # parameters of further outputs
QUICK = {"xla_backend_optimization_level": 0}  # what is compiled runs a few times

every_kind = pytest.mark.parametrize("kind", EXAMPLES)


def inner(config: Any) -> Any:
    """The config that has the options: that of an aligned network is the backbone's."""
    return config.network if isinstance(config, AlignedConfig) else config


def changed(config: Any, **options: Any) -> Any:
    if isinstance(config, AlignedConfig):
        return dataclasses.replace(config, network=changed(config.network, **options))
    return dataclasses.replace(config, **options)


def params_of(config: Any) -> Any:
    """Parameters with nothing left at zero; those of equal shape at equal paths are equal whatever the options."""

    def draw(path: Any, shape: Any) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return jnp.asarray(0.2 * np.random.default_rng(seed).standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


def inputs(config: Any) -> tuple[jax.Array, tuple[jax.Array, ...], dict[str, jax.Array]]:
    x = jax.random.normal(jax.random.key(7), (BATCH, *config.shape))
    return x, (jnp.array([0.3, 0.9]), jnp.array([0.1, 0.4]))[: config.times], {"label": jnp.array([0, 2])}


@functools.cache
def program(config: Any) -> Any:
    """All that is read of one backbone, compiled once."""
    net, module = Network(config), Network(config).module(param_shapes(config))
    names = module.features()
    middle = names[len(names) // 2]

    def run(params: Any, x: jax.Array, times: Any, label: jax.Array, controls: Any) -> dict[str, Any]:
        cond = {"label": label}
        out, features = net(params, x, times, cond, controls=controls, taps=tuple(names))
        stopped, only = net(params, x, times, cond, controls=controls, taps=(middle,), stop=True)
        with forward_mode():
            moves = (jnp.ones_like(x), tuple(jnp.full_like(t, 0.5) for t in times))
            plain, slope = jax.jvp(lambda x, times: net(params, x, times, cond)[0], (x, times), moves)
        return {
            "out": out,
            "features": features,
            "stopped": (stopped, only[middle], features[middle]),
            "jvp": (plain, slope),
        }

    return jax.jit(run, compiler_options=QUICK), names, module.controls()


def ones(controls: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    return {name: jnp.ones(shape) for name, shape in controls.items()}


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def differ(a: Any, b: Any) -> None:
    assert np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() > 1e-6 * np.abs(b).max()


def test_every_backbone_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS["backbone"])


# the network of four levels takes as long to compile as all others together
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "lamamba" else ()) for kind in EXAMPLES]
)
def test_interface(kind: str) -> None:
    config = EXAMPLES[kind]
    run, names, controls = program(config)
    params, (x, times, cond) = params_of(config), inputs(config)
    label, neutral = cond["label"], ones(controls)
    plain = run(params, x, times, label, neutral)

    assert plain["out"].shape == x.shape
    assert plain["out"].dtype == jnp.float32
    assert list(config.conditions) == ["label"]
    assert (config.channels, config.times) == (2, 2)
    null = Network(config).apply(params, {**cond, "more": x}, method="null")
    np.testing.assert_array_equal(null["label"], [3, 3])
    assert null["more"] is x

    assert set(names) <= set(plain["features"])
    assert len(set(names)) == len(names)
    moved = run(params, x + 0.1, times, label, neutral)
    for name in names:
        assert len(plain["features"][name]) == BATCH
        differ(moved["features"][name], plain["features"][name])
    stopped, only, expected = plain["stopped"]
    np.testing.assert_allclose(stopped, expected, atol=1e-5)
    np.testing.assert_allclose(only, expected, atol=1e-5)

    uncontrolled, slope = plain["jvp"]
    close(plain["out"], uncontrolled)
    for name, (size,) in controls.items():
        found = [run(params, x, times, label, {**neutral, name: neutral[name].at[i].set(0.0)}) for i in range(size)]
        for i, result in enumerate(found):
            differ(result["out"], plain["out"])
            if i:
                differ(result["out"], found[i - 1]["out"])

    for other in ((times[0] + 0.1, times[1]), (times[0], times[1] + 0.1)):
        differ(run(params, x, other, label, neutral)["out"], plain["out"])
    differ(run(params, x, times, jnp.array([1, 3]), neutral)["out"], plain["out"])

    h = 3e-3
    ahead, behind = (
        run(params, x + s * h, tuple(t + 0.5 * s * h for t in times), label, neutral)["out"] for s in (1, -1)
    )
    close(slope, (np.asarray(ahead, np.float64) - np.asarray(behind, np.float64)) / (2 * h), 2e-2)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in COSTLY else ()) for kind in EXAMPLES]
)
def test_scan_and_remat_change_nothing(kind: str) -> None:
    """Values and gradients of recomputed, scanned stacks are the plain loop's; they reach every parameter."""
    config = EXAMPLES[kind]
    options = {f.name for f in dataclasses.fields(inner(config))}
    others = [{"remat": "full"} | ({"scan": True} if "scan" in options else {})]
    others += [{"remat": "dots", "scan": True}] if kind == "dit" else []
    params, (x, times, cond) = params_of(config), inputs(config)

    part = LAST_STAGE.get(kind)

    def run(config: Any) -> Any:
        def loss(some: Any) -> jax.Array:
            out, _ = Network(config)(some if part is None else {**params, part: some}, x, times, cond)
            return jnp.square(out).mean()

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params if part is None else params[part])

    expected = run(config)
    buffers = Network(config).buffers
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected[1]):
        name = "/".join(str(key.key) for key in path)
        assert np.asarray(gradient).any() != (name in buffers or name.startswith(BESIDE)), name
    for other in others:
        jax.tree.map(functools.partial(close, tolerance=1e-4), run(changed(config, **other)), expected)


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind not in (*ORDINARY_START, "aligned")])
def test_a_second_time_starts_without_effect(kind: str) -> None:
    """With the parameters of a network of a single time, one of two times embeds the first as that does."""
    one, two = changed(EXAMPLES[kind], times=1), EXAMPLES[kind]
    learned, (_, times, cond) = params_of(one), inputs(two)

    def compare(key: jax.Array, learned: Any, times: Any) -> Any:
        params = overlaid(Network(two).init(key), learned)
        embedded = Network(two).apply(params, times, cond, method="embed")
        return embedded, Network(one).apply(learned, times[:1], cond, method="embed")

    close(*jax.jit(compare, compiler_options=QUICK)(jax.random.key(0), learned, times))


def overlaid(params: Any, others: Any) -> Any:
    """`params` with the arrays of `others` where it has their paths; it must have them all."""
    if not isinstance(others, dict):
        return others
    assert not set(others) - set(params)
    return {k: overlaid(v, others[k]) if k in others else v for k, v in params.items()}


def test_an_aligned_config_shows_what_its_backbone_shows() -> None:
    aligned = EXAMPLES["aligned"]
    for name in ("size", "shape", "channels", "num_classes", "null_class", "times", "dropout", "width", "conditions"):
        assert getattr(aligned, name) == getattr(DIT, name), name
    assert program(aligned)[2] == program(DIT)[2]
    assert program(aligned)[1] == ["tokens", "block_0", "block_1", "aligned_0", "block_2"]
