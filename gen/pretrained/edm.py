"""Official EDM weights (NVlabs/edm): names, shapes, preconditioning and the official sampler.

One table serves SongUNet and DhariwalUNet. Which preconditioning a network was trained in does not show in its
arrays: it is the class of the pickled module, and each has an importer of its own (edm, edm-vp, edm-ve, edm-iddpm).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import DDPMLoss, EDMLoss
from gen.diffusion.process import EDM, VE, VP
from gen.diffusion.transport import NoiseMatching
from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Computed, Importer, Rule, Rules, convolution, linear
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.generator import DiffusionGenerator

__all__ = [
    "IDDPM_IMPORTER",
    "IMPORTER",
    "VE_IMPORTER",
    "VP_IMPORTER",
    "config",
    "levels",
    "net_range",
    "precondition",
    "rules",
]

UNetConfig = SongUNetConfig | DhariwalUNetConfig


def rules(config: UNetConfig, prefix: str = "model.") -> Rules:
    """Gives the table of official names for a configuration; `prefix` is that of the wrapped network."""
    table: list[Rule | Computed] = []
    song = isinstance(config, SongUNetConfig)
    if isinstance(config, SongUNetConfig) and config.embedding == "fourier":
        table.append(Rule("map_noise.freqs", "map/freqs", SAME))
    if config.num_classes:
        table += linear("map_label", "map/label", bias=song)
    if config.augment:
        table += linear("map_augment", "map/augment", bias=False)
    for s in ("", "_s")[: config.times]:
        table += [*linear(f"map_layer0{s}", f"map/layer0{s}"), *linear(f"map_layer1{s}", f"map/layer1{s}")]
    for side, plan in zip(("enc", "dec"), config.plans, strict=True):
        for row in plan:
            table += _layer_rules(config, f"{side}.{row.name}", row)
    names: dict[str, str] = {} if song else {f"dec.{config.size}x{config.size}_aux_{k}": f"out_{k}" for k in _OUT}
    return [_renamed(rule, prefix, names) for rule in table]


_OUT = ("norm", "conv")


def _renamed(rule: Rule | Computed, prefix: str, names: dict[str, str]) -> Rule | Computed:
    """With the prefix; DhariwalUNet keeps its last two layers outside of the decoder."""
    assert isinstance(rule.official, str)
    stem, dot, leaf = rule.official.rpartition(".")
    return dataclasses.replace(rule, official=prefix + names.get(stem, stem) + dot + leaf)


def _layer_rules(config: UNetConfig, official: str, row: Any) -> list[Rule | Computed]:
    ours = official.replace(".", "/")
    taps = config.style.taps
    f = np.asarray(taps, np.float64) / sum(taps)
    filters = Computed(f"{official}.resample_filter", np.outer(f, f)[None, None].astype(np.float32))
    match row.kind:
        case "norm":
            return [*_norm(official, ours)]
        case "resample":
            return [filters]
        case "conv" | "skip" | "residual" | "out":
            return [*convolution(official, ours), *([filters] if row.up or row.down else [])]
    sampled = row.up or row.down
    table: list[Rule | Computed] = [*_norm(f"{official}.norm0", f"{ours}/norm0")]
    table += [*convolution(f"{official}.conv0", f"{ours}/conv0"), *convolution(f"{official}.conv1", f"{ours}/conv1")]
    table += [*linear(f"{official}.affine", f"{ours}/affine"), *_norm(f"{official}.norm1", f"{ours}/norm1")]
    if config.times == 2:
        table += linear(f"{official}.affine_s", f"{ours}/affine_s")
    if row.inputs != row.outputs or (sampled and config.style.project):
        table += convolution(f"{official}.skip", f"{ours}/skip")
    if sampled:
        at = (f"{official}.{name}.resample_filter" for name in ("conv0", "skip"))
        table += [dataclasses.replace(filters, official=name) for name in at]
    if row.attention and config.style.heads(row.outputs):
        table += _norm(f"{official}.norm2", f"{ours}/norm2")
        table += [*convolution(f"{official}.qkv", f"{ours}/qkv"), *convolution(f"{official}.proj", f"{ours}/proj")]
    return table


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def config(weights: Arrays) -> UNetConfig:
    """Gives the configuration of a wrapped network's state dict, from its names and shapes.

    Raises GenError when a needed array is missing or not shaped as in one of EDM's networks.
    """
    try:
        found = {name.removeprefix("model."): np.shape(array) for name, array in weights.items()}
        return _config(found, weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise GenError(f"this is not an EDM network: {error} is missing or misshaped; give an official file") from None


def _config(shapes: dict[str, tuple[int, ...]], weights: Arrays) -> UNetConfig:
    sizes = sorted({int(m[1]) for m in map(re.compile(r"enc\.(\d+)x\1_block0\.").match, shapes) if m}, reverse=True)
    size = sizes[0]
    song = "out_conv.weight" not in shapes
    first, channels = shapes[f"enc.{size}x{size}_conv.weight"][:2]
    emb, noise = shapes["map_layer0.weight"]
    width = first if song else noise
    shared: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "out_channels": shapes[f"dec.{size}x{size}_aux_conv.weight" if song else "out_conv.weight"][0],
        "num_classes": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
        "augment": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
        "width": width,
        "mult": tuple(shapes[f"enc.{s}x{s}_block0.conv1.weight"][0] // width for s in sizes),
        "emb": emb // width,
        "blocks": _count(shapes, f"enc.{size}x{size}_block"),
        "attention": tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in shapes),
        "times": 2 if "map_layer0_s.weight" in shapes else 1,
    }
    if not song:
        return DhariwalUNetConfig(**shared)
    filters = [np.asarray(weights[name]) for name in weights if name.endswith("resample_filter")]
    row = filters[0][0, 0, 0] if filters else np.ones(2)
    below = f"{sizes[1]}x{sizes[1]}_" if len(sizes) > 1 else "none"
    aux = next((k for k in ("skip", "residual") if f"enc.{below}aux_{k}.weight" in shapes), "standard")
    shared |= {
        "embedding": "fourier" if "map_noise.freqs" in shapes else "positional",
        "noise": noise // width,
        "encoder": aux,
        "decoder": "skip" if f"dec.{below}aux_conv.weight" in shapes else "standard",
        "taps": _whole(row),
    }
    return SongUNetConfig(**shared)


def _whole(row: np.ndarray) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of a filter's row."""
    for k in range(1, 65):
        taps = k * row / row[0]
        if np.abs(taps - np.rint(taps)).max() < 1e-3:
            return tuple(int(v) for v in np.rint(taps))
    raise ValueError("resample_filter")


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def precondition(
    wrapper: str,
    network: Any,
    *,
    sigma_data: float = 0.5,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    M: int = 1000,
    epsilon_t: float = 1e-5,
    C_1: float = 0.001,
    C_2: float = 0.008,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Denoiser:
    """Gives the denoiser of an official wrapper class (VPPrecond, VEPrecond, iDDPMPrecond or EDMPrecond) around
    `network`.

    Arguments keep their official names and defaults; each wrapper reads its own. The official D(x; sigma) is this
    denoiser seen ``under(EDM())``; its own process is the one it was made for, where its loss is plain.
    Raises GenError for another wrapper.
    """
    match wrapper:
        case "EDMPrecond":
            return Denoiser(network, EDM(sigma_data=sigma_data), EDMPrecondition(), EDMLoss())
        case "VPPrecond":
            process = VP(beta_min, beta_min + beta_d, t_min=epsilon_t)
            return Denoiser(network, process, Predict("eps", scale=M - 1.0), NoiseMatching())
        case "VEPrecond":
            low, high = 0.02 if sigma_min is None else sigma_min, 100.0 if sigma_max is None else sigma_max
            return Denoiser(network, VE(low, high), Predict("eps", clock="log-half-level", sign=-1), NoiseMatching())
        case "iDDPMPrecond":
            chain = DDPM("cosine", M, C_2, 1.0 - C_1)
            return Denoiser(network, chain, Predict("eps", clock="nearest-index", learned_variance=True), DDPMLoss())
    raise GenError(f"unknown preconditioning '{wrapper}'; expected EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond")


def levels(denoiser: Denoiser) -> tuple[float, ...]:
    """Gives the noise levels that a network of a chain knows, highest first and 0 last; () where it knows all."""
    process = denoiser.process
    if not isinstance(process, DDPM):
        return ()
    times = process.time(np.arange(process.steps - 1, -2, -1))
    return tuple((process.sigma(times) / process.alpha(times)).tolist())


def net_range(denoiser: Denoiser) -> tuple[float, float]:
    """Gives the lowest and highest noise level sigma / alpha that the network is made for."""
    process = denoiser.process
    if isinstance(process, EDM):
        return 0.0, math.inf
    low, high = (float(process.sigma(t) / process.alpha(t)) for t in (process.t_min, process.t_max))
    return low, high


def generator(wrapper: str) -> Callable[[UNetConfig], DiffusionGenerator]:
    """Makes the Generator with EDM's deterministic sampler: 18 steps at 32 px, 40 from there on."""

    def make(network: UNetConfig) -> DiffusionGenerator:
        denoiser = precondition(wrapper, network)
        steps = 18 if network.size <= 32 else 40
        sampler = edm_sampler(steps, net_range=net_range(denoiser), levels=levels(denoiser))
        return DiffusionGenerator(denoiser, sampler)

    return make


def _chain_rules(config: UNetConfig) -> Rules:
    """With the chain's noise levels, which the iDDPM wrapper stores."""
    u = np.asarray(levels(precondition("iDDPMPrecond", config)), np.float32)
    return [Computed("u", u, atol=1e-5 * float(u.max())), *rules(config)]


def _importer(name: str, wrapper: str, mark: str, table: Callable[[UNetConfig], Rules] = rules) -> Importer:
    return Importer(name, ("model.map_layer0.weight", *([mark] if mark else [])), config, table, generator(wrapper))


IMPORTER = _importer("edm", "EDMPrecond", "")
VP_IMPORTER = _importer("edm-vp", "VPPrecond", "class:VPPrecond")
VE_IMPORTER = _importer("edm-ve", "VEPrecond", "class:VEPrecond")
IDDPM_IMPORTER = _importer("edm-iddpm", "iDDPMPrecond", "u", _chain_rules)
