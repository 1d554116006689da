"""``d-emo demo``."""

from d_emo.config import SegmentationDemoSettings
from d_emo.lab.segmentation_demo import run_demo


def run(settings: SegmentationDemoSettings) -> None:
    """Do it."""
    run_demo(settings)
