"""What a run tells: metrics.jsonl, preview pictures, and TensorBoard or W&B where asked for."""

import contextlib
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.files import atomic, writing

__all__ = ["MetricsLog", "picture_grid", "read_metrics", "write_picture"]


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Gives the records of a run's metrics.jsonl, oldest first; [] when there is none. A half-written line is left
    out.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


class MetricsLog:
    """metrics.jsonl, and optional TensorBoard and W&B, of one run.

    Records after `step` (of a run that was killed between a log line and a checkpoint) are dropped on opening.

    Args:
      run_dir: the run folder.
      step: global step the run goes on from.
      tensorboard: also write event files to ``<run>/tensorboard``; needs the extra.
      wandb: W&B project name, or None; needs the extra.
      name: run name for W&B.

    Raises GenError for a missing package of the logger that was asked for.
    """

    def __init__(
        self, run_dir: str | Path, step: int, *, tensorboard: bool = False, wandb: str | None = None, name: str = ""
    ) -> None:
        run_dir = Path(run_dir)
        self.path = run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept).encode()
        if self.path.exists() and self.path.read_bytes() != lines:
            atomic(self.path, lambda file: file.write(lines))
        with writing(self.path):
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise GenError("TensorBoard logs need tensorboardX; pip install 'gen-image[tensorboard]'") from error
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)
        if wandb is not None:
            try:
                import wandb as package
            except ImportError as error:
                raise GenError("W&B logs need wandb; pip install 'gen-image[wandb]'") from error
            # the run's identity on W&B, so that a resumed run goes on in the same curves
            identity = run_dir / "wandb" / "id"
            if not identity.exists():
                identity.parent.mkdir(exist_ok=True)
                atomic(identity, lambda file: file.write(uuid.uuid4().hex[:12].encode()))
            self._wandb = package.init(
                project=wandb, name=name, dir=str(run_dir), id=identity.read_text(), resume="allow"
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; NaN and infinity become null, for JSON has neither."""
        record = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with writing(self.path):
            self._file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes everything."""
        with writing(self.path):
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def picture_grid(images: Any, columns: int | None = None) -> np.ndarray:
    """Tiles pictures (N, H, W, C) float in [-1, 1] into one uint8 (rows H, columns W, C), black where none is left.

    Raises GenError for pictures of another shape.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise GenError(f"pictures have shape {images.shape}; expected (N, H, W, 1 or 3)")
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pixels = np.clip(np.nan_to_num(images) * 127.5 + 128, 0, 255).astype(np.uint8)
    cells = np.zeros((rows * columns, h, w, c), np.uint8)
    cells[:n] = pixels
    return cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def write_picture(path: str | Path, images: Any, *, shown_at: int = 48) -> None:
    """Writes a grid of pictures as PNG; cells smaller than `shown_at` pixels are enlarged (Lanczos)."""
    from PIL import Image

    images = np.asarray(images, np.float32)
    grid = picture_grid(images)
    picture = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
    factor = shown_at / images.shape[1]
    if factor > 1:
        size = (round(picture.width * factor), round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    atomic(path, lambda file: picture.save(file, format="PNG"))
