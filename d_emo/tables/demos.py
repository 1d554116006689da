"""Demos: small runs from nothing to a figure and a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d_emo.tables.table import Reference, Table

CONFIGS = Path(__file__).parents[1] / "demos"


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """A demo.

    Attributes:
        name: ``d-emo demo NAME``.
        title: What it shows, in a few words.
        runs: What is trained, in order: of each run its verb and its YAML file of settings, in `CONFIGS` or anywhere.
        conclude: Called without arguments when all are trained; prints the figures and draws the picture.
        needs: Modules that must be there, by the extra of ``d-emo`` that brings them.
    """

    name: str
    title: str
    runs: tuple[tuple[str, str], ...]
    conclude: Reference
    needs: Mapping[str, str] | None = None

    def configs(self) -> list[tuple[str, Path]]:
        """Verb and YAML file of every run."""
        return [(verb, CONFIGS / config) for verb, config in self.runs]


DEMOS: Table[DemoRow] = Table("demo", [
    DemoRow(
        name="detect", title="find scanned digits on photographs",
        runs=(("train-classifier", "classifier.yaml"), ("train-detector", "detector.yaml"),
              ("train-detector", "detector_floor.yaml")),
        conclude="d_emo.cli.demo_detect:conclude", needs={"detection": "faster_coco_eval"},
    ),
    DemoRow(
        name="segment", title="name the pixels of scanned digits on photographs",
        runs=(("train-classifier", "classifier.yaml"), ("train-segmenter", "segmenter.yaml"),
              ("train-segmenter", "segmenter_floor.yaml")),
        conclude="d_emo.cli.demo_segment:conclude",
    ),
    DemoRow(
        name="medical", title="find blood vessels in drawn fundus photographs, and in a real one",
        runs=(("train-segmenter", "medical_u-emo.yaml"), ("train-segmenter", "medical_unet.yaml")),
        conclude="d_emo.cli.demo_medical:conclude",
    ),
    DemoRow(
        name="deit", title="fine-tune DeiT-Tiny with i2RMBs on scanned digits",
        runs=(("train-classifier", "deit_shapes.yaml"), ("train-classifier", "deit_digits.yaml")),
        conclude="d_emo.cli.demo_deit:conclude",
    ),
    DemoRow(
        name="video", title="tell motions of digits apart, which no single frame shows",
        runs=(("train-video", "video.yaml"), ("train-video", "video_frames.yaml")),
        conclude="d_emo.cli.demo_video:conclude",
    ),
])  # fmt: skip
