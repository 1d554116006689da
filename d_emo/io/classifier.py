"""Classifiers of images in [-1, 1], wherever they come from, and the images to measure them on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.config import EvaluateClassifierSettings, check_values
from d_emo.data import ClassImages, Reading, in_order_of, open_dataset
from d_emo.errors import InputError
from d_emo.files import read_json
from d_emo.io.snapshot import ClassifierSnapshot, load_classifier
from d_emo.io.training_state import load_state
from d_emo.models import EMO, create_model
from d_emo.models.convert import read_released_classifier
from d_emo.models.registry import model_kind
from d_emo.tables import DATASETS, family_of
from d_emo.weights import check_finite, load_weights, without_adapters


class Normalized(nn.Module):
    """A classifier that takes images in [-1, 1], whatever normalisation and fixed size it was trained with.

    Shape: (B, 3, H, W) -> (B, num_classes).
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int | None = None):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("scale", 0.5 / torch.tensor(std)[:, None, None])
        self.register_buffer("offset", (0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.model(images * self.scale + self.offset)


def normalized(model: nn.Module) -> Normalized:
    """A timm model behind its own ``pretrained_cfg``."""
    cfg = model.pretrained_cfg
    return Normalized(model, cfg["mean"], cfg["std"], cfg["input_size"][-1] if cfg.get("fixed_input_size") else None)


VALIDATE_DIR = {"validate_dir": str | None}
"""What is read of the settings that lie with a snapshot."""


@dataclass(frozen=True)
class Classifier:
    """A classifier of images in [-1, 1], in eval mode, and what is known of the images it was trained on.

    ``validate_dir`` holds the images that its run was validated on, where those were the user's own.
    """

    name: str
    model: nn.Module
    num_classes: int
    class_names: list[str] | None
    image_size: int
    dataset: str | None
    validate_dir: str | None = None

    @property
    def emo(self) -> EMO:
        """The network without what normalises images for it.

        Raises:
            InputError: if a folder in timm's layout holds another kind of network.
        """
        network = getattr(self.model, "model", self.model)
        if not isinstance(network, EMO):
            raise InputError(f"{self.name} holds a {type(network).__name__}; this works with EMOv1 and EMOv2 only")
        return network


def open_classifier(source: str, weights: str = "ema") -> Classifier:
    """A snapshot or run folder of ours, a released file, a folder in timm's layout, or a name (with random weights).

    With ``weights`` "raw", a snapshot's before averaging, which the training state of its step keeps.

    Raises:
        InputError: if it is none of them, or damaged; if there are no raw weights.
    """
    path = Path(source)
    if weights == "raw" and (not path.is_dir() or (path / "config.json").exists()):
        raise InputError(f"`weights` raw is for snapshots trained here; {source} holds one set of weights")
    if not path.exists() and path.suffix not in (".pth", ".pt", ".safetensors"):
        if "/" in source and family_of(source) is None:
            raise InputError(f"the classifier {source} does not exist")
        if (kind := model_kind(source)) != "classifier":
            raise InputError(f"{source} is a {kind}; name a classifier such as emov2_5m")
        torch.manual_seed(0)
        return Classifier(f"{source} with random weights", create_model(source).eval(), 1000, None, 224, None)
    if path.is_dir() and not (path / "config.json").exists():
        snapshot, name = open_snapshot(path, weights)
        built_in = snapshot.meta.get("data")
        return Classifier(name, snapshot.model, len(snapshot.class_names), snapshot.class_names, snapshot.image_size,
                          built_in if built_in in DATASETS else None, validate_dir_of(snapshot))
    if path.is_dir():
        import timm  # brings torchvision along, which is not needed where it is not

        try:
            model = timm.create_model(f"local-dir:{path}", pretrained=True)
        except Exception as error:  # timm raises a dozen types for a damaged folder
            reason = " ".join(str(error).split())
            raise InputError(f"timm cannot open {path} ({type(error).__name__}: {reason})") from error
        check_finite(model.state_dict(), str(path))
        labels = model.pretrained_cfg.get("label_names") or range(model.num_classes)
        counts = {model.num_classes, model.pretrained_cfg["num_classes"], len(labels)}
        if len(counts) > 1:  # timm makes a head of random weights then, and says so in a log
            raise InputError(f"{path / 'config.json'} gives several numbers of classes: {sorted(counts)}")
    else:
        from d_emo.models.timm_registry import default_cfgs

        model = read_released_classifier(path)
        model.pretrained_cfg = default_cfgs[model.config["name"]].default.to_dict()
    cfg = model.pretrained_cfg
    labels = cfg.get("label_names")
    return Classifier(source, normalized(model).eval(), model.num_classes, list(labels) if labels else None,
                      cfg["input_size"][-1], None)


def open_snapshot(path: Path, weights: str = "ema", kind: str = "classifier") -> tuple[ClassifierSnapshot, str]:
    """A snapshot, or the newest of a run folder, with averaged or raw weights, and what messages call it.

    Raises:
        InputError: There is none of this kind, it is damaged, or its raw weights are gone.
    """
    snapshot = load_classifier(path, kind)
    if weights != "raw":
        return snapshot, str(snapshot.path)
    state = snapshot.path.parent.parent / "states" / snapshot.path.name
    if not state.is_dir():
        raise InputError(f"the raw weights of {snapshot.path} are gone: there is no training state {state}")
    raw = without_adapters(load_state(state)["model"])
    load_weights(snapshot.model, raw, f"the training state {state}")
    return snapshot, f"{snapshot.path}, raw weights"


def validate_dir_of(snapshot: ClassifierSnapshot) -> str | None:
    """The held-out data of the run that wrote a snapshot, where they were the user's own."""
    config = snapshot.path / "config.yaml"
    settings = read_json(config, lambda found: check_values(found, VALIDATE_DIR)) if config.exists() else {}
    return settings.get("validate_dir")


def open_images(settings: EvaluateClassifierSettings, classifier: Classifier) -> ClassImages:
    """The images to measure on: a folder, or the held-out part of a built-in data set.

    Raises:
        InputError: if no images are named and the classifier knows none, or they have other classes.
    """
    size, built_in = settings.image_size or classifier.image_size, settings.dataset or classifier.dataset
    if settings.data_dir is not None:
        images = open_dataset(
            dataset="", data_dir=settings.data_dir, image_size=size, crop_share=settings.crop_share,
            reading=Reading.of(settings),
        )
    elif built_in is not None:
        limit = {"num_images": settings.num_images or DATASETS[built_in].held_out}
        images = open_dataset(dataset=built_in, data_dir=None, image_size=size, split="test", **limit)
    else:
        raise InputError(
            f"{classifier.name} was trained on a folder of images, without held-out ones; name some with `data_dir`"
        )
    names, known = images.class_names, classifier.class_names
    ordered = images if known is None else in_order_of(images, known)
    if len(names) != classifier.num_classes or ordered is None:
        raise InputError(
            f"{classifier.name} knows {classifier.num_classes} classes, but the images have {len(names)} "
            f"({', '.join(names[:3])}, ...), or the same under other names; they have to be the same"
        )
    return ordered
