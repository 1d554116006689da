"""Built-in pictures with several objects each, for detectors and segmenters."""

from dataclasses import dataclass

from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class SceneRow:
    """Pictures that are there without files of the user's, with the box and the mask of every object.

    Attributes:
        name: The value of ``dataset``.
        title: What people call them.
        scenes: Called with ``image_size`` and by keyword ``num_images``, ``split`` ("train" or "test") and ``seed``;
            gives a ``d_emo.detection.augment.ObjectImages`` with masks that do not overlap.
        mirrors: Whether a mirrored object is still of its class; where not, ``flip`` is refused.
        licence: A sentence for model cards.
    """

    name: str
    title: str
    scenes: Reference
    mirrors: bool = True
    licence: str = ""


_DIGITS = (
    "The digits are scans from the UCI repository, which gives them under CC BY 4.0; scikit-learn's photographs are "
    "under CC BY 2.0."
)

SCENES: Table[SceneRow] = Table(
    "built-in scenes",
    [
        SceneRow(
            name="digit-scenes", title="scanned digits on photographs", scenes="d_emo.data.scenes:DigitScenes",
            mirrors=False,
            licence=_DIGITS,
        ),
        SceneRow(
            name="large-digit-scenes", title="large scanned digits on photographs",
            scenes="d_emo.data.scenes:LargeDigitScenes", mirrors=False, licence=_DIGITS,
        ),
        SceneRow(
            name="shape-scenes", title="shapes of Shapes-1000", scenes="d_emo.data.scenes:ShapeScenes",
            licence="The scenes are drawn by D-EMO's own code and bring none.",
        ),
        SceneRow(
            name="nuclei", title="a micrograph of nuclei in the package stardist", scenes="d_emo.data.nuclei:Nuclei",
            licence="The micrograph is one of the 2018 Data Science Bowl's and ships inside stardist, which is under "
            "the BSD 3-clause licence.",
        ),
        SceneRow(
            name="fundus", title="drawn fundus photographs with their vessels",
            scenes="d_emo.data.fundus:FundusDrawings",
            licence="The pictures are drawn by D-EMO's own code and bring none.",
        ),
    ],
)  # fmt: skip
