from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data.caches import Cache, seal
from gen.errors import GenError
from gen.experiments import build, quickstart_cifar10
from gen.experiments.quickstart_cifar10 import GPU, SMOKE, Budget, run
from gen.tokenizers.encode import tokenizer_identity
from gen.tokenizers.titok import TiTokConfig, Tower
from tests.data.files import edm_zip
from tests.test_edm_presets import image_zip

TOY = Budget(
    images=16, tokens=4, channels=4, tower=Tower(16, 1, 2), width=16, depth=1, heads=2, tokenizer=2, teacher=2,
    regression=2, matching=2, batch=8, pairs=8, dtype="float32",
)  # fmt: skip


@pytest.mark.slow
def test_whole_path_on_a_zip_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart_cifar10, "SMOKE", TOY)
    data = image_zip(tmp_path / "a.zip", 32, count=20)
    run(data, tmp_path / "run", smoke=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'alt="{name}"' in page for name in ("data", "reconstructions", "teacher", "student"))
    assert len(Cache(str(tmp_path / "run" / "latents")).source()) == TOY.images
    capsys.readouterr()
    run(data, tmp_path / "run", smoke=True)
    assert capsys.readouterr().out.count("done before") == 5


def test_stages_are_presets(tmp_path: Path) -> None:
    data = image_zip(tmp_path / "a.zip", 32)
    for name, budget in (("cifar10-tokenizer", GPU), ("cifar10-tokenizer-smoke", SMOKE)):
        config = build(name, {"data": data}).config
        assert (config.stages[0].batch, config.stages[0].steps) == (budget.batch, budget.tokenizer)
        assert from_json(to_json(config)) == config
    unlabelled = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)
    np.save(tmp_path / "latent.npy", unlabelled)
    network = TiTokConfig((8, 8, 1), patch=4, tokens=4, channels=4)
    seal(tmp_path, tokenizer=tokenizer_identity(network, {}), data="d")
    tokenizer = SimpleNamespace(tokenizer=network, params={"tokenizer": {}}, origin="t")
    config = build("cifar10-teacher-smoke", {"tokenizer": tokenizer, "data": str(tmp_path)}).config
    assert (config.stages[0].task.denoiser.network.num_classes, config.sampler.guidance.scale) == (0, 1.0)


def test_unfit_data_are_refused_before_anything_runs(tmp_path: Path) -> None:
    small = str(edm_zip(tmp_path / "a.zip", [[f"00000/img{i:08d}.png", 0] for i in range(6)]))
    with pytest.raises(GenError, match="expected 32 x 32"):
        run(small, tmp_path / "run", smoke=True)
    with pytest.raises(GenError, match="12 images, fewer than the batch"):
        run(image_zip(tmp_path / "c.zip", 32), tmp_path / "run", smoke=True)
    assert not (tmp_path / "run").exists()
