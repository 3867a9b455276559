"""Official DMD2 weights (tianweiy/DMD2): the one-step ImageNet-64 generator, and the discriminator's head.

The generator has the names of EDM's wrapped ADM (``pytorch_model.bin``), so a file does not tell it from a teacher; it
makes an image in one call from noise of deviation 80. The training run's other file (``pytorch_model_1.bin``) holds
the teacher, the fake score and the head on it, as ``real_unet``, ``fake_unet`` and ``cls_pred_branch``.
"""

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.nn.adversarial import ConvHead
from gen.pretrained import edm
from gen.pretrained.rules import Importer, Rule, Rules, Transform, convolution
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Explicit
from gen.sampling.solvers import Renoise

__all__ = ["IMPORTER", "generator", "head_rules"]

SIGMA = 80.0  # the noise level of the one call
_POINTWISE = Transform(lambda a: a[:, :, 0, 0].T, lambda a: (a.T[:, :, None, None],))


def generator(network: DhariwalUNetConfig | SongUNetConfig) -> DiffusionGenerator:
    """Makes the Generator of one call: the denoised prediction at the highest noise level."""
    return DiffusionGenerator(edm.precondition("EDMPrecond", network), Sampler(Renoise(), Explicit((SIGMA, 0.0)), 1))


def head_rules(head: ConvHead, prefix: str = "cls_pred_branch.") -> Rules:
    """Gives the table of the discriminator's head: three official layers for each convolution, and the last one."""
    table: list[Rule] = []
    for i in range(head.downs + 1):
        table += convolution(f"{prefix}{3 * i}", f"conv{i}")
        table += [
            Rule(f"{prefix}{3 * i + 1}.weight", f"norm{i}/scale"),
            Rule(f"{prefix}{3 * i + 1}.bias", f"norm{i}/bias"),
        ]
    last = f"{prefix}{3 * (head.downs + 1)}"
    return [*table, Rule(f"{last}.weight", "out/kernel", _POINTWISE), Rule(f"{last}.bias", "out/bias")]


IMPORTER = Importer("dmd2", (), edm.config, edm.rules, generator, alike=("edm",))
