from pathlib import Path

import numpy as np
import pytest

from gen.errors import GenError
from gen.files import read_json
from gen.metrics.protocol import Protocol, Result
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.keep_curve import keep_curve, keep_numbers
from gen.tokenizers.reconstruct import Reconstructed
from tests.conformance.examples import FLEXTOK


def test_numbers() -> None:
    assert keep_numbers(FLEXTOK.spec) == (1, 2, 4)
    keep = FLEXTOK.spec.conditions
    for tokens, expected in ((1, (1,)), (12, (1, 2, 4, 8, 12)), (256, tuple(2**i for i in range(9)))):
        spec = TokenizerSpec("tokens", (tokens,), (8, 8, 1), 25, 2, conditions=keep)
        assert keep_numbers(spec) == expected
    with pytest.raises(GenError, match="decodes all of its tokens"):
        keep_numbers(TokenizerSpec("tokens", (4,), (8, 8, 1), 25, 2))


def test_scores_and_pictures_stand_by_number_of_tokens(tmp_path: Path) -> None:
    before = np.full((2, 8, 8, 1), 200, np.uint8)

    def score(number: int) -> Reconstructed:
        result = Result({"psnr": 10.0 + number}, Protocol("none", "", 2), {"keep": str(number)})
        return Reconstructed(result, before, np.full((2, 8, 8, 1), number, np.uint8))

    curve = keep_curve(score, (1, 2, 4))
    assert [row.max() for row in curve.grid] == [200, 1, 2, 4]
    curve.write(tmp_path / "curve.html", "digits")
    found = read_json(tmp_path / "curve.json")
    assert {number: rows["values"]["psnr"] for number, rows in found.items()} == {"1": 11.0, "2": 12.0, "4": 14.0}
    assert found["2"]["subject"]["keep"] == "2"
    page = (tmp_path / "curve.html").read_text()
    assert "1 token<" in page
    assert "4 tokens" in page
    assert (tmp_path / "curve.png").stat().st_size > 0
