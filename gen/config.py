"""Configurations: frozen dataclasses, to JSON and back by a short registered ``kind``.

Every configurable thing of the project (process, backbone, solver, tokenizer, task ...) is a frozen
dataclass named in `KINDS`. The table maps the short kind that stands in JSON to where the class lives, so
that listing names imports nothing heavy. A class joins the project (JSON, ``gen list``, the conformance
suites) by its one row here. An installed package adds rows by entry points of the group ``gen.kinds``
(``"backbone.mine" = "mypackage.net:MyConfig"``), a user's own file by assignment (`gen.own`).
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from gen.errors import GenError

__all__ = [
    "KINDS",
    "PLACE",
    "check_choices",
    "config_class",
    "fingerprint",
    "from_json",
    "installed",
    "kind_of",
    "kinds",
    "members",
    "suggest",
    "to_json",
]

# metadata of the field of a data configuration that says where the data lie, and nothing of what they are
PLACE = types.MappingProxyType({"place": True})

# family -> kind -> "module:Class". A kind is unique over all families.
KINDS: dict[str, dict[str, str]] = {
    "process": {
        "linear": "gen.diffusion.process:Linear",
        "trigonometric": "gen.diffusion.process:Trigonometric",
        "trig-flow": "gen.diffusion.process:TrigFlow",
        "vp": "gen.diffusion.process:VP",
        "ddpm": "gen.diffusion.ddpm:DDPM",
        "ve": "gen.diffusion.process:VE",
        "edm": "gen.diffusion.process:EDM",
        "edm-family": "gen.diffusion.process:EDMFamily",
        "cosine-logsnr": "gen.diffusion.cosine:Cosine",
    },
    "denoiser": {
        "denoiser": "gen.diffusion.denoiser:Denoiser",
    },
    "students": {
        "students": "gen.sampling.router:Students",
    },
    "flow-map": {
        "flow-map": "gen.diffusion.flowmap:FlowMap",
    },
    "parameterization": {
        "predict": "gen.diffusion.denoiser:Predict",
        "edm-precondition": "gen.diffusion.denoiser:EDMPrecondition",
        "average-velocity": "gen.diffusion.flowmap:AverageVelocity",
        "jump": "gen.diffusion.flowmap:Jump",
        "consistency": "gen.diffusion.flowmap:Consistency",
        "diagonal": "gen.diffusion.flowmap:Diagonal",
        "data-prediction": "gen.diffusion.consistency_maps:DataPrediction",
        "trig-precondition": "gen.diffusion.consistency_maps:TrigPrecondition",
        "trig-velocity": "gen.diffusion.consistency_maps:TrigVelocity",
        "converted": "gen.diffusion.conversions:Converted",
        "data-and-noise": "gen.diffusion.conversions:DataAndNoise",
    },
    "objective": {
        "velocity-matching": "gen.diffusion.objectives:VelocityMatching",
        "ddpm-loss": "gen.diffusion.objectives:DDPMLoss",
        "edm-loss": "gen.diffusion.objectives:EDMLoss",
        "noise-matching": "gen.diffusion.transport:NoiseMatching",
        "time-sampler": "gen.diffusion.times:TimeSampler",
        "u-shaped": "gen.distill.rectified_flow:UShaped",
        "data-matching": "gen.diffusion.objectives:DataMatching",
        "min-snr-loss": "gen.diffusion.objectives:MinSNRLoss",
        "aligned-objective": "gen.diffusion.objectives:Aligned",
        "uncertain": "gen.diffusion.objectives:Uncertain",
    },
    "backbone": {
        "dit": "gen.diffusion.backbones.dit:DiTConfig",
        "lightningdit": "gen.diffusion.backbones.lightningdit:LightningDiTConfig",
        "aligned": "gen.diffusion.backbones.aligned:AlignedConfig",
        "lamamba": "gen.diffusion.backbones.lamamba:LaMambaConfig",
        "ascan": "gen.diffusion.backbones.ascan:AsCANConfig",
        "edm2": "gen.diffusion.backbones.edm2_unet:EDM2Config",
        "song-unet": "gen.diffusion.backbones.edm_unet:SongUNetConfig",
        "dhariwal-unet": "gen.diffusion.backbones.edm_unet:DhariwalUNetConfig",
    },
    "token-model": {
        "gpt": "gen.autoregressive.gpt:GPTConfig",
        "gpt-student": "gen.distill.gpt_student:GPTStudentConfig",
        "maskgit": "gen.autoregressive.maskgit:MaskGITConfig",
        "maskgit-skips": "gen.autoregressive.maskgit:MaskGITSkipConfig",
        "maskgen": "gen.autoregressive.maskgen:MaskGenConfig",
        "rar": "gen.autoregressive.rar:RARConfig",
        "var": "gen.autoregressive.var:VARConfig",
        "flextok-ar": "gen.autoregressive.flextok_ar:FlexTokARConfig",
        "instella-ar": "gen.autoregressive.instella_ar:InstellaARConfig",
        "binary-diffusion": "gen.autoregressive.binary_diffusion:BinaryDiffusion",
    },
    "latent-token-model": {
        "mar": "gen.autoregressive.mar:MARConfig",
        "maskgen-kl": "gen.autoregressive.maskgen_kl:MaskGenKLConfig",
    },
    "text-flow": {
        "flowtok": "gen.tokenizers.flowtok:FlowTokConfig",
        "text-projector": "gen.tokenizers.flowtok:TextProjectorConfig",
    },
    "caption-network": {
        "joint-trunk": "gen.autoregressive.joint:TrunkConfig",
        "caption": "gen.autoregressive.joint:TextConfig",
    },
    "bit-network": {
        "binary-transformer": "gen.autoregressive.binary_transformer:BinaryTransformerConfig",
        "instella-network": "gen.autoregressive.instella:InstellaDiffusionConfig",
    },
    "bit-process": {
        "bernoulli": "gen.autoregressive.bernoulli:Bernoulli",
    },
    "scale-schedule": {
        "constant-scale": "gen.autoregressive.decoding:ConstantScale",
        "linear-scale": "gen.autoregressive.decoding:LinearScale",
        "power-cosine-scale": "gen.autoregressive.decoding:PowerCosineScale",
        "ramp-scale": "gen.autoregressive.unmasking:RampScale",
        "risen-cosine-scale": "gen.autoregressive.unmasking:RisenCosineScale",
        "known-scale": "gen.autoregressive.infilling:KnownScale",
    },
    "conditioning": {
        "guided": "gen.diffusion.backbones.guided:GuidedConfig",
    },
    "grid": {
        "uniform": "gen.sampling.grids:Uniform",
        "karras": "gen.sampling.grids:Karras",
        "respaced": "gen.sampling.grids:Respaced",
        "explicit": "gen.sampling.grids:Explicit",
        "chain": "gen.sampling.grids:ChainLevels",
        "matched": "gen.sampling.grids:Matched",
        "snapped": "gen.sampling.grids:Snapped",
        "spaced": "gen.sampling.grids:Spaced",
    },
    "solver": {
        "euler": "gen.sampling.solvers:Euler",
        "heun": "gen.sampling.solvers:Heun",
        "ddim": "gen.sampling.solvers:DDIM",
        "ddpm-ancestral": "gen.sampling.solvers:Ancestral",
        "edm-stochastic": "gen.sampling.solvers:EDMStochastic",
        "renoise": "gen.sampling.solvers:Renoise",
        "dpm-solver": "gen.sampling.multistep:DPMSolver",
        "unipc": "gen.sampling.multistep:UniPC",
        "euler-maruyama": "gen.sampling.sde:EulerMaruyama",
        "runge-kutta": "gen.sampling.runge_kutta:RungeKutta",
        "anchored": "gen.sampling.student_solvers:Anchored",
        "backstep": "gen.sampling.student_solvers:Backstep",
    },
    "adaptive": {
        "dopri5": "gen.sampling.adaptive:Dopri5",
    },
    "head": {
        "conv-head": "gen.nn.adversarial:ConvHead",
        "token-head": "gen.nn.adversarial:TokenHead",
        "pooled-head": "gen.nn.adversarial:PooledHead",
        "heads": "gen.nn.adversarial:Heads",
    },
    "discriminator": {
        "patchgan": "gen.nn.discriminators:PatchGAN",
        "titok-discriminator": "gen.nn.discriminators:TiTokDiscriminator",
        "stylegan": "gen.nn.discriminators:StyleGAN",
        "token-discriminator": "gen.nn.token_discriminator:TokenDiscriminator",
        "encoder-tokens": "gen.tokenizers.losses:EncoderTokens",
    },
    "regulariser": {
        "approximate-r1": "gen.distill.discriminator:ApproximateR1",
        "ratio-bins": "gen.distill.f_distill:RatioBins",
    },
    "image-term": {
        "lpips": "gen.tokenizers.losses:LPIPS",
        "feature-term": "gen.tokenizers.losses:FeatureTerm",
        "lite-maps": "gen.tokenizers.losses:LiteMaps",
    },
    "guidance": {
        "cfg": "gen.sampling.guidance:ClassifierFree",
        "apg": "gen.sampling.guidance:AdaptiveProjected",
        "cfg-zero-star": "gen.sampling.guidance:ZeroStar",
        "autoguidance": "gen.sampling.guidance:Autoguidance",
        "interval": "gen.sampling.guidance:Interval",
        "clip-denoised": "gen.sampling.guidance:Clip",
        "chained": "gen.sampling.guidance:Chained",
    },
    "generator": {
        "diffusion-generator": "gen.sampling.generator:DiffusionGenerator",
        "adaptive-generator": "gen.sampling.adaptive:AdaptiveGenerator",
        "flow-map-generator": "gen.sampling.flowmaps:FlowMapGenerator",
        "routed-generator": "gen.sampling.router:RoutedGenerator",
        "one-step-generator": "gen.sampling.generator:OneStepGenerator",
        "token-generator": "gen.autoregressive.generator:TokenGenerator",
        "latent-token-generator": "gen.autoregressive.infilling:LatentTokenGenerator",
        "flowtok-generator": "gen.tokenizers.flowtok_sampling:FlowTokGenerator",
    },
    "sampler": {
        "sampler": "gen.sampling.generator:Sampler",
        "few-steps": "gen.sampling.generator:FewSteps",
        "noise-decoding": "gen.distill.noise_decoder:NoiseDecoding",
        "routed": "gen.sampling.router:Routed",
        "flow-map-sampler": "gen.sampling.flowmaps:FlowMapSampler",
        "adaptive-sampler": "gen.sampling.adaptive:AdaptiveSampler",
        "token-sampler": "gen.autoregressive.sampler:TokenSampler",
        "masked-sampler": "gen.autoregressive.unmasking:MaskedSampler",
        "infilling-sampler": "gen.autoregressive.infilling:InfillingSampler",
        "flowtok-sampler": "gen.tokenizers.flowtok_sampling:FlowTokSampler",
        "scale-sampler": "gen.autoregressive.scales:ScaleSampler",
        "bit-sampler": "gen.autoregressive.bits:BitSampler",
        "binary-sampler": "gen.autoregressive.binary_sampler:BinarySampler",
    },
    "tokenizer": {
        "titok": "gen.tokenizers.titok:TiTokConfig",
        "kl-vae": "gen.tokenizers.kl_vae:KLVAEConfig",
        "vitok": "gen.tokenizers.vitok:ViTokConfig",
        "detok": "gen.tokenizers.detok:DeTokConfig",
        "rae": "gen.tokenizers.rae:RAEConfig",
        "flowtitok": "gen.tokenizers.flowtitok:FlowTiTokConfig",
        "code-vectors": "gen.tokenizers.code_vectors:CodeVectors",
        "vqgan": "gen.tokenizers.vqgan:VQGANConfig",
        "maskgit-vqgan": "gen.tokenizers.maskgit_vqgan:MaskGITVQGANConfig",
        "binary-autoencoder": "gen.tokenizers.binary:BinaryAutoencoderConfig",
        "instella": "gen.tokenizers.instella:InstellaConfig",
        "var-vqvae": "gen.tokenizers.var_vqvae:VARVQVAEConfig",
        "flextok": "gen.tokenizers.flextok:FlexTokConfig",
    },
    "quantizer": {
        "vq": "gen.tokenizers.quantizers.vq:VQ",
        "lfq": "gen.tokenizers.quantizers.lfq:LFQ",
        "bsq": "gen.tokenizers.quantizers.lfq:BSQ",
        "binary": "gen.tokenizers.quantizers.binary:Binary",
        "fsq": "gen.tokenizers.quantizers.fsq:FSQ",
    },
    "corruption": {
        "latent-noise": "gen.tokenizers.rae:LatentNoise",
        "latent-denoising": "gen.tokenizers.detok:LatentDenoising",
    },
    "run": {
        "run": "gen.training.run:RunConfig",
        "engine": "gen.training.run:EngineConfig",
        "stage": "gen.training.task:Stage",
        "model": "gen.training.task:Model",
        "mesh": "gen.training.sharding:MeshConfig",
    },
    "optimizer": {
        "adamw": "gen.training.optim:OptimConfig",
    },
    "ema": {
        "ema-constant": "gen.training.ema:Constant",
        "ema-halflife": "gen.training.ema:HalfLife",
        "ema-power": "gen.training.ema:PowerFunction",
    },
    "evaluation": {
        "protocol": "gen.metrics.protocol:Protocol",
        "result": "gen.metrics.protocol:Result",
    },
    "data": {
        "digits": "gen.data.sources:Digits",
        "cache": "gen.data.caches:Cache",
        "token-cache": "gen.data.caches:TokenCache",
        "bit-cache": "gen.data.caches:BitCache",
        "records": "gen.sampling.records:Records",
        "images": "gen.data.images:Images",
        "alongside": "gen.data.alongside:Alongside",
        "partitioned": "gen.data.partitioned:Partitioned",
        "arrays": "gen.data.images:Arrays",
        "zipped": "gen.data.images:Zipped",
        "latent-shards": "gen.pretrained.latent_shards:LatentShards",
        "random": "gen.data.random:Random",
    },
    "augmentation": {
        "random-affine": "gen.data.augment:RandomAffine",
        "edm-augment": "gen.data.edm_augment:EDMAugment",
    },
    "extractor": {  # the first that fits and has its weights is taken where none is named
        "digits-extractor": "gen.features.digits:DigitsExtractor",
        "inception": "gen.features.inception:Inception",
        "lite": "gen.features.efficientnet_lite:EfficientNetLite",
        "dinov2": "gen.features.dinov2:DINOv2Extractor",
        "clip": "gen.features.clip:CLIPExtractor",
        "convnext": "gen.features.convnext:ConvNeXt",
        "resnet": "gen.features.resnet:ResNet",
    },
    "task": {
        "tokenizer-task": "gen.tokenizers.train:TokenizerTask",
        "adversarial-tokenizer-task": "gen.tokenizers.adversarial:AdversarialTask",
        "proxy-task": "gen.tokenizers.proxy:ProxyTask",
        "vavae-task": "gen.tokenizers.vavae:VAVAETask",
        "flextok-task": "gen.tokenizers.flextok_train:FlexTokTask",
        "denoiser-task": "gen.diffusion.train:DenoiserTask",
        "token-task": "gen.autoregressive.train:TokenTask",
        "latent-token-task": "gen.autoregressive.train_latents:LatentTokenTask",
        "flowtok-task": "gen.tokenizers.flowtok_train:FlowTokTask",
        "kd-task": "gen.distill.kd:KDTask",
        "distilled-decoding-task": "gen.distill.distilled_decoding:DistilledDecodingTask",
        "dmd2-task": "gen.distill.dmd2:DMD2Task",
        "consistency-task": "gen.distill.consistency:ConsistencyTask",
        "consistency-distillation-task": "gen.distill.consistency:ConsistencyDistillationTask",
        "truncated-task": "gen.distill.consistency:TruncatedTask",
        "scm-task": "gen.distill.scm:SCMTask",
        "scd-task": "gen.distill.scm:SCDTask",
        "ctm-task": "gen.distill.ctm:CTMTask",
        "meanflow-task": "gen.diffusion.meanflow:MeanFlowTask",
        "shortcut-task": "gen.diffusion.shortcut:ShortcutTask",
        "reflow-task": "gen.distill.rectified_flow:ReflowTask",
        "annealing-reflow-task": "gen.distill.slimflow:AnnealingReflowTask",
        "flow-guided-task": "gen.distill.slimflow:FlowGuidedTask",
        "guided-task": "gen.distill.guided_distillation:GuidedTask",
        "progressive-task": "gen.distill.progressive_distillation:ProgressiveTask",
        "f-distill-task": "gen.distill.f_distill:FDistillTask",
        "ladd-task": "gen.distill.ladd:LADDTask",
        "score-matching-task": "gen.distill.multi_student:ScoreMatchingTask",
        "ddo-task": "gen.finetune.ddo:DDOTask",
        "multi-student-task": "gen.distill.multi_student:MultiStudentTask",
    },
    "pair-law": {
        "grid-pairs": "gen.distill.pairs:GridPairs",
        "shrinking-pairs": "gen.distill.pairs:ShrinkingPairs",
        "log-levels": "gen.distill.pairs:LogLevels",
        "fixed-grid": "gen.distill.pairs:Fixed",
        "progressive-grid": "gen.distill.pairs:Progressive",
        "doubling-grid": "gen.distill.pairs:Doubling",
    },
    "distance": {
        "norm": "gen.distill.distances:Norm",
        "pseudo-huber": "gen.distill.distances:PseudoHuber",
        "perceptual": "gen.distill.distances:Perceptual",
    },
}


def kinds() -> dict[str, str]:
    """Gives all registered kinds: kind -> "module:Class". Imports nothing."""
    return {kind: target for family in (*KINDS.values(), *installed().values()) for kind, target in family.items()}


def members(family: str) -> dict[str, str]:
    """Gives the kinds of one family: kind -> "module:Class". Imports nothing."""
    return KINDS[family] | installed().get(family, {})


@functools.cache
def installed() -> dict[str, dict[str, str]]:
    """Kinds of installed packages: family -> kind -> "module:Class", from their entry points; imports none of them.

    Raises GenError for an entry point that is not called FAMILY.KIND, and for a kind that exists already.
    """
    found: dict[str, dict[str, str]] = {}
    for point in importlib.metadata.entry_points(group="gen.kinds"):
        family, _, kind = point.name.partition(".")
        source = f"the entry point '{point.name}' of {point.dist.name if point.dist else 'an installed package'}"
        if family not in KINDS or not kind:
            raise GenError(f"{source} is not called FAMILY.KIND; {suggest(family, KINDS)}")
        if any(kind in rows for rows in (*KINDS.values(), *found.values())):
            raise GenError(f"{source} gives the kind '{kind}' a second meaning; uninstall the package or rename it")
        found.setdefault(family, {})[kind] = point.value
    return found


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """Gives a clause for an error message that names the closest known name, or the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def config_class(kind: str) -> type:
    """Gives the dataclass registered as `kind`; imports its module. Raises GenError for an unknown kind."""
    table = kinds()
    if kind not in table:
        raise GenError(
            f"unknown kind '{kind}' in a configuration; {suggest(kind, table)} (a kind of your own: --module FILE)"
        )
    module, _, name = table[kind].partition(":")
    return typing.cast(type, getattr(importlib.import_module(module), name))


def kind_of(cls: type) -> str | None:
    """Gives the kind under which `cls` is registered, or None."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((kind for kind, where in kinds().items() if where == target), None)


def to_json(value: Any, *, places: bool = True) -> Any:
    """Gives a configuration as plain JSON values; registered dataclasses carry their ``kind``.

    Args:
      value: the configuration.
      places: whether it says where data lie. False leaves out the fields marked `PLACE`: a folder that was moved or
        copied holds the same data, which the data's own ``identity()`` tells.

    Raises TypeError for a value that has no JSON form (arrays, functions): configurations hold numbers,
    strings and other configurations only.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = kind_of(type(value))
        if "kind" in (f.name for f in dataclasses.fields(value)):
            raise TypeError(f"{type(value).__name__} has a field 'kind', the name of the tag; rename the field")
        head = {"kind": kind} if kind else {}
        fields = [f for f in dataclasses.fields(value) if f.init and (places or "place" not in f.metadata)]
        return head | {f.name: to_json(getattr(value, f.name), places=places) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v, places=places) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v, places=places) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} does not belong in a configuration")


def from_json(data: Any, expected: Any = Any, where: str = "config") -> Any:
    """Rebuilds what `to_json` wrote, checked against the type annotation `expected`.

    `where` names the position for error messages. Lists become tuples where the annotation says so, ints
    become floats where a float is expected. Raises GenError for an unknown key, a missing key, an unknown
    kind or a value of the wrong type.
    """
    if isinstance(data, Mapping) and "kind" in data:
        cls = config_class(str(data["kind"]))
        _check_member(cls, expected, where)
        return _build(cls, {k: v for k, v in data.items() if k != "kind"}, where)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        errors: list[str] = []
        for option in args:
            try:
                return from_json(data, option, where)
            except GenError as error:
                errors.append(str(error))
        raise GenError(errors[0] if len(errors) == 1 else "; or ".join(dict.fromkeys(errors)))
    if origin is typing.Literal:
        if data in args:
            return data
        raise GenError(f"{where} is {data!r}; expected one of {', '.join(map(repr, args))}")
    if origin in (tuple, list):
        if not isinstance(data, list | tuple):
            raise GenError(f"{where} is {data!r}; expected a list")
        variadic = origin is list or (len(args) == 2 and args[1] is Ellipsis)
        types_ = [args[0]] * len(data) if args and variadic else list(args) or [Any] * len(data)
        if len(types_) != len(data):
            raise GenError(f"{where} has {len(data)} entries; expected {len(types_)}")
        return origin(from_json(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(data, types_, strict=True)))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise GenError(f"{where} is {data!r}; expected an object")
        return {k: from_json(v, args[1] if args else Any, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(data, Mapping):
            raise GenError(f"{where} is {data!r}; expected an object")
        return _build(expected, data, where)
    return _scalar(data, expected, where)


def _check_member(cls: type, expected: Any, where: str) -> None:
    options = typing.get_args(expected) or (expected,)
    concrete = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    all_concrete = concrete and len(concrete) == len([o for o in options if o is not type(None)])
    if all_concrete and not any(issubclass(cls, o) for o in concrete):
        names = " or ".join(o.__name__ for o in concrete)
        raise GenError(f"{where} is a {cls.__name__}; expected {names}")


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise GenError(f"{where} has an unknown key '{key}' for {cls.__name__}; {suggest(key, fields)}")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in data and (field.default, field.default_factory) == required:
            raise GenError(f"{where} lacks the key '{name}' that {cls.__name__} requires; add it")
    return cls(**{k: from_json(v, hints[k], f"{where}.{k}") for k, v in data.items()})


def _scalar(data: Any, expected: Any, where: str) -> Any:
    if expected is Any or not isinstance(expected, type) or getattr(expected, "_is_protocol", False):
        return tuple(data) if isinstance(data, list) else data
    if expected is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if expected is type(None) and data is None:
        return None
    if isinstance(data, expected) and not (isinstance(data, bool) and expected in (int, float)):
        return data
    raise GenError(f"{where} is {data!r}; expected {expected.__name__}")


def check_choices(config: Any) -> None:
    """Raises GenError where a field of a dataclass that is annotated by a Literal holds none of its values."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            from_json(getattr(config, name), hint, f"{type(config).__name__}'s {name}")


def fingerprint(value: Any) -> str:
    """Gives the SHA-256 (16 hex digits) of a configuration's canonical JSON: equal configurations, equal text."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
