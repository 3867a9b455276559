"""CLIP's byte-pair encoding of texts (Radford et al. 2021, section 2.4; Sennrich et al. 2016).

The vocabulary is a published file of the user's; ``gen convert clip-vocabulary FILE`` puts it where evaluation looks.
"""

import dataclasses
import functools
import gzip
import hashlib
import html
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.features.weights import cache_path
from gen.files import atomic

__all__ = ["Vocabulary"]

_START, _END, _LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
_MERGES = 49152 - 2 * 256 - 2  # of the lines in openai/CLIP's file those that CLIP was trained with
_CONTRACTION = re.compile("'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)
_HINT = (
    "get bpe_simple_vocab_16e6.txt.gz from openai/CLIP (or vocab.json and merges.txt) and run gen convert "
    "clip-vocabulary FILE, or give token ids"
)


@functools.cache
def _letters() -> tuple[str, ...]:
    """One printable character for each byte: itself where it has one, else the next free one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown, free = {b: chr(b) for b in plain}, 256
    for byte in range(256):
        if byte not in shown:
            shown[byte], free = chr(free), free + 1
    return tuple(shown[byte] for byte in range(256))


def _own_ids(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The ids as CLIP gives them: bytes in the order of their characters, bytes that end words, merges, start, end."""
    plain = sorted(_letters())
    ends = [letter + _LAST for letter in plain]
    return {token: i for i, token in enumerate([*plain, *ends, *map("".join, merges), _START, _END])}


def _kind(letter: str) -> str:
    """L for letters, N for numbers, S for space, O for all others."""
    kind = unicodedata.category(letter)[0]
    return kind if kind in "LN" else "S" if letter.isspace() else "O"


def _words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single digits, runs of anything else; spaces part them and are left out."""
    at = 0
    while at < len(text):
        contraction = _CONTRACTION.match(text, at)
        end, kind = at + 1, _kind(text[at])
        if contraction:
            end = contraction.end()
        elif kind in "LO":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "S":
            yield text[at:end]
        at = end


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens and the merges that lead to them.

    Attributes:
      ids: token -> id.
      merges: pairs, the first to be merged first.
    """

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Gives the published file of openai/CLIP, the folder (or the vocab.json in it) of transformers, or our own.

        Raises GenError for a missing file, or one that holds something else.
        """
        folder = path if path.is_dir() else path.parent if path.name == "vocab.json" else None
        try:
            if folder is not None:
                merges, ids = _pairs((folder / "merges.txt").read_text("utf-8")), _json(folder / "vocab.json")
            elif path.suffix == ".json":
                stored = _json(path)
                merges, ids = [(str(a), str(b)) for a, b in stored["merges"]], stored["ids"]
            else:
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
                merges = _pairs(text)[:_MERGES]
                ids = _own_ids(merges)
            found = cls({str(token): int(i) for token, i in ids.items()}, merges)
        except FileNotFoundError as error:
            raise GenError(f"no vocabulary at {error.filename}; {_HINT}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise GenError(f"{path} is not a vocabulary of CLIP ({error}); {_HINT}") from None
        lacking = [t for t in (_START, _END, *_letters(), *map("".join, found.merges)) if t not in found.ids]
        if lacking or not found.merges:
            raise GenError(f"{path} is not a vocabulary of CLIP: it has no {lacking[:1] or 'merges'}; {_HINT}")
        return found

    @staticmethod
    def place() -> Path:
        """Tells where ``gen convert clip-vocabulary`` keeps it."""
        return cache_path("clip-vocabulary").with_suffix(".json")

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"ids": dict(self.ids), "merges": list(self.merges)}).encode()
        atomic(path, lambda file: file.write(text))

    def fingerprint(self) -> str:
        """Gives the SHA-256 (16 hex digits) of ids and merges."""
        text = json.dumps([sorted(self.ids.items()), list(self.merges)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def _parts(self, word: str) -> list[str]:
        """A word's tokens: its bytes, the pair of the lowest rank joined everywhere, until no pair has one."""
        letters = [_letters()[byte] for byte in word.encode()]
        parts = [*letters[:-1], letters[-1] + _LAST]
        while len(parts) > 1:
            pair = min(itertools.pairwise(parts), key=lambda p: self._ranks.get(p, len(self._ranks)))
            if pair not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return parts

    def encode(self, text: str) -> list[int]:
        """Gives the ids of a text, without start and end.

        As published, HTML entities are resolved, spaces joined and letters lowered; unlike there, text in a broken
        encoding (ftfy's business) is taken as it is.
        """
        clean = " ".join(html.unescape(html.unescape(text)).split()).lower()
        return [self.ids[part] for word in _words(clean) for part in self._parts(word)]

    def tokens(self, texts: Sequence[str], length: int = 77) -> np.ndarray:
        """Gives (N, length) int32: start, text, end, and zeros behind; a text that is too long is cut before its
        end.
        """
        rows = np.zeros((len(texts), length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.ids[_START], *self.encode(text)[: length - 2], self.ids[_END]]
            row[: len(ids)] = ids
        return rows


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _pairs(text: str) -> list[tuple[str, str]]:
    """The merges of a text file: one pair a line, under a line on its version."""
    lines = [line.split() for line in text.split("\n")[1:] if line.strip()]
    wrong = next((line for line in lines if len(line) != 2), None)
    if wrong is not None:
        raise ValueError(f"'{' '.join(wrong)[:40]}' is no pair")
    return [(a, b) for a, b in lines]
