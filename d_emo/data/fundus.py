"""Fundus photographs that are drawn when asked for, and where their blood vessels are, exactly."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from math import dist

import numpy as np
import torch
from PIL import Image, ImageDraw

from d_emo.data.scenes import DrawnPictures, boxes_of
from d_emo.errors import imported

FINE = 3
"""Vessels are drawn so many times larger, for the share of each pixel that they cover."""
THINNEST = 1.1
"""Pixels, for a picture of 256; thinner vessels end."""
KEPT = 256
"""Pictures that a data set keeps, as drawing takes longer than a small network's step."""
ABSORBED = np.array([0.28, 0.62, 0.5])
"""How much of red, green and blue a thick vein takes away."""


@dataclass
class Vessel:
    """A line with a width at each of its points, in pixels."""

    vein: bool
    points: list[tuple[float, float]] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)


class FundusDrawings(DrawnPictures):
    """Drawn pictures of the eye's ground: trees of arteries and veins that grow out of the optic disc.

    A vessel wavers, tapers, and branches: where one of width w parts, the two have w1^3 + w2^3 = w^3 (Murray's law).
    The large ones bend around the fovea, which has none. Arteries are thinner and brighter than veins, and the large
    ones shine in the middle. Light is uneven, the ground mottled with dark patches, and there are spots of fat and
    bleedings, round or along the nerve fibres, which have the colour of vessels and are none. A pixel belongs to a
    vessel where half or more of it is covered.

    Args:
        image_size: Side of the square pictures in pixels, at least 32.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
    """

    name = "fundus"
    class_names = ["vessel"]

    def __init__(self, image_size: int = 256, *, num_images: int = 2000, split: str = "train", seed: int = 0):
        super().__init__(image_size, num_images, split, seed)
        self._drawn: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it: all vessels, as one object.

        Shape: (3, H, W) uint8; boxes (1, 4) as left, top, right, bottom, labels (1,), masks (1, H, W) uint8.
        """
        if index not in self._drawn:
            if len(self._drawn) >= KEPT:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[index] = self._draw(index)
        shown, masks = self._drawn[index]
        return shown, {"boxes": boxes_of(masks), "labels": torch.zeros(1, dtype=torch.long), "masks": masks}

    def _draw(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = self.draws(index, kind=1)
        eye = Eye(rng, self.image_size)
        vessels = eye.vessels()
        veins, arteries = (eye.covered([each for each in vessels if each.vein is vein]) for vein in (True, False))
        inside = eye.inside()
        pixels = eye.ground()
        for cover, strength in ((arteries, rng.uniform(0.4, 0.65)), (veins, rng.uniform(0.6, 0.9))):
            soft = blurred(cover, self.image_size / 256 * rng.uniform(0.5, 0.9))
            pixels *= 1 - strength * soft[..., None] * ABSORBED
        reflex = eye.covered([each for each in vessels if not each.vein], share=0.3, thinnest=2.4)
        pixels += rng.uniform(10, 60) * reflex[..., None]
        pixels *= inside[..., None]
        pixels = blurred(pixels, self.image_size / 256 * rng.uniform(0.3, 0.7))
        pixels += rng.normal(0, rng.uniform(1.5, 5), pixels.shape)
        mask = (np.maximum(veins, arteries) >= 0.5) & (inside >= 0.5)
        shown = torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
        return shown, torch.from_numpy(mask[None].astype(np.uint8))


class Eye:
    """What one picture is drawn from; lengths are in pixels of the picture.

    Args:
        rng: Of all that is drawn.
        size: Side of the picture.
    """

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.side = 1 if rng.integers(2) else -1  # which way from the disc the fovea lies
        self.radius = size * rng.uniform(0.46, 0.5)
        self.centre = np.array([size / 2, size / 2]) + rng.normal(0, 0.01 * size, 2)
        away = self.radius * rng.uniform(0.45, 0.85)
        self.disc = self.centre + (-self.side * away, self.radius * rng.normal(0, 0.08))
        self.disc_radius = size * rng.uniform(0.055, 0.075)
        self.fovea = self.disc + (self.side * self.disc_radius * rng.uniform(4.6, 5.6), self.disc_radius * 0.5)
        y, x = np.mgrid[:size, :size] + 0.5
        self.grid = np.stack([x, y], axis=-1)  # (size, size, 2)

    def distance(self, place: np.ndarray) -> np.ndarray:
        """Of every pixel from a place. Shape: (2,) -> (size, size)."""
        return np.hypot(*(self.grid - place).transpose(2, 0, 1))

    def inside(self) -> np.ndarray:
        """The round field of view, with a soft edge. Shape: (size, size), 0 to 1."""
        return (self.radius - self.distance(self.centre) + 0.5).clip(0, 1)

    def vessels(self) -> list[Vessel]:
        """Arcades above and below, towards the fovea and away from it, an artery and a vein in each; and small ones."""
        rng, found, scale = self.rng, [], self.size / 256
        for up in (-1, 1):
            for towards in (True, False):
                for vein in (True, False):
                    # headings are measured from the way to the fovea
                    heading = rng.uniform(1.1, 1.7) if towards else rng.uniform(1.7, 2.5)
                    home = rng.uniform(0, 0.35) if towards else rng.uniform(2.2, 3)
                    width = rng.uniform(3.2, 5.0) * (1 if vein else 0.7) * (1 if towards else 0.75) * scale
                    start = self.disc + rng.normal(0, 0.25 * self.disc_radius, 2)
                    self.grow(found, start, up * heading, up * home, width, vein)
        for _ in range(rng.integers(4, 9)):
            heading = rng.uniform(-np.pi, np.pi)
            self.grow(found, self.disc, heading, heading, rng.uniform(1.3, 2.2) * scale, bool(rng.integers(2)))
        return found

    def grow(
        self, found: list[Vessel], place: np.ndarray, heading: float, home: float, width: float, vein: bool
    ) -> None:
        """Add a vessel and its branches: a walk of small steps that wavers, and turns to its ``home`` heading."""
        rng, scale, waver = self.rng, self.size / 256, 0.0
        vessel, step = Vessel(vein), 2.0 * scale
        found.append(vessel)
        until = (8 + rng.exponential(22)) * scale  # the next branch
        while width > THINNEST * scale and dist(place, self.centre) < self.radius + 4 * scale:
            vessel.points.append((place[0], place[1]))
            vessel.widths.append(width)
            if width < 3 * scale and dist(place, self.fovea) < 0.9 * self.disc_radius:
                return  # the fovea has no vessels
            waver = 0.8 * waver + rng.normal(0, 0.03)
            heading += (home - heading) * step / (0.5 * self.radius) + waver
            place = place + step * np.array([self.side * np.cos(heading), np.sin(heading)])
            width *= 1 - 0.002
            until -= step
            if until < 0 and dist(place, self.disc) > 1.2 * self.disc_radius:
                share, turn = rng.uniform(0.08, 0.45), rng.choice((-1, 1)) * rng.uniform(0.5, 1.1)
                self.grow(found, place, heading + turn, heading + 0.6 * turn, width * share ** (1 / 3), vein)
                heading -= 0.35 * turn * share
                width *= (1 - share) ** (1 / 3)
                until = (7 + rng.exponential(26)) * scale

    def covered(self, vessels: list[Vessel], *, share: float = 1.0, thinnest: float = 0.0) -> np.ndarray:
        """How much of each pixel some vessels cover, or the middle ``share`` of those that are wider than ``thinnest``
        (pixels, for a picture of 256). Shape: (size, size), 0 to 1.
        """
        canvas = Image.new("L", (self.size * FINE, self.size * FINE))
        draw = ImageDraw.Draw(canvas)
        for each in vessels:
            points = [(x * FINE, y * FINE) for x, y in each.points]
            for one, other, width in zip(points, points[1:], each.widths, strict=False):
                if width < thinnest * self.size / 256:
                    break  # they taper
                half = share * width * FINE / 2
                draw.line([one, other], fill=255, width=max(1, round(2 * half)))
                draw.ellipse([other[0] - half, other[1] - half, other[0] + half, other[1] + half], fill=255)
        return np.asarray(canvas.reduce(FINE), dtype=np.float64) / 255

    def ground(self) -> np.ndarray:
        """All but vessels: light, mottles, disc, fovea, fat, bleedings. Shape: (size, size, 3), 0 to 255."""
        rng = self.rng
        colour = np.array([rng.uniform(150, 235), rng.uniform(70, 115), rng.uniform(30, 75)])
        away = self.distance(self.centre + rng.normal(0, 0.25 * self.radius, 2)) / self.radius
        light = 1.08 - rng.uniform(0.15, 0.5) * away**2
        light += 0.05 * self.smooth(4) + 0.035 * self.smooth(16) + 0.02 * self.smooth(48)
        patches = rng.uniform(0, 0.3) * (self.smooth(24) - 0.7).clip(0, 1)  # of pigment
        pixels = light[..., None] * (colour + 12 * self.smooth(6)[..., None] * (0.3, 1, 0.6))
        pixels *= 1 - patches[..., None] * (0.5, 1, 0.8)
        fovea = np.exp(-0.5 * (self.distance(self.fovea) / (0.9 * self.disc_radius)) ** 2)
        pixels *= 1 - rng.uniform(0.2, 0.45) * fovea[..., None] * (0.5, 1, 1)
        disc = 1 / (1 + np.exp((self.distance(self.disc) / self.disc_radius - 1) * 12))
        bright = np.array([250, 205, 140]) * rng.uniform(0.85, 1)
        pixels += disc[..., None] * (bright - pixels) * rng.uniform(0.75, 0.95)
        cup = np.exp(-0.5 * (self.distance(self.disc) / (0.4 * self.disc_radius)) ** 2)
        pixels += 30 * cup[..., None]
        for _ in range(rng.integers(0, 9)):
            part, spot = self.spot(rng.uniform(0.8, 2.5), 1)
            pixels[part] += rng.uniform(0.4, 1) * spot * (60, 70, 40)  # fat
        for _ in range(rng.integers(4, 24)):
            part, spot = self.spot(rng.uniform(0.8, 3.2), rng.choice((1, 1, 2.5)))
            pixels[part] *= 1 - rng.uniform(0.4, 0.9) * spot * ABSORBED  # blood
        return pixels

    def spot(self, radius: float, stretch: float) -> tuple[tuple[slice, slice], np.ndarray]:
        """A spot somewhere, longer than wide along the nerve fibres, which leave the disc: where, and how much there.

        Args:
            radius: Across, in pixels of a picture of 256.
            stretch: How many times longer it is.

        Shape: (h, w, 1), 0 to 1.
        """
        place, radius = self.centre + self.rng.uniform(-0.7, 0.7, 2) * self.radius, radius * self.size / 256
        reach = 2 * radius * stretch
        left, top = (max(0, int(each - reach)) for each in place)
        part = slice(top, int(place[1] + reach) + 1), slice(left, int(place[0] + reach) + 1)
        along = (place - self.disc) / (dist(place, self.disc) + 1e-9)
        away = self.grid[part] - place
        far = np.hypot(away @ along / stretch, away @ (-along[1], along[0])) / radius
        return part, np.exp(-(far[..., None] ** 4))

    def smooth(self, cells: int) -> np.ndarray:
        """Noise of standard deviation 1, smooth between so many cells a side. Shape: (size, size)."""
        coarse = Image.fromarray(self.rng.normal(0, 1, (cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((self.size, self.size), Image.Resampling.BICUBIC), dtype=np.float64)


def photograph() -> np.ndarray | None:
    """A real eye's ground, where scikit-image is installed: the photograph that ships in it, made smaller.

    By Mikael Häggström, CC0: Medical gallery of Mikael Häggström 2014, WikiJournal of Medicine 1 (2).

    Shape: (448, 448, 3) uint8.
    """
    if find_spec("skimage") is None:
        return None
    data = imported("skimage.data", "the photograph comes with scikit-image", "d-emo[medical]")
    return np.asarray(Image.fromarray(data.retina()).resize((448, 448), Image.Resampling.LANCZOS))


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur of maps, at the edges by repeating them. Shape: (H, W) or (H, W, C) -> same."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, (radius, radius) + (0,) * (values.ndim - 2), mode="nearest", truncate=3)
