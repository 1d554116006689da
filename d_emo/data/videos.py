"""From a video file to the frames of a clip, by PyAV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d_emo.data.reading import naming
from d_emo.errors import InputError, imported

VIDEOS = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
}  # fmt: skip
"""Endings of the files that are taken for videos."""


def is_video(path: str | Path) -> bool:
    """Whether a file is taken for a video, by its name."""
    return Path(path).suffix.lower() in VIDEOS


@dataclass(frozen=True)
class ClipSampler:
    """Which frames of a video make a clip, by the times at which they are shown; so a changing rate does not matter.

    Uniform: one frame of each of as many equal parts of the video as a clip has frames (TSN, section 3.1). Dense:
    frames a fixed time apart, as long as ``interval`` frames take on average (SlowOnly's and I3D's way); a clip longer
    than the video repeats the last frame.

    Attributes:
        frames: Of a clip, T.
        kind: "uniform" or "dense".
        interval: Of dense: frames of the video from one of the clip to the next.
    """

    frames: int = 4
    kind: Literal["uniform", "dense"] = "uniform"
    interval: int = 8

    def times(
        self, shown: np.ndarray, end: float, *, clips: int = 1, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Times of the frames of some clips, spread evenly over the video; with ``rng`` at random.

        Args:
            shown: When each frame is shown first, in seconds, rising. Shape: (n,).
            end: When the last frame ends.
            clips: Number of clips, K.
            rng: For training.

        Shape: -> (K, T).
        """
        start = float(shown[0])
        frame = (end - start) / len(shown)
        spread = (np.arange(clips)[:, None] + 0.5) / clips  # (K, 1) in (0, 1)
        if self.kind == "uniform":
            place = spread if rng is None else rng.random((clips, self.frames))
            found = start + (np.arange(self.frames) + place) / self.frames * (end - start)  # (K, T)
        else:
            step = frame * self.interval
            room = max(0.0, end - start - step * (self.frames - 1) - frame)
            place = spread if rng is None else rng.random((clips, 1))
            found = start + frame / 2 + place * room + np.arange(self.frames) * step  # (K, T)
        return found + 0.02 * frame  # so that at the edge of two frames no rounding decides


def read_frames(
    path: Path, choose: Callable[[np.ndarray, float], np.ndarray]
) -> tuple[dict[int, np.ndarray], np.ndarray, int]:
    """Some frames of a video, upright as its display matrix says.

    The file is read twice: its time stamps first, without decoding, then the frames up to the last that is wanted.
    Frames that an edit list hides, as in a clip cut without encoding it anew, are decoded and left out.

    Args:
        path: The file.
        choose: Times in seconds of any shape, of (when each frame is shown first, when the last one ends).

    Returns:
        The frames by their number, (H, W, 3) uint8 each; the number of the frame at each time; how many the video has.

    Raises:
        InputError: The file cannot be read as a video; the sentence names it. PyAV is not installed.
    """
    av = import_av()
    with naming(lambda: str(path), "video"):
        with av.open(str(path)) as container:
            stream = _stream_of(container)
            stamps = np.unique([
                stamp for each in container.demux(stream)
                if each.size and not each.is_discard and (stamp := stamp_of(each)) is not None
            ])  # fmt: skip
        if not len(stamps):
            raise InputError("none of its frames is shown at a time")
        tick = float(stream.time_base)
        last = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else 1 / tick
        shown = stamps * tick
        times = choose(shown, float((stamps[-1] + last) * tick))
        numbers = np.clip(np.searchsorted(shown, times, side="right") - 1, 0, None)
        frames = {}
        wanted = iter(np.unique(numbers).tolist())
        with av.open(str(path)) as container:
            number, held = next(wanted), None
            for frame in container.decode(_stream_of(container)):
                while number is not None and held is not None and stamp_of(frame) > stamps[number]:
                    frames[number], number = held, next(wanted, None)  # it was shown until now
                if number is None:
                    break
                held = frame
        if held is None:
            raise InputError("none of its frames can be decoded")
        while number is not None:
            frames[number], number = held, next(wanted, None)
        pictures: dict[int, np.ndarray] = {}
        for frame in frames.values():
            if id(frame) not in pictures:
                pictures[id(frame)] = upright(frame.to_ndarray(format="rgb24"), matrix_of(frame))
    return {number: pictures[id(frame)] for number, frame in frames.items()}, numbers, len(stamps)


def upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """A picture turned and mirrored by a display matrix (ISO 14496-12, section 8.3.2), to the nearest right angle.

    Args:
        pixels: As they are stored. Shape: (H, W, 3).
        matrix: Nine numbers a, b, u, c, d, v, x, y, w: the pixel (p, q) is shown at (a p + c q + x, b p + d q + y).
    """
    if matrix is None:
        return pixels
    a, b, _, c, d = (float(value) for value in matrix[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def matrix_of(frame: Any) -> np.ndarray | None:
    """The display matrix that comes with a frame, (9,) int32; None where there is none."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(data), dtype=np.int32)[:9]
    return None


def stamp_of(part: Any) -> int | None:
    """When a packet or frame is shown, or where the file does not say it, decoded; in the stream's ticks."""
    return part.pts if part.pts is not None else part.dts


def import_av() -> Any:
    """PyAV; InputError where it is not installed."""
    return imported("av", "videos are read by PyAV", "d-emo[video]")


def _stream_of(container: Any) -> Any:
    if not container.streams.video:
        raise InputError("there are no pictures in it")
    return container.streams.video[0]
