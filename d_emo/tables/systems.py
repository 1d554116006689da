"""Detectors and segmenters on EMO backbones, as the papers' tables have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from d_emo.tables.table import Reference, Table

EMOV2 = ("emov2_1m", "emov2_2m", "emov2_5m", "emov2_20m")
EMOV1 = ("emov1_1m", "emov1_2m", "emov1_5m")


@dataclass(frozen=True, kw_only=True)
class SystemRow:
    """A kind of detector or segmenter; its networks are called NAME-BACKBONE, such as ``ssdlite-emov2_5m``.

    One without a backbone of its own choice is called NAME.

    Attributes:
        name: First part of the names.
        task: What its networks do.
        network: Gives a module of the name of the backbone, if any, and, by keyword, its own settings. It has
            ``in_chans``, ``input_size`` (height and width that the papers count at) and ``num_classes``; where a call
            does more than the papers count, ``counted_outputs`` is the part that they count.
        backbones: Those that it has a row with in the papers.
        options: Settings that make this row another than the network's defaults.
    """

    name: str
    task: Literal["detection", "segmentation"]
    network: Reference
    backbones: tuple[str, ...] = EMOV2
    options: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS: Table[SystemRow] = Table(
    "detector or segmenter",
    [
        SystemRow(
            name="ssdlite", task="detection", network="d_emo.detection.ssdlite:ssdlite", backbones=EMOV2 + EMOV1
        ),
        SystemRow(
            name="ssdlite512", task="detection", network="d_emo.detection.ssdlite:ssdlite", options={"image_size": 512}
        ),
        SystemRow(
            name="retinanet", task="detection", network="d_emo.detection.retinanet:retinanet", backbones=EMOV2 + EMOV1
        ),
        SystemRow(name="maskrcnn", task="detection", network="d_emo.detection.maskrcnn:maskrcnn"),
        SystemRow(
            name="deeplabv3", task="segmentation", network="d_emo.segmentation.networks:DeepLabV3",
            backbones=EMOV2 + EMOV1,
        ),
        SystemRow(
            name="pspnet", task="segmentation", network="d_emo.segmentation.networks:PSPNet", backbones=EMOV2 + EMOV1
        ),
        SystemRow(
            name="semfpn", task="segmentation", network="d_emo.segmentation.networks:SemanticFPN",
            backbones=EMOV2 + EMOV1,
        ),
        SystemRow(name="segformer", task="segmentation", network="d_emo.segmentation.networks:SegFormer"),
        *(
            SystemRow(
                name=name, task="segmentation", network="d_emo.segmentation.unet:UNet", backbones=(),
                options={"window_size": window},
            )
            for name, window in (("u-emo", 8), ("u-emo-w10", 10), ("unet", None))
        ),
    ],
)  # fmt: skip


def systems() -> dict[str, tuple[SystemRow, str]]:
    """Every named detector and segmenter: its row and its backbone."""
    return {
        f"{row.name}-{backbone}" if backbone else row.name: (row, backbone)
        for row in SYSTEMS.values() for backbone in row.backbones or ("",)
    }  # fmt: skip


def system_of(model: str) -> SystemRow | None:
    """The row of a detector's or segmenter's name in any case; None for other names."""
    return next((row for name, (row, _) in systems().items() if name.lower() == model.lower()), None)
