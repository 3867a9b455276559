"""2-rectified flow++ (sangyun884/rfpp): EDM's networks, trained on as rectified flows, and the noise of its pairs.

The files hold what EDM's do, under the same names, so that the system has to be named; what differs is how the network
is asked and sampled.
"""

import numpy as np

from gen.diffusion.conversions import MARGIN, rectified
from gen.errors import GenError
from gen.pretrained import edm
from gen.pretrained.rules import Importer
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.student_solvers import Anchored

__all__ = ["IMPORTER", "pair_noise"]

STEPS = 2  # network calls of the published figures' better column


def generator(network: edm.UNetConfig) -> DiffusionGenerator:
    """Gives the Generator with the official sampler, in two steps from just below pure noise."""
    flow = rectified(edm.precondition("EDMPrecond", network))
    sampler = Sampler(Anchored(), Uniform(start=1.0 - MARGIN), STEPS, ClassifierFree(1.0))
    return DiffusionGenerator(flow, sampler)


def pair_noise(record: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Gives the noise of a stored pair, float32, from the 32 bytes of its file ``<index>.bin``.

    These are the state and the increment of NumPy's PCG64, 16 bytes each, most significant first.

    Args:
      shape: of the noise, (C, H, W).

    Raises GenError for a record of another length.
    """
    if len(record) != 32:
        raise GenError(f"the noise of a pair is recorded in 32 bytes, not {len(record)}; give a .bin file of rfpp")
    state, inc = (int.from_bytes(record[i : i + 16], "big") for i in (0, 16))
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": inc},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(bits).standard_normal(shape).astype(np.float32)


IMPORTER = Importer("rfpp", (), edm.config, edm.rules, generator, alike=("edm",))
