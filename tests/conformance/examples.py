"""An example of every registered member, made from the names and types of its fields.

A member whose fields have defaults is its own example; required fields are filled by what their names mean in the
project's vocabulary (`VOCABULARY`). So a newly registered class joins the suites without being named here; one that
needs a word of its own fails `test_every_member_has_an_example` until the word is explained.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from gen.autoregressive.gpt import GPTConfig
from gen.autoregressive.infilling import InfillingSampler
from gen.autoregressive.mar import MARConfig
from gen.autoregressive.sampler import TokenSampler
from gen.autoregressive.var import VARConfig
from gen.config import config_class
from gen.data.caches import seal, seal_bits, seal_tokens
from gen.data.sources import Digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.guided import GuidedConfig
from gen.diffusion.consistency_maps import data_map, trig_map
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.flowmap import AverageVelocity, Consistency, FlowMap, jump_map
from gen.diffusion.process import EDM, Linear
from gen.distill.discriminator import ApproximateR1
from gen.distill.dmd2 import DMD2Task
from gen.distill.f_distill import RatioBins
from gen.distill.gpt_student import GPTStudentConfig
from gen.distill.noise_decoder import NoiseDecoding
from gen.errors import GenError
from gen.features.vit import ViTConfig
from gen.finetune.difffit import DiffFit
from gen.finetune.probes import LinearHead
from gen.kinds import KINDS
from gen.nn.adversarial import TokenLogits
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network, Params
from gen.sampling.records import make_records
from gen.sampling.router import Students
from gen.tokenizers.binary import BinaryAutoencoderConfig
from gen.tokenizers.flextok import FlexTokConfig, Pixels, euler_apg
from gen.tokenizers.flowtok import FlowTokConfig, TextProjectorConfig
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.var_vqvae import VARVQVAEConfig
from gen.tokenizers.vavae import VisionFoundation
from gen.tokenizers.vqgan import VQGANConfig
from gen.training.optim import OptimConfig
from tests.conformance.tokenizers import Codebook, Patches
from tests.data import files
from tests.distill.tiny import Tiny

SHAPE, CLASSES = (4, 3), 3
NETWORK = Tiny(channels=SHAPE[-1], classes=CLASSES)
TWO_TIMES = dataclasses.replace(NETWORK, times=2)
DENOISER = Denoiser(NETWORK, Linear(), Predict("velocity"))
# A large epsilon: Adam would blow up the rounding of gradients that are zero in exact arithmetic.
OPTIM = OptimConfig(lr=1e-3, eps=1e-2)
TOKENIZER = Patches(SHAPE[-1])
WRITER = GPTConfig((2, 2), 8, 16, 1, 2, 16, num_classes=CLASSES, scan=False)
FILLER = MARConfig(
    shape=SHAPE, num_classes=CLASSES, width=16, depth=1, heads=2, buffer=1, head_width=16, head_depth=1, scan=False
)
FLOWTOK = FlowTokConfig(
    TextProjectorConfig((SHAPE[0], 8), SHAPE[1], 1, 2, 8, 8), DiTConfig(SHAPE[:1], SHAPE[1], 1, 16, 1, 2, num_classes=1)
)
FLEXTOK = FlexTokConfig(
    first=Pixels((8, 8, 1)),
    tokens=4,
    encoder=Tower(16, 1, 4),
    decoder=Tower(16, 1, 4),
    quantizer=FSQ((5, 5)),
    length=4,
    frequencies=16,
    max_time=1.0,
    decoding=euler_apg(2.0, 1.0, 2),
    remat="none",
    scan=False,
)
VOCABULARY: dict[str, Any] = {
    "network": NETWORK,
    "process": Linear(),
    "denoiser": DENOISER,
    "teacher": DENOISER,
    "students": Students(DENOISER, (0, 0, 1)),
    "flow_map": FlowMap(NETWORK, EDM(), Consistency()),
    "tokenizer": TOKENIZER,
    "discrete": Codebook(),
    "model": WRITER,
    "latent_model": FILLER,
    "config": FLOWTOK,
    "sampler": TokenSampler(),
    "discriminator": PatchGAN(channels=1, width=4, layers=1),
    "parts": (Digits("train"),),
    "maker": "a teacher",
    "vocabulary": 8,  # of a quantizer's codes
    "width": 3,
}
ENCODER = ViTConfig(size=4, patch=1, width=8, depth=1, heads=1, hidden=8)
PROXY = MaskGITVQGANConfig((8, 8, 1), 4, (1, 1, 1), 1, VQ(8, 3), groups=2)
# tokenizers whose own example, of published size, takes long to trace; their presets have tests of their own
SMALL: dict[str, Any] = {
    "kl-vae": KLVAEConfig((8, 8, 1), 4, (1, 2), 1, 3, 3, groups=2),
    "vqgan": VQGANConfig((8, 8, 1), VQ(16, 3, normalize=True), 8, (1, 2), (2, 1), 1, 4, groups=4),
    "var-vqvae": VARVQVAEConfig((8, 8, 1), Residual(16, 3, (1, 2, 4)), 8, (1, 2), (), 1, 4, groups=4),
    "binary-autoencoder": BinaryAutoencoderConfig((8, 8, 1), Binary(6), 8, (1, 2), 1, 1, 8, (1,), groups=4),
    "maskgit-vqgan": PROXY,
    "flextok": FLEXTOK,
}
CODES = TiTokConfig((8, 8, 1), 4, 4, None, Tower(16, 1, 4), Tower(16, 1, 4), quantizer=VQ(8, 3), scan=False)
# words that mean something else to one kind
OWN: dict[str, dict[str, Any]] = {
    "proxy-task": {"tokenizer": dataclasses.replace(CODES, pixels=PROXY)},
    "flextok-task": {"tokenizer": FLEXTOK},
    "patch-vq": {"image": (8, 8, 1), "patch": 4, "quantizer": VQ(8, 16)},
    "consistency-distillation-task": {"flow_map": data_map(DENOISER)},
    "distilled-decoding-task": {
        "teacher": WRITER,
        "tokenizer": CODES,
        "student": GPTStudentConfig(WRITER, SHAPE[-1]),
    },
    "conditional-score-task": {
        "teacher": WRITER,
        "tokenizer": CODES,
        "student": GPTStudentConfig(WRITER, SHAPE[-1]),
        "head_width": 8,
        "head_depth": 1,
        "ratio": 2,
    },
    "token-ddo-task": {"teacher": WRITER},
    "scm-task": {"flow_map": trig_map(DENOISER)},
    "scd-task": {"flow_map": trig_map(DENOISER)},
    "ctm-task": {"flow_map": jump_map(DENOISER), "last_layer": "outer/kernel"},
    "noise-decoder": {"student": GPTStudentConfig(WRITER, SHAPE[-1]), "tokenizer": CODES, "sampler": NoiseDecoding()},
    "gpt-student": {"of": WRITER, "channels": SHAPE[-1]},
    "var-student": {"of": VARConfig(Residual(8, SHAPE[-1], (1, 2)), CLASSES, 16, 1, 2, 32, scan=False)},
    "latent-token-generator": {"sampler": InfillingSampler(2, 3)},
    "random": {"shapes": {"latent": (4, 3), "label": ()}},
    "meanflow-task": {"flow_map": FlowMap(TWO_TIMES, Linear())},
    "shortcut-task": {"flow_map": FlowMap(TWO_TIMES, Linear(), AverageVelocity("halvings"))},
    "guided-task": {"student": Denoiser(GuidedConfig(TWO_TIMES), Linear(), Predict("velocity"))},
    "f-distill-task": {"head": TokenLogits(16, 8), "taps": ("hidden",), "bins": RatioBins()},
    "ladd-task": {"head": TokenLogits(16, 8), "taps": ("hidden",), "r1": ApproximateR1()},
    "multi-student-task": {
        "task": DMD2Task(teacher=DENOISER, optim=OPTIM, fake_optim=OPTIM, ratio=3),
        "partition": (0, 0, 1),
    },
    "adapt-task": {"adapter": DiffFit(scales=("inner",))},
    "probe-task": {"head": LinearHead((4, 16), 3), "taps": ("hidden",), "times": (0.5,)},
    "alongside": {"data": Digits("train"), "other": Digits("test")},
    "partitioned": {"data": Digits("train"), "partition": (0,) * 5 + (1,) * 5},
    "vavae-task": {
        "tokenizer": KLVAEConfig((8, 8, 1), 4, (1, 2), 1, 3, 3, groups=2, middle_attention=False),
        "alignment": VisionFoundation(ENCODER),
    },
}
# tasks that differ from a quick one in a term, compile two networks, or have tests of their own
SLOW = (
    "adapt-task",
    "annealing-reflow-task",
    "conditional-score-task",
    "consistency-task",
    "ddo-task",
    "distilled-decoding-task",
    "f-distill-task",
    "flextok-task",
    "flowtok-task",
    "ladd-task",
    "latent-token-task",
    "multi-student-task",
    "probe-task",
    "proxy-task",
    "scm-task",
    "score-matching-task",
    "token-ddo-task",
    "truncated-task",
    "vavae-task",
)
TAUGHT_BY_A_WRITER = ("distilled-decoding-task", "conditional-score-task", "token-ddo-task")
DIVIDED = ("multi-student-task",)  # whose batches hold the classes of one part after those of another
TOKENIZERS = {
    "toy-codebook": "tests.conformance.tokenizers:Codebook",
    "toy-drawn": "tests.conformance.tokenizers:Drawn",
    "toy-patches": "tests.conformance.tokenizers:Patches",
}
KINDS_HERE = {
    "conformance-rows": f"{__name__}:Rows",
    "tiny": "tests.distill.tiny:Tiny",
    "toy-steps": "tests.conformance.tokenizers:Steps",
    **TOKENIZERS,
}


def required(cls: type) -> list[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def example(kind: str, **words: Any) -> Any:
    """The example of a registered kind; `words` add to the vocabulary. KeyError names the word that is missing."""
    cls, own = config_class(kind), OWN.get(kind, {})
    known = VOCABULARY | own | words
    return cls(**{name: known[name] for name in dict.fromkeys((*required(cls), *own))})


def task(kind: str) -> Any:
    """The example of a task, its optimisers made insensitive to rounding."""
    found = example(kind)
    optims = {f.name: OPTIM for f in dataclasses.fields(found) if isinstance(getattr(found, f.name), OptimConfig)}
    return dataclasses.replace(found, **optims)


@functools.cache
def frozen(kind: str) -> Mapping[str, Params]:
    """Arrays by role, for tasks that need a teacher, an encoder to be aligned with, or a tokenizer's codes."""
    teacher = WRITER if kind in TAUGHT_BY_A_WRITER else NETWORK
    networks = {"teacher": teacher, "encoder": ENCODER, "proxy": PROXY, "tokenizer": CODES}
    return {role: jax.jit(Network(config).init)(jax.random.key(7)) for role, config in networks.items()}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Everything a task may ask for, from (seed, step, row) alone: image, latent, noise, label, tokens, text, fakes.

    Attributes:
      divided: the first half of a batch holds the first two classes, the second half the last.
    """

    divided: bool = False

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        step, part = start, slice(process * batch // processes, (process + 1) * batch // processes)
        while True:
            rng = np.random.default_rng((seed, step))
            latent, noise = rng.normal(size=(2, batch, *SHAPE)).astype(np.float32)
            image = rng.integers(0, 256, (batch, 8, 8, 1), np.uint8)
            label = np.arange(batch, dtype=np.int32) % CLASSES
            if self.divided:
                label = np.where(np.arange(batch) < batch // 2, label % 2, 2).astype(np.int32)
            tokens = rng.integers(0, 8, (batch, 2, 2)).astype(np.int32)
            rows = {
                "image": image,
                "latent": latent,
                "noise": noise,
                "label": label,
                "tokens": tokens,
                "text": rng.normal(size=(batch, SHAPE[0], 8)).astype(np.float32),
                "fake_latent": noise,
                "fake_tokens": (tokens + label[:, None, None]) % 8,
                "fake_label": label,
            }
            yield {name: value[part] for name, value in rows.items()}
            step += 1

    def identity(self) -> str:
        return "rows"


def rows(kind: str) -> Rows:
    """Data for the example of a task."""
    return Rows(kind in DIVIDED)


def build(kind: str) -> tuple[Any, Any, Any]:
    """(task, data, frozen) in a fresh process."""
    KINDS["conformance"] = KINDS_HERE
    return task(kind), rows(kind), frozen(kind)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a teacher of nothing makes: noise and its half."""

    identity = "drawn"

    def __call__(self, params: Any, keys: jax.Array, cond: Any) -> dict[str, jax.Array]:
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        return {"noise": noise, "sample": 0.5 * noise}


def stores(folder: Path) -> list[str]:
    """Small data sets of 12 rows in every layout that a source may read, as paths."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(12, 4, 4, 2)).astype(np.float32)
    cache = folder / "cache"
    cache.mkdir(parents=True)
    np.save(cache / "latent.npy", latents)
    np.save(cache / "label.npy", np.arange(12, dtype=np.int32) % 3)
    seal(cache, tokenizer="none", data="none")
    ids = rng.integers(0, 2, size=(12, 4, 3))
    for name, kind in (("tokens", np.int32), ("bits", np.uint8)):
        (folder / name).mkdir()
        np.save(folder / name / f"{name}.npy", ids.astype(kind))
    seal_tokens(folder / "tokens", vocabulary=2, tokenizer="none", data="none")
    seal_bits(folder / "bits", tokenizer="none", data="none")
    shards = folder / "shards"
    shards.mkdir()
    rows = {"latents": latents, "latents_flip": latents[:, :, ::-1].copy(), "labels": np.arange(12) % 3}
    save_file(rows, shards / "latents_rank00_shard000.safetensors")
    labels = {"label": np.arange(12, dtype=np.int32) % 3}
    make_records(Drawn(), {}, folder / "records", count=12, maker="a teacher", cond=labels, label="")
    members = {}
    for i in range(12):
        members |= {f"{i:05d}.png": files.png(files.picture(i)), f"{i:05d}.cls": str(i % 3).encode()}
    names = [[f"00000/img{i:08d}.png", i % 3] for i in range(12)]
    np.savez(folder / "rows.npz", image=rng.integers(0, 256, (12, 8, 8, 3), np.uint8), label=np.arange(12) % 3)
    found = [
        cache,
        shards,
        folder / "records",
        folder / "tokens",
        folder / "bits",
        files.folder(folder / "folder", 12, 3),
        files.edm_zip(folder / "images.zip", names, 12),
        files.tar(folder / "images.tar", members),
        folder / "rows.npz",
    ]
    return [str(path) for path in found]


def sources(kind: str, folder: Path) -> list[Any]:
    """Data of a registered kind: one for each store that it reads."""
    if "path" not in required(config_class(kind)):
        return [example(kind)]
    found = []
    for path in stores(folder):
        try:
            data = example(kind, path=path)
            data.source()
        except GenError:
            continue
        found.append(data)
    return found
