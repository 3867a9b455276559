"""A trained toy that several tests of data share."""

from pathlib import Path

import pytest

from gen.cli import main
from gen.experiments import quickstart_cifar10
from tests.test_edm_presets import image_zip
from tests.test_quickstart import TOY

STEPS = 12


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.zip (40 images of 32 px) and run, a tokenizer of 4 x 4 latents trained on them for `STEPS`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    image_zip(folder / "a.zip", 32, count=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_cifar10, "SMOKE", TOY)
        assert main(train(folder, folder / "run")) == 0
    return folder


def train(place: Path, out: Path) -> list[str]:
    """The arguments of the command that trains it, on the images at `place`, into `out`."""
    options = ["--steps", str(STEPS), "--engine.checkpoint_every", "4", "--engine.log_every", "1"]
    options += ["--engine.checkpoint_seconds", "0"]
    return ["train", "cifar10-tokenizer-smoke", "--data", str(place / "a.zip"), "--outdir", str(out), *options]
