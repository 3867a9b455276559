"""EDM's non-leaking augmentation: images are changed at random and the network is told how.

Karras et al. 2022, appendix F.2.

Every operation is drawn and gated for each image by itself; what was done is written into a label vector which the
denoiser is conditioned on, and which is zero when sampling. Pure functions on the device, with static shapes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError

__all__ = ["AugmentDraws", "EDMAugment"]

# operation -> its random numbers by name: (B,) arrays, one of which is the gate
AugmentDraws = Mapping[str, Mapping[str, jax.Array]]

# sym6 wavelet's low-pass filter, the band limit of the resampling
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
# operation -> its draws: (name, law); laws are normal, uniform in [0, 1), or a number of sides of a die from 0
_OPERATIONS: dict[str, tuple[tuple[str, str | int], ...]] = {
    "xflip": (("w", 2), ("gate", "uniform")),
    "yflip": (("w", 2), ("gate", "uniform")),
    "rotate_int": (("w", 4), ("gate", "uniform")),
    "translate_int": (("x", "uniform"), ("y", "uniform"), ("gate", "uniform")),
    "scale": (("w", "normal"), ("gate", "uniform")),
    "rotate": (("u", "uniform"), ("gate", "uniform")),
    "anisotropic": (("w", "normal"), ("axis", "uniform"), ("gate", "uniform"), ("turned", "uniform")),
    "translate": (("x", "normal"), ("y", "normal"), ("gate", "uniform")),
    "brightness": (("w", "normal"), ("gate", "uniform")),
    "contrast": (("w", "normal"), ("gate", "uniform")),
    "lumaflip": (("w", 2), ("gate", "uniform")),
    "hue": (("u", "uniform"), ("gate", "uniform")),
    "saturation": (("w", "normal"), ("gate", "uniform")),
}
_GEOMETRIC = ("scale", "rotate", "anisotropic", "translate")
_COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
_WIDTHS = {"rotate_int": 2, "translate_int": 2, "rotate": 2, "anisotropic": 2, "translate": 2, "hue": 2}


@dataclasses.dataclass(frozen=True)
class EDMAugment:
    """The pipeline; its defaults are EDM's training configuration, with 9 label columns.

    Attributes:
      p: probability of each operation (0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2).
      xflip ... saturation: factors on p for each operation; 0 leaves it out, and with it its label columns. The
        horizontal flip of the default is always open. Flips and lumaflip change half of the images they are open for;
        rotate_int turns by quarters and translate_int shifts by whole pixels, scale, rotate, anisotropic and translate
        resample; the last five are colour operations, on RGB or grey images.
      translate_int_max: largest shift by whole pixels, as a share of the image's sides.
      scale_std, anisotropic_std, contrast_std, saturation_std: standard deviations of the log2 of the factors.
      rotate_max, hue_max: largest angle, as a share of half a turn.
      anisotropic_turned: probability that the stretched axis is turned.
      translate_std: standard deviation of the shift, as a share of the image's sides; brightness_std: of the sum.

    Raises GenError for negative probabilities, and a shift that is not positive.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 1.0
    rotate: float = 1.0
    anisotropic: float = 1.0
    translate: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    translate_int_max: float = 0.125
    scale_std: float = 0.2
    rotate_max: float = 1.0
    anisotropic_std: float = 0.2
    anisotropic_turned: float = 0.5
    translate_std: float = 0.125
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1.0
    saturation_std: float = 1.0

    def __post_init__(self) -> None:
        if min(self.p, *(getattr(self, name) for name in _OPERATIONS)) < 0:
            raise GenError("probabilities of the augmentation must not be negative; 0 turns an operation off")
        if self.translate_int_max <= 0:
            raise GenError(f"translate_int_max is {self.translate_int_max:g}; expected a share of the image above 0")

    @property
    def operations(self) -> tuple[str, ...]:
        """Gives the operations that are on, in their order."""
        return tuple(name for name in _OPERATIONS if getattr(self, name) > 0)

    @property
    def width(self) -> int:
        """Columns of the labels."""
        return sum(_WIDTHS.get(name, 1) for name in self.operations)

    def draw(self, key: jax.Array, batch: int) -> AugmentDraws:
        """All random numbers of a batch: operation -> name -> (batch,) float32."""
        laws = [(op, name, law) for op in self.operations for name, law in _OPERATIONS[op]]
        keys = jax.random.split(key, max(len(laws), 1))
        draws: dict[str, dict[str, jax.Array]] = {op: {} for op in self.operations}
        for one, (op, name, law) in zip(keys, laws, strict=False):
            draws[op][name] = _draw(one, law, batch)
        return draws

    def apply(self, images: jax.Array, draws: AugmentDraws) -> tuple[jax.Array, jax.Array]:
        """Gives the augmented images and their labels.

        Args:
          images: (B, H, W, C) float in [-1, 1].
          draws: what `draw` gives.
        Returns:
          (B, H, W, C), not clipped, and (B, width) float32 labels.
        Raises GenError for quarter turns of images that are not square, and for colour operations on images that have
        neither 1 nor 3 channels.
        """
        shape = images.shape
        if "rotate_int" in draws and shape[1] != shape[2]:
            raise GenError(f"quarter turns need square images, these are {shape[1]} x {shape[2]}; set rotate_int to 0")
        coloured = any(name in draws for name in _COLOUR)
        if coloured and shape[3] not in (1, 3):
            raise GenError(f"colour operations need 1 or 3 channels, these images have {shape[3]}; set them to 0")
        labels: list[jax.Array] = []
        inverse = jnp.broadcast_to(jnp.eye(3), (shape[0], 3, 3))
        resampled = any(name in draws for name in _GEOMETRIC)
        for name in self.operations:
            if name in _COLOUR:
                images, resampled = (_resample(images, inverse) if resampled else images), False
                images = jnp.broadcast_to(images, (*shape[:3], 3))  # grey images are coloured as RGB
            given = draws[name]
            open_ = given["gate"] < getattr(self, name) * self.p
            values = {k: v for k, v in given.items() if k != "gate"}
            if name in _GEOMETRIC:
                step, columns = _MATRICES[name](self, values, open_, shape)
                inverse = _times(inverse, step)
            else:
                images, columns = _PIXELS[name](self, images, values, open_)
            labels += columns
        if resampled:
            images = _resample(images, inverse)
        if coloured and shape[3] == 1:
            images = images.mean(-1, keepdims=True)
        return images, jnp.stack(labels, axis=-1) if labels else jnp.zeros((shape[0], 0))

    def __call__(self, key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Does what `apply` says; `key` is one key for the batch."""
        return self.apply(images, self.draw(key, images.shape[0]))


def _draw(key: jax.Array, law: str | int, batch: int) -> jax.Array:
    if isinstance(law, int):
        return jax.random.randint(key, (batch,), 0, law).astype(jnp.float32)
    return (jax.random.normal if law == "normal" else jax.random.uniform)(key, (batch,))


Values = Mapping[str, jax.Array]
Columns = list[jax.Array]
Pixels = Callable[[EDMAugment, jax.Array, Values, jax.Array], tuple[jax.Array, Columns]]


def _where(images: jax.Array, chosen: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(chosen[:, None, None, None], other, images)


def _flip(axis: int) -> Pixels:
    def operation(pipe: EDMAugment, images: jax.Array, values: Values, open_: jax.Array) -> tuple[jax.Array, Columns]:
        w = jnp.where(open_, values["w"], 0.0)
        return _where(images, w == 1.0, jnp.flip(images, axis)), [w]

    return operation


def _rotate_int(pipe: EDMAugment, images: jax.Array, values: Values, open_: jax.Array) -> tuple[jax.Array, Columns]:
    w = jnp.where(open_, values["w"], 0.0)
    out = images
    for turns in (1, 2, 3):
        out = _where(out, w == turns, jnp.rot90(images, turns, axes=(1, 2)))
    return out, [((w == 1) | (w == 2)).astype(jnp.float32), ((w == 2) | (w == 3)).astype(jnp.float32)]


def _translate_int(pipe: EDMAugment, images: jax.Array, values: Values, open_: jax.Array) -> tuple[jax.Array, Columns]:
    _, h, w, _ = images.shape
    shifts = []
    for name, size in (("x", w), ("y", h)):
        shift = jnp.round(pipe.translate_int_max * size * (2.0 * values[name] - 1.0))
        shifts.append(jnp.where(open_, shift, 0.0))
    rows = _reflect(jnp.arange(h) + shifts[1][:, None].astype(jnp.int32), h)
    columns = _reflect(jnp.arange(w) - shifts[0][:, None].astype(jnp.int32), w)
    moved = jnp.take_along_axis(images, rows[:, :, None, None], axis=1)
    moved = jnp.take_along_axis(moved, columns[:, None, :, None], axis=2)
    return moved, [shift / (pipe.translate_int_max * size) for shift, size in zip(shifts, (w, h), strict=True)]


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Indices mirrored at the edge pixels, which are not repeated."""
    return (size - 1) - jnp.abs((size - 1) - index % max(2 * size - 2, 1))


def _matrix(rows: list[list[jax.Array | float]], batch: int) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.broadcast_to(v, (batch,)) for v in row], -1) for row in rows], -2)


def _turn(angle: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _matrix([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], angle.shape[0])


def _stretch(x: jax.Array, y: jax.Array) -> jax.Array:
    return _matrix([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], x.shape[0])


def _times(*matrices: jax.Array) -> jax.Array:
    """Products of (B, 3, 3), multiplied out: a matmul at reduced precision would move pixels."""
    out = matrices[0]
    for matrix in matrices[1:]:
        out = (out[:, :, :, None] * matrix[:, None]).sum(2)
    return out


Shape = tuple[int, ...]


def _scale(pipe: EDMAugment, values: Values, open_: jax.Array, shape: Shape) -> tuple[jax.Array, Columns]:
    w = jnp.where(open_, values["w"], 0.0)
    factor = jnp.exp2(-pipe.scale_std * w)
    return _stretch(factor, factor), [w]


def _rotate(pipe: EDMAugment, values: Values, open_: jax.Array, shape: Shape) -> tuple[jax.Array, Columns]:
    angle = jnp.where(open_, pipe.rotate_max * jnp.pi * (2.0 * values["u"] - 1.0), 0.0)
    return _turn(angle), [jnp.cos(angle) - 1.0, jnp.sin(angle)]


def _anisotropic(pipe: EDMAugment, values: Values, open_: jax.Array, shape: Shape) -> tuple[jax.Array, Columns]:
    w = jnp.where(open_, values["w"], 0.0)
    axis = jnp.where(values["turned"] < pipe.anisotropic_turned, jnp.pi * (2.0 * values["axis"] - 1.0), 0.0)
    factor = jnp.exp2(pipe.anisotropic_std * w)
    step = _times(_turn(-axis), _stretch(1.0 / factor, factor), _turn(axis))
    return step, [w * jnp.cos(axis), w * jnp.sin(axis)]


def _translate(pipe: EDMAugment, values: Values, open_: jax.Array, shape: Shape) -> tuple[jax.Array, Columns]:
    x, y = (jnp.where(open_, values[name], 0.0) for name in ("x", "y"))
    shifts = -pipe.translate_std * shape[2] * x, -pipe.translate_std * shape[1] * y
    return _matrix([[1.0, 0.0, shifts[0]], [0.0, 1.0, shifts[1]], [0.0, 0.0, 1.0]], shape[0]), [x, y]


def _grey(images: jax.Array) -> jax.Array:
    """The component along (1, 1, 1)."""
    return jnp.broadcast_to(images.mean(-1, keepdims=True), images.shape)


def _colour(strength: str, change: Callable[[jax.Array, jax.Array], jax.Array]) -> Pixels:
    """`strength` names the attribute that scales the draws; "" for none."""

    def operation(pipe: EDMAugment, images: jax.Array, values: Values, open_: jax.Array) -> tuple[jax.Array, Columns]:
        w = jnp.where(open_, values["w"], 0.0)
        return change(images, (getattr(pipe, strength) if strength else 1.0) * w[:, None, None, None]), [w]

    return operation


def _hue(pipe: EDMAugment, images: jax.Array, values: Values, open_: jax.Array) -> tuple[jax.Array, Columns]:
    angle = jnp.where(open_, pipe.hue_max * jnp.pi * (2.0 * values["u"] - 1.0), 0.0)
    cos, sin = (f(angle)[:, None, None, None] for f in (jnp.cos, jnp.sin))
    # the cross product of (1, 1, 1) / sqrt(3) with the colour
    cross = (jnp.roll(images, 1, -1) - jnp.roll(images, -1, -1)) / math.sqrt(3.0)
    grey = _grey(images)
    return grey + (images - grey) * cos + cross * sin, [jnp.cos(angle) - 1.0, jnp.sin(angle)]


_PIXELS = {
    "xflip": _flip(2),
    "yflip": _flip(1),
    "rotate_int": _rotate_int,
    "translate_int": _translate_int,
    "brightness": _colour("brightness_std", lambda x, w: x + w),
    "contrast": _colour("contrast_std", lambda x, w: x * jnp.exp2(w)),
    "lumaflip": _colour("", lambda x, w: x - 2.0 * w * _grey(x)),
    "hue": _hue,
    "saturation": _colour("saturation_std", lambda x, w: _grey(x) + (x - _grey(x)) * jnp.exp2(w)),
}
_MATRICES = {"scale": _scale, "rotate": _rotate, "anisotropic": _anisotropic, "translate": _translate}


def _resample(images: jax.Array, inverse: jax.Array) -> jax.Array:
    """Images under an affine map, band-limited: doubled with sym6, sampled bilinearly, halved with sym6.

    Outside the images lies their reflection, as far as it reaches, then zeros. The reflected margin is the largest
    possible, so that shapes do not depend on the draws.

    Args:
      inverse: (B, 3, 3) from an output position (x, y, 1), in pixels from the image's centre, to the input's.
    """
    _, h, w, _ = images.shape
    taps = np.asarray(SYM6)
    x = jnp.pad(images, ((0, 0), (h - 1, h - 1), (w - 1, w - 1), (0, 0)), mode="reflect")
    zero = jnp.zeros((), x.dtype)
    for axis in (1, 2):
        # pixel q lies at 2 q of the doubled grid; sum_m h_m x(n + 5 - m)
        spread = [(0, 0, 0)] * 4
        spread[axis] = (6, 6, 1)
        x = _correlate(jax.lax.pad(x, zero, spread), taps[::-1], axis, 1)
    # the doubled grid's positions that the last filter reads, in pixels from the centre
    xs, ys = ((np.arange(-5, 2 * n + 5) - (n - 1)) / 2.0 for n in (w, h))
    at = jnp.asarray(np.stack(np.meshgrid(xs, ys), -1), jnp.float32)  # (2 h + 10, 2 w + 10, 2)
    matrix, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    source = (matrix[:, None, None] * at[None, :, :, None, :]).sum(-1) + shift[:, None, None]
    margins = jnp.asarray([w - 1 + 2 * (w - 1), h - 1 + 2 * (h - 1)], jnp.float32)
    x = _bilinear(x, 2.0 * source + margins)
    for axis in (1, 2):
        x = _correlate(x, taps, axis, 2)
    return x


def _correlate(x: jax.Array, taps: np.ndarray, axis: int, step: int) -> jax.Array:
    length = (x.shape[axis] - len(taps)) // step + 1
    limit = step * (length - 1) + 1
    parts = [float(t) * jax.lax.slice_in_dim(x, k, k + limit, step, axis) for k, t in enumerate(taps)]
    return sum(parts[1:], parts[0])


def _bilinear(images: jax.Array, where: jax.Array) -> jax.Array:
    """images (B, H, W, C) at positions where (B, H', W', 2) = (x, y) in pixels from the first; zeros outside."""
    b, h, w, c = images.shape
    low = jnp.floor(where)
    fraction = where - low
    flat = images.reshape(b, h * w, c)
    out = jnp.zeros((*where.shape[:3], c), images.dtype)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = low[..., 0] + dx, low[..., 1] + dy
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            index = (jnp.clip(y, 0, h - 1) * w + jnp.clip(x, 0, w - 1)).astype(jnp.int32)
            weight = jnp.abs(1 - dx - fraction[..., 0]) * jnp.abs(1 - dy - fraction[..., 1]) * inside
            values = jnp.take_along_axis(flat, index.reshape(b, -1, 1), axis=1).reshape(out.shape)
            out += weight[..., None] * values
    return out
