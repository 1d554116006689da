"""Networks that turn images into feature vectors: torch-fidelity's Inception, and EMOv2 classifiers for offline use."""

import socket
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.files import digest_of_file, digest_of_tensors
from d_emo.io.snapshot import load_classifier
from d_emo.tables import load, parse_features

DOWNLOAD_TIMEOUT_S = 30
SPATIAL_CHANNELS = 7


class FeatureExtractor(Protocol):
    """Maps images to feature vectors.

    Attributes:
        name: What it is and which weights it has, for reports.
        dim: Length of a feature vector.
        spatial_dim: Length of the spatial features that sFID takes; 0 if there are none.
        published: Whether the weights are those that published numbers were measured with, where there are such.
    """

    name: str
    dim: int
    spatial_dim: int
    published: bool

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Shape: (B, 3, H, W) uint8 -> (B, dim) float."""
        ...

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All features: ``pooled`` (B, dim), and ``spatial`` (B, spatial_dim) where there are such.

        Shape: (B, 3, H, W) uint8 -> each (B, its dim) float.
        """
        ...

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """The network's classes, for the Inception Score. Shape: (B, dim) -> (B, classes) float."""
        ...


class InceptionFeatures:
    """Features of torch-fidelity's port of the 2015 TensorFlow Inception, which published FIDs use.

    Pooled are the 2048 before the last layer. Spatial (Nash et al. 2021, as ADM measures sFID) are the first 7 channels
    of the first convolution of TensorFlow's ``mixed_6``, after its ReLU, which is ``Mixed_6d.branch1x1`` in the port:
    17 x 17 x 7 = 2023 numbers, channels last, the order of ``mu_s`` in ADM's reference files.

    Args:
        weights: Weights file; by default torch-fidelity's own, downloaded into torch's hub folder if it is not there.
        device: Where the network runs.

    Raises:
        InputError: The weights are missing and cannot be downloaded, or are not those of this network.
    """

    dim = 2048
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self, weights: str | Path | None = None, *, device: torch.device | str = "cpu"):
        from torch_fidelity.utils import create_feature_extractor

        path = locate_inception_weights(weights)
        _check_tensors_only(path)
        try:
            network = create_feature_extractor(
                "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(path), verbose=False
            )
        except RuntimeError as error:  # load_state_dict: names or shapes differ
            raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception") from error
        self._network = network.to(device)
        self._spatial: torch.Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        digest = digest_of_file(path)
        self.published = digest.startswith(_published()[1])
        self.name = f"inception-v3-compat@{digest[:8]}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Shape: (B, 3, H, W) uint8 -> (B, 2048) float32."""
        (features,) = self._network(images)
        return features

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shape: (B, 3, H, W) uint8 -> pooled (B, 2048) and spatial (B, 2023), float32."""
        return {"pooled": self(images), "spatial": self._spatial}

    @torch.no_grad()
    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """The last layer without its bias, as Inception Scores are measured. Shape: (B, 2048) -> (B, 1008)."""
        weight = self._network.fc.weight
        return pooled.to(weight) @ weight.T

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """Shape: output (B, 192, 17, 17)."""
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


class ClassifierFeatures:
    """The pooled features of an EMOv2 classifier: needs no download, and gives distances of its own scale.

    Attributes:
        class_names: Of its logits.

    Raises:
        InputError: Not a classifier snapshot, or one whose head is not one linear layer.
    """

    spatial_dim = 0
    published = True  # nothing to compare with: the name says which snapshot it is

    def __init__(self, snapshot: str | Path, *, device: torch.device | str = "cpu"):
        classifier = load_classifier(snapshot)
        if not isinstance(classifier.model.get_classifier(), torch.nn.Linear):
            raise InputError(f"the classifier {snapshot} has another head than one linear layer; name another")
        self._model = classifier.model.to(device)
        self._image_size, self.class_names = classifier.image_size, classifier.class_names
        blank = torch.zeros(1, 3, classifier.image_size, classifier.image_size, dtype=torch.uint8, device=device)
        self.dim = self(blank).shape[1]
        self.name = f"emov2:{classifier.path}@{fingerprint(self._model)}"

    @torch.no_grad()
    @kernels.fixed()  # the same bits, whatever was timed on this machine
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Shape: (B, 3, H, W) uint8 -> (B, dim) float."""
        images = scale_for_classifier(images, self._image_size)
        return self._model.forward_head(self._model.forward_features(images), pre_logits=True)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shape: (B, 3, H, W) uint8 -> pooled (B, dim) float."""
        return {"pooled": self(images)}

    @torch.no_grad()
    @kernels.fixed()
    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Shape: (B, dim) -> (B, classes) float."""
        head = self._model.get_classifier()
        return kernels.linear(head, pooled.to(next(head.parameters())))


def create_extractor(
    features: str, *, inception_weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Make an extractor of ``d_emo.tables.EXTRACTORS``: ``inception``, ``emov2:SNAPSHOT``, ...

    Raises:
        InputError: There is no such extractor, it takes no weights file, or see the classes.
    """
    row, what = parse_features(features)
    options = {"weights": inception_weights} if row.weights_file else {}
    if inception_weights is not None and not options:
        raise InputError(f"`inception_weights` has no use with the features {features}; leave one of them out")
    return load(row.open)(*([what] if row.takes else []), device=device, **options)


def scale_for_classifier(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """Bytes to [-1, 1], resized to the classifier's side by an antialiased bilinear filter.

    Shape: (B, 3, H, W) uint8 -> (B, 3, image_size, image_size) float32.
    """
    images = images.float().div(127.5).sub(1)
    if images.shape[2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images


def locate_inception_weights(weights: str | Path | None = None) -> Path:
    """Path of the Inception weights: the file given, else torch-fidelity's own, downloaded if need be.

    Raises:
        InputError: The file given does not exist, or the download failed.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(f"the Inception weights {weights} do not exist")
        return Path(weights)
    url, digest = _published()
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torch.hub sets none: behind some firewalls it would hang
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"the Inception weights {path.name} are not in {path.parent} and cannot be downloaded from {url} "
            f"({error}); put the file there, or name it (`inception_weights`), or measure with other `features`, "
            "emov2:SNAPSHOT"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _published() -> tuple[str, str]:
    """Address of the published weights, and the start of their SHA-256: by torch.hub's custom it ends the file name."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3, Path(URL_INCEPTION_V3).stem.rpartition("-")[2]


def _check_tensors_only(path: Path) -> None:
    """Refuse a weights file that holds anything but named tensors: torch-fidelity itself unpickles whatever it is."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise InputError(f"{path} is not an intact weights file of tensors") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception")


def fingerprint(model: torch.nn.Module, digits: int = 8) -> str:
    """Digits that change with any weight of a model, so that a report says which one it was."""
    return digest_of_tensors(sorted(model.state_dict().items()))[:digits]
