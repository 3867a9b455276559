"""The comparison of tokenizers: its settings, and the whole of it in small."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.experiments.compare_tokenizers import HEAD, SMOKE, TOKENIZERS, run, table
from gen.nn.network import count, param_shapes
from gen.tokenizers.code_vectors import CodeVectors
from gen.tokenizers.quantizers.lfq import BSQ
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower
from tests.data.files import edm_zip
from tests.test_edm_presets import image_zip


@pytest.mark.slow
def test_tokenizers_are_of_one_size_and_their_latents_of_16_patches() -> None:
    sizes = {name: count(param_shapes(tokenizer)) for name, tokenizer in TOKENIZERS.items()}
    assert len(sizes) >= 8
    assert max(sizes.values()) < 1.15 * min(sizes.values()), sizes
    for tokenizer in TOKENIZERS.values():
        assert from_json(to_json(tokenizer)) == tokenizer
        view = tokenizer if tokenizer.spec.kind == "continuous" else CodeVectors(tokenizer)
        *sides, _ = view.spec.shape
        assert sides in ([8, 8], [16])


def test_unfit_data_are_refused_before_anything_runs(tmp_path: Path) -> None:
    small = str(edm_zip(tmp_path / "a.zip", [[f"00000/img{i:08d}.png", 0] for i in range(6)]))
    with pytest.raises(GenError, match="expected 32 x 32"):
        run(small, tmp_path / "run", budget=SMOKE)
    with pytest.raises(GenError, match=r"12 images; 32 are needed"):
        run(image_zip(tmp_path / "b.zip", 32), tmp_path / "run", budget=SMOKE)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_whole_comparison_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = image_zip(tmp_path / "a.zip", 32, count=40)
    tower = Tower(16, 1, 2)
    flat = {"image": (32, 32, 3), "patch": 8, "tokens": 16, "encoder": tower, "decoder": tower, "scan": False}
    some = {
        "kl": TiTokConfig(**flat, channels=4),
        "vq": TiTokConfig(**flat, channels=None, quantizer=VQ(16, 4)),
        "bits": TiTokConfig(**flat, channels=None, quantizer=BSQ(4)),
    }
    budget = dataclasses.replace(SMOKE, minutes=0.001)
    made = run(data, tmp_path / "run", budget=budget, tokenizers=some)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'alt="{name}"' in page for name in ("held-out images", *some))
    for name in some:
        scores = made[f"{name}-scores"]
        assert {"reconstructions", "samples"} == set(scores)
        assert np.isfinite([scores[what].values["frechet_distance"] for what in scores]).all()
        assert scores["reconstructions"].values["psnr"] > 0
        assert ("codebook_usage" in scores["reconstructions"].values) == (name != "kl")
    rows = [dict(zip(HEAD, row, strict=True)) for row in table(tuple(some), made)]
    assert [row["bits per image"] for row in rows] == [32 * 16 * 4, 16 * 4, 16 * 4]
    capsys.readouterr()
    run(data, tmp_path / "run", budget=budget, tokenizers=some)
    assert capsys.readouterr().out.count("done before") == 5 * len(some) + 1
