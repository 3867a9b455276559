"""A report as one HTML file: text, pictures, curves and tables of scores with their protocols; no network needed."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from gen.errors import GenError
from gen.files import atomic
from gen.metrics.protocol import Protocol, Result, differences

__all__ = ["Report", "heading", "mosaic"]

_SERIES = (
    "#3b7dd8",
    "#e0802b",
    "#2f9e6e",
    "#c2489a",
    "#8a63d2",
    "#b8a21f",
    "#5a8f9c",
    "#d0504c",
)  # fair on light and dark
_ACROSS = 6  # columns that fit on a page side by side
_INK = "#010203"  # stands for the page's text colour until the drawing is done
_WORDS = {  # headings; the arrow points to where better scores lie
    "accuracy": "accuracy ↑",
    "cas": "CAS ↑",
    "class_frechet": "Fréchet distance within classes ↓",
    "clip_score": "CLIP score ↑",
    "cmmd": "CMMD ↓",
    "copies_in_features": "copies in features ↓",
    "copies_in_pixels": "copies in pixels ↓",
    "coverage": "coverage ↑",
    "density": "density ↑",
    "frechet_distance": "Fréchet distance ↓",
    "frechet_infinity": "Fréchet distance, N → ∞ ↓",
    "inception_score": "Inception Score ↑",
    "kid": "KID ↓",
    "lpips": "LPIPS ↓",
    "mind": "MIND ↓",
    "ms_ssim": "MS-SSIM ↑",
    "nfe": "NFE",
    "precision": "precision ↑",
    "psnr": "PSNR ↑",
    "psnr_pooled": "PSNR, pooled ↑",
    "recall": "recall ↑",
    "spatial_frechet_distance": "spatial Fréchet distance ↓",
    "ssim_original": "SSIM ↑",
    "ssim_skimage": "SSIM of scikit-image ↑",
    "ssim_torchmetrics": "SSIM of torchmetrics ↑",
    "top5_accuracy": "top-5 accuracy ↑",
    "vendi": "Vendi score ↑",
}
_ABSENT = "\N{EN DASH}"


def mosaic(images: np.ndarray, columns: int, size: int = 48, gap: int = 2) -> Image.Image:
    """Gives images side by side, row by row, enlarged with Lanczos so that the longer side has about `size` pixels.

    Images that are larger already keep their size.

    Args:
      images: (N, H, W, C) uint8, or float in [-1, 1]; C is 1 or 3.
      columns: images per row.
      size: pixels of the longer side.
      gap: transparent pixels between images.

    Raises:
      GenError: no images or another shape.
    """
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3):
        raise GenError(f"pictures of shape {images.shape}; expected (N, H, W, 1 or 3) with N > 0; check what is shown")
    if images.dtype != np.uint8:
        images = np.floor(np.clip(np.nan_to_num(127.5 * images.astype(np.float64) + 128), 0, 255)).astype(np.uint8)
    factor = max(1.0, size / max(images.shape[1:3]))
    height, width = (round(side * factor) for side in images.shape[1:3])
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    page = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for i, pixels in enumerate(images):
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        tile = tile.resize((width, height), Image.Resampling.LANCZOS)
        page.paste(tile, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return page


@dataclasses.dataclass
class Report:
    """A page, built from top to bottom; every method adds one block and returns the report.

    Attributes:
      title: heading of the page.
      subtitle: one or two sentences under it.
      blocks: what has been added.
    """

    title: str
    subtitle: str = ""
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def section(self, title: str, text: str = "") -> "Report":
        """Adds a heading with paragraphs under it (blank lines part them)."""
        self.blocks.append({"kind": "section", "title": title, "paragraphs": _paragraphs(text)})
        return self

    def text(self, text: str) -> "Report":
        """Paragraphs (blank lines part them)."""
        self.blocks.append({"kind": "text", "paragraphs": _paragraphs(text)})
        return self

    def figures(self, values: Mapping[str, Any]) -> "Report":
        """Adds a row of large numbers, each over its name."""
        self.blocks.append({"kind": "figures", "items": [(name, _cell(value)) for name, value in values.items()]})
        return self

    def pictures(
        self, rows: Mapping[str, np.ndarray], caption: str = "", *, columns: int = 16, size: int = 48
    ) -> "Report":
        """Adds labelled strips of images under one another.

        Args:
          rows: label -> images (N, H, W, C), uint8 or float in [-1, 1]; a longer strip wraps after `columns` images.
          caption: what is seen.
          columns: images per line.
          size: shown pixels of an image's longer side; smaller images are enlarged with Lanczos.
        """
        strips = [
            (label, _png(picture), picture.width)
            for label, images in rows.items()
            for picture in [mosaic(images, columns, size)]
        ]
        self.blocks.append({"kind": "pictures", "rows": strips, "caption": caption})
        return self

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> "Report":
        """Adds a plain table; numbers are rounded to four significant digits. Raises GenError for rows of another
        length.
        """
        for row in rows:
            if len(row) != len(columns):
                raise GenError(f"a table row of {len(row)} cells under {len(columns)} columns; expected equally many")
        # one that is missing stands where the numbers of its column do
        cells = [[(_cell(value), value is None or _is_number(value)) for value in row] for row in rows]
        self.blocks.append(
            {"kind": "table", "columns": list(columns), "rows": cells, "caption": caption, "protocol": []}
        )
        return self

    def results(self, results: Mapping[str, Result], caption: str = "") -> "Report":
        """Scores of several subjects with their protocol underneath.

        Subjects are the rows, or the columns where the scores would not fit side by side, and where there is one alone.
        Protocol fields in which they differ stand among the scores, so that nothing is compared unawares.

        Args:
          results: name of a subject -> its result.
          caption: what is compared.

        Raises:
          GenError: no results.
        """
        if not results:
            raise GenError("no results for the table; expected at least one; evaluate first")
        everyone = list(results.values())
        names = list(dict.fromkeys(name for result in everyone for name in result.values))
        first = everyone[0].protocol
        varying = list(dict.fromkeys(name for r in everyone for name in differences(first, r.protocol)))
        features = "" if "extractor" in varying else first.extractor
        head = ["", *(heading(name, features) for name in names), *(field.replace("_", " ") for field in varying)]
        rows = [
            [label, *(_score(r, name) for name in names), *(str(getattr(r.protocol, field)) for field in varying)]
            for label, r in results.items()
        ]
        if len(head) > (max(len(rows), _ACROSS) if len(rows) > 1 else 3):  # a page is longer than wide
            head, *rows = (list(column) for column in zip(head, *rows, strict=True))
        cells = [[(text, i > 0) for i, text in enumerate(row)] for row in rows]
        shared = _facts(first, (*varying, "seeds"))
        seeds = list(dict.fromkeys(r.protocol.seeds for r in everyone if r.protocol.seeds))
        self.blocks.append(
            {
                "kind": "table",
                "columns": head,
                "rows": cells,
                "caption": caption,
                "protocol": shared + ([("seeds", "; ".join(seeds))] if seeds else []),
            }
        )
        return self

    def protocol(self, protocol: Protocol) -> "Report":
        """Gives the protocol that figures above hold under."""
        self.blocks.append({"kind": "protocol", "protocol": _facts(protocol)})
        return self

    def curves(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        caption: str = "",
        *,
        x: str = "step",
        y: str = "",
        log: bool = False,
        log_x: bool = False,
    ) -> "Report":
        """Lines over a common axis.

        Args:
          series: name -> (x values, y values); NaN leaves a gap.
          caption: what is seen.
          x, y: names of the axes.
          log, log_x: logarithmic y axis, x axis.
        """
        self._draw(lambda axes: _lines(axes, series, log_x, log), (x, y), caption)
        return self

    def points(
        self, points: Mapping[str, tuple[float, float]], caption: str = "", *, x: str = "", y: str = ""
    ) -> "Report":
        """Named points in a plane.

        Args:
          points: name -> (x, y).
          caption: what is seen.
          x, y: names of the axes.
        """
        self._draw(lambda axes: _named(axes, points), (x, y), caption)
        return self

    def _draw(self, draw: Callable[[Any], None], names: tuple[str, str], caption: str) -> None:
        number = sum(block["kind"] == "curves" for block in self.blocks)
        self.blocks.append({"kind": "curves", "svg": _svg(draw, names, number), "caption": caption})

    def html(self) -> str:
        """Gives the page as text."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("gen.metrics", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.get_template("report.html.jinja")
        return template.render(title=self.title, subtitle=self.subtitle, blocks=self.blocks)

    def write(self, path: str | Path) -> None:
        """Writes the page, whole or not at all."""
        page = self.html().encode()
        atomic(path, lambda file: file.write(page))


def _facts(protocol: Protocol, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What a protocol says, but for some fields."""
    names = [field.name for field in dataclasses.fields(Protocol) if field.name not in without]
    return [(n.replace("_", " "), _short(getattr(protocol, n))) for n in names if getattr(protocol, n) != ""]


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if abs(float(value)) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if _is_number(value) else str(value)


def _score(result: Result, name: str) -> str:
    if name not in result.values:
        return _ABSENT
    value = result.values[name]
    spread = result.spread.get(name, result.within.get(name))
    if spread is None:
        return f"{value:.3g}"
    # both to the same place: that of the score's third digit, or of the spread's first if it is further behind
    places = [2 - np.floor(np.log10(max(abs(value) or spread or 1.0, 1e-3)))]
    places += [min(-np.floor(np.log10(spread)), 5)] if spread else []
    digits = max(int(max(places)), 0)
    return f"{value:.{digits}f} ± {spread:.{digits}f}"


def heading(name: str, features: str = "") -> str:
    """Gives what a score is called on a page, with an arrow to where better ones lie.

    Args:
      name: of the score.
      features: the extractor, where it is to be named: a Fréchet distance is another one in other features.
    """
    text = _WORDS.get(name, name.replace("_", " "))
    if features and text.startswith("Fréchet"):
        return f"{text[:-2]} ({features} features){text[-2:]}"
    return text


def _short(value: Any) -> str:
    text = str(value)
    hexadecimal = len(text) > 16 and all(c in "0123456789abcdef" for c in text)
    return text[:16] if hexadecimal else text


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(draw: Callable[[Any], None], names: tuple[str, str], number: int) -> str:
    import matplotlib  # slow to import, and only pages with drawings need it
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": f"curves{number}",  # several drawings share one page, and its ids
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.8, 2.7), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK, lw=0.8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    return drawing[drawing.index("<svg") :].replace(_INK, "currentColor")


def _lines(axes: Any, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], log_x: bool, log_y: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    for i, (name, (xs, ys)) in enumerate(series.items()):
        mark = "o" if len(xs) < 12 else None
        axes.plot(xs, ys, color=_SERIES[i % len(_SERIES)], lw=1.6, marker=mark, ms=4, label=name)
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain if high < 10 * low else FuncFormatter(lambda value, _: ""))
    ticks = sorted({value for xs, _ in series.values() for value in xs})
    if log_x:
        axes.set_xscale("log")
    if log_x or len(ticks) < 10:  # few points: each is named
        axes.set_xticks(ticks, [f"{value:,.6g}" for value in ticks], minor=False)
    if log_x:
        axes.minorticks_off()
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)


_SIDES = ((1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"))


def _named(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Points, each with its name on the side that is farthest from other points and names; long ones on the right."""
    at = np.array(list(points.values()), np.float64)
    axes.margins(0.16, 0.16)
    axes.scatter(*at.T, color=[_SERIES[i % len(_SERIES)] for i in range(len(at))], s=28, zorder=3)
    unit = at / np.maximum(np.ptp(at, axis=0), 1e-9)
    names: list[np.ndarray] = []
    for i, name in enumerate(points):
        others = np.array([*np.delete(unit, i, axis=0), *names, [np.inf, np.inf]])

        def room(side: tuple[int, int, str, str], i: int = i, others: np.ndarray = others) -> float:
            return float(np.hypot(*(others - _beside(unit[i], side)).T).min())

        best = max((side for side in _SIDES if side[0] > 0 or len(name) <= 12), key=room)
        names.append(_beside(unit[i], best))
        dx, dy, across, along = best
        place = {"xytext": (6 * dx, 5 * dy), "textcoords": "offset points", "ha": across, "va": along}
        axes.annotate(name, at[i], fontsize=8, color=_INK, **place)


def _beside(point: np.ndarray, side: tuple[int, int, str, str]) -> np.ndarray:
    return point + np.array([0.07 * side[0], 0.1 * side[1]])
