"""Procedural pictures: objects that are a shape filled with a texture, on a cluttered background.

A picture is a pure function of (seed, split, index, size): no global state, no dependence on order or process.
Everything is drawn with numpy on pixel centres of a unit canvas (no font, no rasteriser), so that a different Pillow
cannot change it. Random numbers are `Generator.random` values of PCG64 alone, the part of numpy's stream that is
least likely to ever change. Geometry and colours do not depend on `size`; only the pixel noise, drawn last, does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

DRAWING_VERSION = 1
"""Part of every digest: raise it whenever a change here moves a pixel."""

SHAPES = ("disk", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "checkered")
CLASS_NAMES = tuple(f"{texture}_{shape}" for shape in SHAPES for texture in TEXTURES)
"""A class is a pair: neither the shape nor the texture alone decides, and colours say nothing."""

MAX_TILT = 0.45
"""Objects lean up to this many radians to either side."""

_SPLITS = {"train": 0, "val": 1}
_MAX_PLACING_ATTEMPTS = 30


@dataclass(frozen=True, slots=True)
class DrawnObject:
    """One object of a scene. `box` is tight: (x, y, width, height) in whole pixels; `area` counts its pixels.

    `runs` is its mask as COCO writes one: lengths of runs outside and inside in turns, column by column.
    """

    label: int
    box: tuple[int, int, int, int]
    area: int
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture [size, size, 3] uint8 RGB and what is to be seen in it."""

    pixels: NDArray[np.uint8]
    objects: tuple[DrawnObject, ...]


@dataclass(frozen=True, slots=True)
class _Pose:
    """Where an object stands on the unit canvas: centre, circumscribed radius, rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float


class _Dice:
    """Uniform numbers from one `Generator.random` stream."""

    def __init__(self, seed: int, split: str, index: int, kind: int) -> None:
        entropy = np.random.SeedSequence([DRAWING_VERSION, seed, _SPLITS[split], kind, index])
        self._generator = np.random.Generator(np.random.PCG64(entropy))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def below(self, n: int) -> int:
        return int(self._generator.random() * n)

    def chance(self, probability: float) -> bool:
        return float(self._generator.random()) < probability

    def field(self, *shape: int) -> Array:
        return self._generator.random(shape, dtype=np.float32)


def draw_labelled(seed: int, split: str, index: int, size: int) -> tuple[NDArray[np.uint8], int]:
    """One picture [size, size, 3] with one large object, and its label; classes take turns along `index`."""
    dice = _Dice(seed, split, index, kind=0)
    label = index % len(CLASS_NAMES)
    canvas, background = _draw_background(dice, size)
    radius = dice.between(0.22, 0.45)
    reach = max(0.5 - 0.85 * radius, 0.0)
    pose = _Pose(
        0.5 + dice.between(-reach, reach), 0.5 + dice.between(-reach, reach), radius, dice.between(-MAX_TILT, MAX_TILT)
    )
    _draw_object(canvas, dice, label, pose, background)
    _draw_lines(canvas, dice, dice.below(2), width=dice.between(0.008, 0.014))
    return _finish(canvas, dice), label


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """A picture for detection: one to four objects that hardly overlap, with tight boxes."""
    dice = _Dice(seed, split, index, kind=1)
    canvas, background = _draw_background(dice, size)
    objects = []
    for pose in _place_apart(dice, 1 + dice.below(4)):
        label = dice.below(len(CLASS_NAMES))
        mask = _draw_object(canvas, dice, label, pose, background)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        box = (x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)
        objects.append(DrawnObject(label, box, int(mask.sum()), _runs(mask)))
    _draw_lines(canvas, dice, dice.below(2), width=dice.between(0.004, 0.01))
    return Scene(_finish(canvas, dice), tuple(objects))


def _place_apart(dice: _Dice, count: int) -> list[_Pose]:
    """Poses whose circles do not touch; fewer than `count` when the canvas is full."""
    poses: list[_Pose] = []
    for _ in range(_MAX_PLACING_ATTEMPTS):
        radius = dice.between(0.09, 0.24)
        x, y = dice.between(radius, 1 - radius), dice.between(radius, 1 - radius)
        pose = _Pose(x, y, radius, dice.between(-MAX_TILT, MAX_TILT))
        if all(math.hypot(pose.x - p.x, pose.y - p.y) > pose.radius + p.radius for p in poses):
            poses.append(pose)
        if len(poses) == count:
            break
    return poses


def _grid(size: int) -> tuple[Array, Array]:
    centres = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    return centres[None, :], centres[:, None]


def _colour(dice: _Dice, low: float = 0.0, high: float = 1.0) -> Array:
    return np.array([dice.between(low, high) for _ in range(3)], dtype=np.float32)


def _colour_far_from(dice: _Dice, others: list[Array], distance: float, low: float, high: float) -> Array:
    """A colour that the eye can tell from `others`; the farthest of a few tries when none is far enough."""
    best, best_distance = others[0], -1.0
    for _ in range(12):
        candidate = _colour(dice, low, high)
        gap = min(float(np.abs(candidate - other).sum()) for other in others)
        if gap > best_distance:
            best, best_distance = candidate, gap
        if gap >= distance:
            break
    return best


def _blend(canvas: Array, colour: Array, alpha: Array) -> None:
    canvas += alpha[..., None] * (colour - canvas)


def _draw_background(dice: _Dice, size: int) -> tuple[Array, Array]:
    """A gradient, blobs, a patch with some texture, and lines. Returns the canvas and the background's mean colour."""
    x, y = _grid(size)
    base = _colour(dice, 0.0, 0.5)
    angle = dice.between(0, 2 * math.pi)
    slope = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
    tint = (_colour(dice) - 0.5) * 0.5
    canvas = (base + slope[..., None] * tint).astype(np.float32)
    for _ in range(1 + dice.below(3)):
        spread = dice.between(0.04, 0.16)
        squared = (x - dice.between(0, 1)) ** 2 + (y - dice.between(0, 1)) ** 2
        glow = 0.8 * np.exp(-squared / (2 * spread * spread))
        _blend(canvas, base + (_colour(dice) - 0.5) * 0.6, glow.astype(np.float32))
    if dice.chance(0.4):
        _draw_patch(canvas, dice, base)
    _draw_lines(canvas, dice, dice.below(3), width=dice.between(0.01, 0.025))
    return canvas, base


def _draw_patch(canvas: Array, dice: _Dice, base: Array) -> None:
    """A faint half-plane of any texture, so that a texture somewhere in the picture does not give the class away."""
    size = canvas.shape[0]
    x, y = _grid(size)
    angle = dice.between(0, 2 * math.pi)
    side = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) - dice.between(-0.2, 0.3)
    texture = TEXTURES[dice.below(len(TEXTURES))]
    pattern = _texture(texture, dice, x - 0.5, y - 0.5, period=dice.between(0.08, 0.16), size=size)
    _blend(canvas, base + (_colour(dice) - 0.5) * 0.4, pattern * np.clip(0.5 + side * size, 0, 1))


def _draw_lines(canvas: Array, dice: _Dice, count: int, width: float) -> None:
    size = canvas.shape[0]
    x, y = _grid(size)
    for _ in range(count):
        angle = dice.between(0, math.pi)
        offset = dice.between(-0.5, 0.5)
        distance = np.abs((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) - offset)
        _blend(canvas, _colour(dice, 0.0, 0.7), np.clip(0.5 + (width / 2 - distance) * size, 0, 1))


def _draw_object(canvas: Array, dice: _Dice, label: int, pose: _Pose, background: Array) -> NDArray[np.bool_]:
    """Draws one object in place. Returns the mask [size, size] of the pixels that it covers by half or more."""
    size = canvas.shape[0]
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    first = _colour_far_from(dice, [background], 1.2, 0.45, 1.0)
    second = _colour_far_from(dice, [background, first], 0.9, 0.0, 1.0)
    # Only the window around the object is computed: scenes are larger than their objects.
    left, right = (int(np.clip(round((pose.x + s * pose.radius) * size) + s, 0, size)) for s in (-1, 1))
    top, bottom = (int(np.clip(round((pose.y + s * pose.radius) * size) + s, 0, size)) for s in (-1, 1))
    x, y = _grid(size)
    dx, dy = (x[:, left:right] - pose.x) / pose.radius, (y[top:bottom] - pose.y) / pose.radius
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    pixels_per_unit = pose.radius * size
    alpha = np.clip(0.5 - _SHAPE_DISTANCE[shape](u, v) * pixels_per_unit, 0, 1)
    pattern = _texture(texture, dice, dx, dy, period=dice.between(0.5, 0.7), size=pixels_per_unit)
    fill = first + pattern[..., None] * (second - first)
    window = canvas[top:bottom, left:right]
    window += alpha[..., None] * (fill - window)
    mask = np.zeros((size, size), dtype=np.bool_)
    mask[top:bottom, left:right] = alpha >= 0.5
    return mask


def _runs(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return (0, *lengths) if flat[0] else tuple(lengths)


def _disk(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - np.float32(0.9)


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.7)


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(-v, np.abs(u) * np.float32(math.sqrt(3) / 2) + v * np.float32(0.5)) - np.float32(0.5)


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(a, b) - np.float32(0.32), np.maximum(a, b) - np.float32(0.92))


# Distance to the outline in units of the circumscribed radius, negative inside; exact near straight edges.
_SHAPE_DISTANCE: dict[str, Callable[[Array, Array], Array]] = {
    "disk": _disk,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def _texture(name: str, dice: _Dice, x: Array, y: Array, *, period: float, size: float) -> Array:
    """How much of the second colour shows at each point, 0 to 1; `size` is pixels per unit (for soft edges)."""
    angle, phase_u, phase_v = dice.between(0, math.pi), dice.between(0, 1), dice.between(0, 1)
    if name == "plain":
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)
    cos, sin, frequency = math.cos(angle), math.sin(angle), 2 * math.pi / period
    wave = np.sin((x * cos + y * sin) * frequency + 2 * math.pi * phase_u)
    if name == "checkered":
        wave = wave * np.sin((y * cos - x * sin) * frequency + 2 * math.pi * phase_v)
    contrast = max(1.0, period * size / 5)  # an edge is about one pixel wide
    return np.clip(0.5 + contrast * wave, 0, 1)


def _finish(canvas: Array, dice: _Dice) -> NDArray[np.uint8]:
    """Brightness, contrast and pixel noise, then 8 bits."""
    contrast, brightness, noise = dice.between(0.75, 1.1), dice.between(-0.08, 0.08), dice.between(0.0, 0.08)
    canvas = (canvas - 0.5) * np.float32(contrast) + np.float32(0.5 + brightness)
    canvas += (dice.field(*canvas.shape) - np.float32(0.5)) * np.float32(noise)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
