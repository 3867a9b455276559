"""LightningDiT's published latent caches: safetensors shards and their statistics, as training data.

A folder holds ``latents_rankRR_shardSSS.safetensors`` with ``latents``, ``latents_flip`` (n, C, H, W) float32 and
``labels`` (n,), in sorted order of their names, and ``latents_stats.pt`` with the mean and deviation per channel.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from gen.config import PLACE
from gen.data import labels, loader
from gen.errors import GenError
from gen.pretrained.readers import read_weights

__all__ = ["LatentShards", "ShardSource"]

_SAMPLE = 10_000  # latents from which missing statistics are computed, as officially
_NAMES = ("latents", "latents_flip", "labels")


class ShardSource:
    """Rows of the shards, memory-mapped: "latent" and "latent_flip" (H, W, C) float32, raw, and "label" () int32."""

    def __init__(self, shards: list[dict[str, np.ndarray]]):
        self.shards = shards
        self.starts = np.concatenate([[0], np.cumsum([len(shard["labels"]) for shard in shards])])
        self.label = labels.checked(np.concatenate([shard["labels"] for shard in shards]), self.title)
        self.class_names = None
        self.num_classes = labels.class_count(self.label, self.class_names, self.title)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard, row = self.shards[which], index - int(self.starts[which])
        return {
            "latent": np.moveaxis(np.asarray(shard["latents"][row], np.float32), 0, -1),
            "latent_flip": np.moveaxis(np.asarray(shard["latents_flip"][row], np.float32), 0, -1),
            "label": np.asarray(shard["labels"][row], np.int32),
        }

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Gives rows `indices` (B,) of every array."""
        return loader.stacked((self[int(i)] for i in indices), len(indices))

    def title(self, index: int) -> str:
        """Tells how messages call record `index`."""
        return f"latent {index}"


@dataclasses.dataclass(frozen=True)
class LatentShards:
    """A folder of shards as training data: "latent" (B, H, W, C) float32, normalised, and "label" (B,) int32.

    A row comes with probability 1/2 from the image and from its mirror image.

    Attributes:
      path: the folder.
      normalize: subtract the mean and divide by the deviation; False for SD-VAE latents, which are only scaled.
      multiplier: times this afterwards (0.18215 for the SD-VAE).
    """

    tokenizer: ClassVar[str] = ""  # published shards do not say what encoded them

    path: str = dataclasses.field(metadata=PLACE)
    normalize: bool = True
    multiplier: float = 1.0

    def source(self) -> ShardSource:
        """Gives the rows by index. Raises GenError for a folder without shards and for shards that do not fit
        together.
        """
        files = self._files()
        shards = [read_weights(file) for file in files]
        for file, shard in zip(files, shards, strict=True):
            if missing := [name for name in _NAMES if name not in shard]:
                raise GenError(f"{file} has no {missing[0]}; expected a shard with {', '.join(_NAMES)}")
            shape = (len(shard["labels"]), *shards[0]["latents"].shape[1:])
            if len(shape) != 4 or any(shard[name].shape != shape for name in _NAMES[:2]):
                raise GenError(f"{file} has latents {shard['latents'].shape}; expected {shape}, write the shard again")
        return ShardSource(shards)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives the mean and unbiased deviation (C,) of the unflipped latents: the stored ones, or those of 10,000
        rows.

        Raises GenError for a file of other statistics.
        """
        file = Path(self.path) / "latents_stats.pt"
        if file.exists():
            stored = read_weights(file)
            if not {"mean", "std"} <= set(stored):
                raise GenError(
                    f"{file} has {', '.join(stored)}; expected mean and std, delete it to have them computed"
                )
            return stored["mean"].reshape(-1), stored["std"].reshape(-1)
        source = self.source()
        rows = np.unique(np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int))
        latents = source.gather(rows)["latent"].astype(np.float64)
        return latents.mean((0, 1, 2)), latents.std((0, 1, 2), ddof=1)

    def normalizer(self) -> dict[str, np.ndarray]:
        """Gives "shift" and "scale" (C,) float32: raw latents are normalised * scale + shift."""
        mean, deviation = self.statistics()
        if not self.normalize:
            mean, deviation = np.zeros_like(mean), np.ones_like(deviation)
        return {"shift": mean.astype(np.float32), "scale": (deviation / self.multiplier).astype(np.float32)}

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        normalizer = self.normalizer()

        def pick(generator: np.random.Generator, record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            latent = record["latent" if generator.random() > 0.5 else "latent_flip"]
            return {"latent": (latent - normalizer["shift"]) / normalizer["scale"], "label": record["label"]}

        return loader.batches(
            self.source(), batch=batch, seed=seed, start=start, process=process, processes=processes, transform=pick
        )

    def identity(self) -> str:
        """Gives the fingerprint of the shards' names, sizes and beginnings and of the normaliser; not of where they
        lie.
        """
        digest = hashlib.sha256()
        for file in self._files():
            with file.open("rb") as opened:
                digest.update(f"{file.name} {file.stat().st_size};".encode() + opened.read(1 << 16))
        for value in self.normalizer().values():
            digest.update(value.tobytes())
        return digest.hexdigest()[:16]

    def _files(self) -> list[Path]:
        files = sorted(Path(self.path).glob("*.safetensors"))
        if not files:
            raise GenError(
                f"no latent shards in {self.path}; expected files such as latents_rank00_shard000.safetensors"
            )
        return files
