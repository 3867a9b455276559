"""Which presets are compiled for which devices, and what is expected of the traffic between them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gen.experiments import presets
from gen.experiments.compare_distillers import METHODS

__all__ = ["CASES", "Case", "expected_traffic", "sized"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One preset on one target.

    Attributes:
      preset, target: by name.
      mesh: axis sizes other than 1.
      batch: global; small enough for the target.
      teacher, tokenizer: presets that give the shapes of those that it needs.
      fused: whether its attention must be a fused kernel's there.
      quick: whether memory and traffic alone are asked for (`gen compile --quick`).
    """

    preset: str
    target: str
    mesh: str
    batch: int
    teacher: str | None = None
    tokenizer: str | None = None
    fused: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """As it stands in recorded.json."""
        return f"{self.preset} {self.target} {self.mesh} batch {self.batch}{' quick' if self.quick else ''}"


_WHOLE = ("dit-b2", "dit-xl2", "sit-b2", "lightningdit-xl1")


def _pair(
    preset: str, slice_: str, mesh: str, each: int, *, alone: int | None = None, cut: bool = True, **inputs: Any
) -> list[Case]:
    """A preset on a TPU slice and on one H200, with `each` and `alone` images a device.

    On the slice memory and traffic alone are asked for, but for presets whose estimated step is a promise (`_WHOLE`).
    """
    devices = math.prod(map(int, slice_.partition(":")[2].split("x")))
    there = Case(preset, slice_, mesh, each * devices, **inputs, quick=preset not in _WHOLE)
    return [there, Case(preset, "h200", "data=1", alone or each, **inputs, fused=cut)]


_CASES = [
    _pair("dit-b2", "v5e:2x2", "data=4", 64),
    _pair("dit-xl2", "v5e:8x8", "data=8,fsdp=8", 16, alone=32),
    _pair("sit-b2", "v5e:2x2", "data=4", 64),
    _pair("sit-xl2", "v5e:8x8", "data=8,fsdp=8", 16, alone=32),
    _pair("repa-xl2", "v5e:8x8", "data=8,fsdp=8", 16, alone=32),
    _pair("lightningdit-b1", "v5e:2x4", "data=8", 32, alone=128),
    _pair("lightningdit-xl1", "v5e:2x4", "data=1,fsdp=8", 8, alone=32),
    _pair("lightningdit-xl1-long", "v5e:2x4", "data=1,fsdp=8", 8, alone=32),
    _pair("lamamba-b", "v5e:2x4", "data=8", 8, cut=False),
    _pair("lamamba-xl", "v5e:8x8", "data=8,fsdp=8", 4, cut=False),
    _pair("ascan-b", "v5e:2x4", "data=8", 16, cut=False),
    _pair("ascan-l", "v5e:2x4", "data=1,fsdp=8", 8, cut=False),
    _pair("edm-cifar10", "v5e:2x4", "data=8", 64, cut=False),
    _pair("edm-cifar10-cond", "v5e:2x4", "data=8", 64, cut=False),
    _pair("edm-cifar10-ncsnpp", "v5e:2x4", "data=8", 64, cut=False),
    _pair("edm-cifar10-gpu", "v5e:2x4", "data=8", 64, cut=False),
    _pair("edm-ffhq64", "v5e:2x4", "data=8", 32, cut=False),
    _pair("edm-afhqv2-64", "v5e:2x4", "data=8", 32, cut=False),
    _pair("edm-imagenet64", "v5e:2x4", "data=1,fsdp=8", 16, cut=False),
    _pair("edm2-xs-512", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("edm2-s-512", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("edm2-s-64", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("edm2-xxl-512", "v5e:8x8", "data=8,fsdp=8", 2, alone=16, cut=False),
    _pair("vavae-f16d32", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("vavae-f16d32-mae", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("vavae-f16d32-long", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("vavae-ldm-f16d32", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("vavae-one-gpu", "v5e:2x4", "data=8", 4, alone=32, cut=False),
    _pair("rae-xl", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("rae-one-gpu", "v5e:2x4", "data=8", 16, alone=128, cut=False),
    _pair("detok-bb", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("detok-one-gpu", "v5e:2x4", "data=8", 32, alone=256, cut=False),
    _pair("vitok-s-b-16", "v5e:2x4", "data=8", 32, alone=128, cut=False),
    _pair("vitok-s-l-16", "v5e:2x4", "data=1,fsdp=8", 8, alone=64, cut=False),
    _pair("vitok-one-gpu", "v5e:2x4", "data=8", 32, alone=128, cut=False),
    _pair("flowtok-tokenizer", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("flowtok-one-gpu", "v5e:2x4", "data=8", 16, alone=128, cut=False),
    _pair("binary-ae-c64", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("binary-ae-c128", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("binary-ae-one-gpu", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("llamagen-vq16", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("llamagen-vq8", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("var-vqvae", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("vqgan-one-gpu", "v5e:2x4", "data=8", 4, alone=32, cut=False),
    _pair("instella-tokenizer", "v5e:2x4", "data=1,fsdp=8", 4, alone=32, cut=False),
    _pair("titok-proxy", "v5e:2x4", "data=8", 8, alone=32, cut=False),
    _pair("titok-l32", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False, tokenizer="titok-proxy"),
    _pair("titok-b64", "v5e:2x4", "data=8", 8, alone=64, cut=False, tokenizer="titok-proxy"),
    _pair("titok-s128", "v5e:2x4", "data=8", 32, alone=64, cut=False, tokenizer="titok-proxy"),
    _pair("titok-bl64-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-bl128-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-sl256-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-ll32-vae", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-bl64-vae", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-bl128-vae", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("titok-one-gpu", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("ta-titok-bl32-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("ta-titok-bl64-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("ta-titok-bl128-vq", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("ta-titok-bl32-kl", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("ta-titok-bl64-kl", "v5e:2x4", "data=1,fsdp=8", 4, alone=32, cut=False),
    _pair("ta-titok-sl128-kl", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("ta-titok-one-gpu", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("flextok-vae-c16", "v5e:2x4", "data=8", 4, alone=16, cut=False),
    _pair("flextok-d12-d12", "v5e:2x4", "data=8", 8, alone=64, cut=False, tokenizer="flextok-vae-c16"),
    _pair("flextok-d18-d18", "v5e:2x4", "data=1,fsdp=8", 4, alone=32, cut=False, tokenizer="flextok-vae-c16"),
    _pair("flextok-d18-d28", "v5e:8x8", "data=8,fsdp=8", 4, alone=16, cut=False, tokenizer="flextok-vae-c16"),
    _pair("llamagen-b", "v5e:2x4", "data=8", 32, alone=128, cut=False),
    _pair("llamagen-l", "v5e:2x4", "data=1,fsdp=8", 32, alone=128, cut=False),
    _pair("llamagen-xl-384", "v5e:8x8", "data=8,fsdp=8", 4, alone=32, cut=False),
    _pair("llamagen-t2i-xl", "v5e:8x8", "data=8,fsdp=8", 4, alone=32, cut=False),
    _pair("rar-b", "v5e:8x8", "data=8,fsdp=8", 32, alone=64, cut=False),
    _pair("rar-xl", "v5e:8x8", "data=8,fsdp=8", 16, alone=32, cut=False),
    _pair("rar-one-gpu", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("maskgit-l32", "v5e:2x4", "data=8", 64, alone=256, cut=False),
    _pair("maskgit-b64", "v5e:2x4", "data=8", 64, alone=256, cut=False),
    _pair("maskgit-s128", "v5e:2x4", "data=1,fsdp=8", 32, alone=128, cut=False),
    _pair("maskgit-one-gpu", "v5e:2x4", "data=8", 64, alone=512, cut=False),
    _pair("maskgen-vq-l", "v5e:8x8", "data=8,fsdp=8", 32, alone=32, cut=False),
    _pair("maskgen-vq-xl", "v5e:8x8", "data=8,fsdp=8", 16, alone=16, cut=False),
    _pair("maskgen-kl-l", "v5e:8x8", "data=8,fsdp=8", 32, alone=32, cut=False),
    _pair("maskgen-kl-xl", "v5e:8x8", "data=8,fsdp=8", 16, alone=16, cut=False),
    _pair("maskgen-one-gpu", "v5e:2x4", "data=8", 32, alone=128, cut=False),
    _pair("mar-b", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("mar-l", "v5e:2x4", "data=1,fsdp=8", 16, alone=64, cut=False),
    _pair("mar-h", "v5e:8x8", "data=8,fsdp=8", 16, alone=32, cut=False),
    _pair("mar-one-gpu", "v5e:2x4", "data=8", 32, alone=256, cut=False),
    _pair("flextok-ar", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("var-d16", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("var-d20", "v5e:2x4", "data=8", 8, alone=32, cut=False),
    _pair("var-d24", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False),
    _pair("var-d30", "v5e:8x8", "data=8,fsdp=8", 4, alone=16, cut=False),
    _pair("var-d36-512", "v5e:8x8", "data=8,fsdp=8", 2, alone=4, cut=False),
    _pair("var-one-gpu", "v5e:2x4", "data=8", 8, alone=128, cut=False),
    _pair("instella-diffusion", "v5e:8x8", "data=8,fsdp=8", 16, alone=64, cut=False),
    _pair("instella-ar", "v5e:8x8", "data=8,fsdp=8", 16, alone=64, cut=False),
    _pair("instella-one-gpu", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("binary-diffusion-churches", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("binary-diffusion-imagenet", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("meanflow-xl2", "v5e:8x8", "data=8,fsdp=8", 4, alone=16, cut=False),
    _pair("meanflow-b4", "v5e:2x4", "data=8", 32, alone=256, cut=False),
    _pair("shortcut-b2", "v5e:2x4", "data=8", 16, alone=64, cut=False),
    _pair("rfpp-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-ncsnpp"),
    _pair("rfpp-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-ncsnpp"),
    _pair("rfpp-imagenet64", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False, teacher="edm-imagenet64"),
    _pair("slimflow-cifar10", "v5e:2x4", "data=8", 16, alone=128, cut=False, teacher="edm-cifar10"),
    _pair("slimflow-cifar10-gpu", "v5e:2x4", "data=8", 16, alone=128, cut=False, teacher="edm-cifar10"),
    _pair("progressive-cifar10", "v5e:2x4", "data=8", 16, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("progressive-cifar10-gpu", "v5e:2x4", "data=8", 16, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("guided-imagenet64", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False, teacher="edm-imagenet64"),
    _pair("cd-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("cd-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("ct-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("ict-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("ect-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("ect-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("tcm-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("ctm-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("ctm-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("ddo-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("features-imagenet", "v5e:2x4", "data=8", 8, alone=32, cut=False, teacher="edm-imagenet64"),
    _pair("features-imagenet-gpu", "v5e:2x4", "data=8", 4, alone=32, cut=False, teacher="edm-imagenet64"),
    _pair("rae-v2", "v5e:8x8", "data=8,fsdp=8", 16, alone=16, cut=False),
    _pair("rae-v2-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False),
    _pair("sims-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("sims-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("difffit-dit", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="dit-xl2"),
    _pair("difffit-dit-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="dit-xl2"),
    _pair("difffit-512", "v5e:2x4", "data=8", 2, alone=16, cut=False, teacher="dit-xl2"),
    _pair("dmd2-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("f-distill-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("kd-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("multi-student-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10-cond"),
    _pair("sct-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("scd-cifar10", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("scd-cifar10-gpu", "v5e:2x4", "data=8", 8, alone=64, cut=False, teacher="edm-cifar10"),
    _pair("cd-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("ct-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False),
    _pair("ict-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False),
    _pair("ctm-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("dmd2-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("dmd2-imagenet64-scratch", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("f-distill-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("multi-student-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair(
        "multi-student-imagenet64-small", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"
    ),
    _pair("scd-imagenet64", "v5e:2x4", "data=1,fsdp=8", 4, alone=16, cut=False, teacher="edm-imagenet64"),
    _pair("ladd-imagenet256", "v5e:2x4", "data=1,fsdp=8", 8, alone=32, cut=False, teacher="dit-xl2"),
    _pair(
        "distilled-decoding-imagenet",
        "v5e:2x4",
        "data=1,fsdp=8",
        16,
        alone=64,
        cut=False,
        teacher="llamagen-l",
        tokenizer="llamagen-vq16",
    ),
    _pair(
        "distilled-decoding-var",
        "v5e:2x4",
        "data=1,fsdp=8",
        8,
        alone=32,
        cut=False,
        teacher="var-d16",
        tokenizer="var-vqvae",
    ),
    _pair("cifar10-tokenizer", "v5e:2x2", "data=4", 64),
    _pair("cifar10-teacher", "v5e:2x2", "data=4", 64, tokenizer="cifar10-tokenizer"),
    _pair("cifar10-student", "v5e:2x2", "data=4", 64, teacher="cifar10-teacher", tokenizer="cifar10-tokenizer"),
]
CASES = [case for pair in _CASES for case in pair]


# presets that take any teacher, whose size is the teacher's
TOKENS = ("ddo-tokens", "distilled-decoding", "distilled-decoding-2")
TUNED = ("ddo", "difffit", "bitfit", "lora", "full-tuning", "features", "sims")
ANY = (*METHODS, *TOKENS, *TUNED)


def sized() -> list[str]:
    """The presets that are meant for accelerators: all but the toys, what the demo trains on a laptop, and methods."""
    rows = {name: str(row.module) for name, row in presets().items() if "smoke" not in name and name not in ANY}
    return [name for name, module in rows.items() if not module.endswith(".demo")]


def expected_traffic(parameters: int, blocks: int, sizes: Mapping[str, int], width: int = 2) -> float:
    """Bytes that a device has to send in a training step, as the layouts are meant.

    Parameters and gradients travel in the compute type, of `width` bytes.

    - data: the gradients are summed over n copies, 2 (n - 1) / n of them.
    - fsdp: the parameters are gathered for the forward and for the backward pass, their gradients summed and scattered:
      3 (n - 1) / n of them; the sum over the copies is of a part only.
    - tensor: as data, of a part; and the activations of every block, `blocks` bytes of them in all, are summed twice in
      each direction.
    """
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    part = width * parameters / tensor
    gathered = 3 * part * (fsdp - 1) / fsdp
    summed = 2 * part / fsdp * (data - 1) / data
    return gathered + summed + 4 * 2 * blocks * (tensor - 1) / tensor
