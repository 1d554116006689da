"""Feature networks: classifiers trained here, and where Inception's weights come from."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

from d_emo.errors import InputError
from d_emo.evaluation import ClassifierFeatures, InceptionFeatures, create_extractor, features

# ---- classifier features ---------------------------------------------------------------------------------------------


class BrightestChannel(torch.nn.Module):
    """A classifier of three classes: which of red, green and blue is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = torch.nn.Parameter(2 * torch.eye(3))
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.scale * x

    def get_classifier(self) -> torch.nn.Module:
        return self.head

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    snapshot = SimpleNamespace(
        path=Path("snap"), model=BrightestChannel().eval(), class_names=["red", "green", "blue"], image_size=4
    )
    monkeypatch.setattr(features, "load_classifier", lambda path: snapshot)
    return snapshot


def flat_colours(*colours: tuple[int, int, int], size: int = 8) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, size, size)


def test_classifier_sees_its_own_size_and_range(classifier: SimpleNamespace) -> None:
    extractor = create_extractor("emov2:snap")
    found = extractor(flat_colours((0, 255, 51)))
    assert extractor.dim == 3 and found.shape == (1, 3) and not found.requires_grad
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0, -0.6]]))
    assert classifier.model.seen[-1].shape == (1, 3, 4, 4)


def test_classifier_resizing_is_antialiased(classifier: SimpleNamespace) -> None:
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., 3::8] = stripes[..., 4::8] = 255  # where plain bilinear sampling to an eighth looks: all 1
    ClassifierFeatures("snap")(stripes)
    assert classifier.model.seen[-1].max() < 0


def test_name_tells_weights_apart(classifier: SimpleNamespace) -> None:
    before = ClassifierFeatures("snap").name
    assert before == ClassifierFeatures("snap").name and before.startswith("emov2:snap@")
    with torch.no_grad():
        classifier.model.head.weight[0, 0] += 1e-3
    assert ClassifierFeatures("snap").name != before


# ---- Inception -------------------------------------------------------------------------------------------------------


def test_missing_inception_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    def fail(url: str, dst: str, hash_prefix: str) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError) as raised:
        create_extractor("inception")
    sentence = str(raised.value)
    for expected in [URL_INCEPTION_V3, URL_INCEPTION_V3.split("/")[-1], str(tmp_path / "hub"), "no network"]:
        assert expected in sentence
    assert "`inception_weights`" in sentence and "`features`, emov2:SNAPSHOT" in sentence


def test_inception_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d_emo.evaluation.features import locate_inception_weights

    downloads = []

    def download(url: str, dst: str, hash_prefix: str) -> None:
        downloads.append((url.split("/")[-1], hash_prefix))
        Path(dst).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = locate_inception_weights(), locate_inception_weights()
    assert first == second == tmp_path / "hub" / "checkpoints" / first.name and first.is_file()
    assert downloads == [(first.name, first.stem.split("-")[-1])]


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_inception_weights_that_are_none(tmp_path: Path) -> None:
    bad, struck = tmp_path / "bad.pth", tmp_path / "struck"
    with pytest.raises(InputError, match="bad.pth do not exist"):
        InceptionFeatures(bad)
    bad.write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth is not an intact weights file"):
        InceptionFeatures(bad)
    torch.save({"fc.weight": torch.zeros(1)}, bad)
    with pytest.raises(InputError, match="bad.pth does not hold the weights of torch-fidelity's Inception"):
        InceptionFeatures(bad)
    torch.save([1, 2], bad)
    with pytest.raises(InputError, match="bad.pth does not hold the weights"):
        InceptionFeatures(bad)
    torch.save({"fc.weight": Bomb(struck)}, bad)
    with pytest.raises(InputError, match="bad.pth is not an intact weights file"):
        InceptionFeatures(bad)
    assert not struck.exists()
    torch.load(bad, weights_only=False)
    assert struck.exists()  # the bomb works: it was not loaded


def test_old_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(InputError, match="old.pth"):
        InceptionFeatures(tmp_path / "old.pth")
