"""Shapes-1000: one shape of one colour on one ground, drawn when asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from d_emo.data.images import ClassImages, check_image_size, split_number

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "bar")
COLOURS = {
    "red": (225, 40, 45), "orange": (250, 135, 20), "yellow": (250, 225, 50), "green": (60, 190, 60),
    "cyan": (50, 215, 225), "blue": (50, 90, 235), "purple": (140, 55, 190), "pink": (250, 120, 195),
    "brown": (135, 80, 35), "white": (250, 250, 250),
}  # fmt: skip
GROUNDS = {
    "black": (22, 22, 26), "grey": (115, 118, 122), "silver": (185, 188, 192), "navy": (25, 35, 85),
    "forest": (25, 70, 45), "maroon": (85, 22, 38), "sand": (214, 190, 140), "sky": (150, 190, 225),
    "mint": (165, 222, 185), "lilac": (192, 165, 222),
}  # fmt: skip
REACH = 1.15
"""No shape reaches further from its centre than so many times its radius."""
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_GROUND_PALETTE = np.array(list(GROUNDS.values()), dtype=np.float32)


def _polygon(angles_deg: list[float], radii: list[float]) -> np.ndarray:
    angles = np.deg2rad(angles_deg)
    return np.stack([np.array(radii) * np.sin(angles), -np.array(radii) * np.cos(angles)], axis=1)


_POLYGONS = {
    "square": np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "triangle": _polygon([0, 120, 240], [1.1, 1.1, 1.1]),
    "star": _polygon([36.0 * i for i in range(10)], [1.1, 0.45] * 5),
    "cross": np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3),
                       (-1, .3), (-1, -.3), (-.3, -.3)]),
    "arrow": np.array([(0, -1.1), (0.85, -0.1), (0.32, -0.1), (0.32, 1.0), (-0.32, 1.0), (-0.32, -0.1), (-0.85, -0.1)]),
    "bar": np.array([(-0.3, -1.1), (0.3, -1.1), (0.3, 1.1), (-0.3, 1.1)]),
}


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon, negative inside: nearest edge, sign from the crossing number."""
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) * (1 / (ex * ex + ey * ey)), 0, 1)
        np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2, out=squared)
        if ay != by:  # a horizontal edge is never crossed by a horizontal ray
            inside ^= ((y >= ay) != (y >= by)) & (px < py * (ex / ey))
    distance = np.sqrt(squared)
    return np.where(inside, -distance, distance)


def _shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance from points to a shape of about unit radius; y grows downwards."""
    if shape in _POLYGONS:
        return _polygon_distance(x, y, _POLYGONS[shape])
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    if shape == "crescent":
        return np.maximum(np.hypot(x, y) - 1.0, 0.85 - np.hypot(x - 0.5, y))
    # heart: two discs over the lower half of a diamond, whose upper edges are their diameters
    x, y = np.abs(x), y - 0.1
    diamond = (x + np.abs(y) - 0.84) * np.sqrt(0.5)
    return np.minimum(diamond, np.hypot(x - 0.42, y + 0.42) - 0.42 * np.sqrt(2))


class ShapeScene(NamedTuple):
    """Everything that decides one picture of Shapes-1000; lengths are shares of half the image side."""

    shape: int
    colour: int
    ground: int
    x: float
    y: float
    radius: float
    angle: float
    brightness: float
    light_angle: float
    light_strength: float


def draw_scene(scene: ShapeScene, image_size: int) -> np.ndarray:
    """Draw one scene, anti-aliased by its signed distance.

    Returns:
        float32 RGB in [-1, 1]. Shape: (image_size, image_size, 3).
    """
    ground, colour = _GROUND_PALETTE[scene.ground], _PALETTE[scene.colour]
    return _lit(ground + _coverage(scene, image_size)[..., None] * (colour - ground), scene)


def draw_scenes(scenes: Sequence[ShapeScene], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw several shapes on the ground of the first, under its light.

    Returns:
        float32 RGB in [-1, 1], and the masks of the shapes: the pixels that a shape covers to a half or more.

    Shape: -> (image_size, image_size, 3), (n, image_size, image_size) uint8.
    """
    rgb = np.broadcast_to(_GROUND_PALETTE[scenes[0].ground], (image_size, image_size, 3)).copy()
    masks = np.zeros((len(scenes), image_size, image_size), dtype=np.uint8)
    for mask, scene in zip(masks, scenes, strict=True):
        middle, reach = (np.array([scene.y, scene.x]) + 1) * image_size / 2, REACH * scene.radius * image_size / 2 + 1
        edges = np.stack([np.floor(middle - reach).clip(min=0), np.ceil(middle + reach)], axis=1).astype(int)
        window = tuple(slice(*each) for each in edges)
        covered = _coverage(scene, image_size, *window)
        rgb[window] += covered[..., None] * (_PALETTE[scene.colour] - rgb[window])
        mask[window] = covered >= 0.5
    return _lit(rgb, scenes[0]), masks


def _coverage(
    scene: ShapeScene, image_size: int, rows: slice = slice(None), columns: slice = slice(None)
) -> np.ndarray:
    """Share of each pixel that the shape covers, in some rows and columns. Shape: (H, W) float32."""
    axis = _centres(image_size)
    x, y = axis[None, columns], axis[rows, None]
    cos, sin = np.cos(scene.angle) / scene.radius, np.sin(scene.angle) / scene.radius
    u, v = x - scene.x, y - scene.y
    distance = _shape_distance(SHAPES[scene.shape], u * cos + v * sin, v * cos - u * sin)
    return np.clip(0.5 - distance * (scene.radius * image_size / 2), 0, 1)


def _centres(image_size: int) -> np.ndarray:
    """Where the pixels of a row lie, from -1 to 1. Shape: (image_size,) float32."""
    return ((np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size)) - 1


def _lit(rgb: np.ndarray, scene: ShapeScene) -> np.ndarray:
    """Colours from 0 to 255 under the light of a scene. Shape: (H, W, 3) -> same, float32 in [-1, 1]."""
    x, y = _centres(len(rgb))[None, :], _centres(len(rgb))[:, None]
    light = scene.light_strength * (x * np.cos(scene.light_angle) + y * np.sin(scene.light_angle))
    light = (scene.brightness * (1 + light))[..., None]
    return np.clip(rgb * (light * np.float32(2 / 255)) - 1, -1, 1).astype(np.float32, copy=False)


class Shapes1000(ClassImages):
    """One shape of one colour on one ground; 10 x 10 x 10 classes, drawn when asked for.

    Class id = 100 * shape + 10 * colour + ground. Position, size, rotation and light come from a generator seeded by
    (seed, split, index), so an image depends on these and the image size alone, at every resolution the same scene.

    Args:
        image_size: Side in pixels, at least 8.
        num_images: Length of the data set; labels go round the classes.
        split: "train" or "test"; different pictures of the same classes.
        seed: Seed of the whole set.
    """

    name = "shapes"

    def __init__(self, image_size: int = 64, *, num_images: int = 1_000_000, split: str = "train", seed: int = 0):
        check_image_size(image_size)
        self.image_size, self.num_images, self.seed = image_size, num_images, seed
        self._split = split_number(split)
        self.class_names = [f"{c} {s} on {g}" for s in SHAPES for c in COLOURS for g in GROUNDS]

    def __len__(self) -> int:
        return self.num_images

    def label(self, index: int) -> int:
        return index % 1000

    def scene(self, index: int) -> ShapeScene:
        """The scene behind image ``index``."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed * 2 + self._split, index]))
        draw = rng.random(7)
        label = self.label(index)
        radius = 0.32 + 0.28 * draw[0]
        reach = 1 - REACH * radius  # the shape may touch the border, not leave through it
        return ShapeScene(
            shape=label // 100, colour=label // 10 % 10, ground=label % 10, x=reach * (2 * draw[1] - 1),
            y=reach * (2 * draw[2] - 1), radius=radius, angle=2 * np.pi * draw[3], brightness=0.88 + 0.14 * draw[4],
            light_angle=2 * np.pi * draw[5], light_strength=0.12 * draw[6],
        )  # fmt: skip

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        image = draw_scene(self.scene(index), self.image_size)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), self.label(index)


def is_empty(images: torch.Tensor) -> torch.Tensor:
    """Whether there is nothing but a ground: of 200 pixels not one is further than 40 from the median in a channel.

    The smallest shape covers 3 of 100 pixels, and differs by 51 from its ground.

    Shape: images (B, 3, H, W) uint8 -> (B,) bool.
    """
    pixels = images.flatten(2).float()
    away = (pixels - pixels.median(dim=2, keepdim=True).values).abs().amax(dim=1)  # (B, H W)
    return (away > 40).float().mean(dim=1) < 1 / 200
