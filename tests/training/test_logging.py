import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen.errors import GenError
from gen.training.logging import MetricsLog, picture_grid, read_metrics, write_picture


def test_records_and_going_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0 / step, "bad": float("nan")})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    MetricsLog(tmp_path, 20).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20]
    assert read_metrics(tmp_path)[0]["bad"] is None
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(1, {"loss": 2.0, "stage": "one"})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, object]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Package:
        @staticmethod
        def init(**options: object) -> type:
            begun.append(options)
            return Package

        @staticmethod
        def log(values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        @staticmethod
        def finish() -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(sys.modules, "wandb", Package)
    for start in (0, 2):
        log = MetricsLog(tmp_path, start, wandb="project", name="run")
        log.write(start + 1, {"loss": 0.5, "stage": "one"})
        log.close()
    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["name"], begun[0]["resume"]) == ("project", "run", "allow")
    assert len(str(begun[0]["id"])) == 12
    assert logged == [(1, {"loss": 0.5}), (-1, {}), (3, {"loss": 0.5}), (-1, {})]


def test_wandb_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(GenError, match=r"gen-image\[wandb\]"):
        MetricsLog(tmp_path, 0, wandb="project")


def test_grid(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 2, 3, 1))
    grid = picture_grid(images)
    assert grid.shape == (4, 9, 1)
    assert (grid[0, 0, 0], grid[2, 3, 0], grid[3, 8, 0]) == (0, 255, 0)
    write_picture(tmp_path / "a.png", images)
    assert Image.open(tmp_path / "a.png").size == (9 * 24, 4 * 24)
    with pytest.raises(GenError, match="expected"):
        picture_grid(np.zeros((2, 3, 3)))
