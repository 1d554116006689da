"""Inception features: every metric against torch-fidelity with the same weights, sFID against a plain computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from evaluation_sets import as_batch, gather, make_pixels, write_folder

from d_emo.errors import InputError
from d_emo.evaluation import InceptionFeatures, frechet_distance, measure


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """They lie far apart: with fewer images than features, torch-fidelity's trace term is rounded by about 1e-5."""
    folder = tmp_path_factory.mktemp("sets")
    first = write_folder(folder / "a" / "class", make_pixels(10, size=32, cell=8)).parent
    second = write_folder(folder / "b" / "class", make_pixels(11, size=32, cell=2, seed=1)).parent
    return first, second


def test_every_metric_equals_torch_fidelity(sets: tuple[Path, Path], random_inception: Path) -> None:
    ours = measure(
        *sets, metrics=("fid", "isc", "prc", "kid"), inception_weights=random_inception, batch_size=6,
        device="cpu", progress=False,
    )  # fmt: skip
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sets[0]), input2=str(sets[1]), samples_find_deep=True, fid=True, isc=True, prc=True, kid=True,
        kid_subset_size=10, cuda=False, cache=False, verbose=False, save_cpu_ram=True, batch_size=6,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(random_inception),
    )  # fmt: skip
    assert ours.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6) and ours.fid > 1
    assert ours.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6) and ours.kid > 0.01
    assert (ours.precision, ours.recall) == (theirs["precision"], theirs["recall"])
    assert ours.features.startswith("inception-v3-compat@")
    assert "not the published Inception weights" in ours.warnings[-1]


def test_inception_distance_is_exact_for_few_images(random_inception: Path) -> None:
    extractor = InceptionFeatures(random_inception)
    pixels = [as_batch(make_pixels(3, size=16, cell=2, seed=seed)) for seed in (0, 1)]
    features = [extractor(each)[:, ::8].double() for each in pixels]  # 256 dimensions: seconds less
    centred = [(each - each.mean(dim=0)) / 2**0.5 for each in features]
    expected = (
        (features[0].mean(dim=0) - features[1].mean(dim=0)).square().sum()
        + centred[0].square().sum() + centred[1].square().sum()
        - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    )  # fmt: skip
    first, second = (gather(each) for each in features)
    measured = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert measured == pytest.approx(float(expected), rel=1e-9)


def spatial_by_hand(network: torch.nn.Module, before: torch.Tensor) -> np.ndarray:
    """mixed_6/conv by its definition, from the map before it, in float64: 1 x 1 convolution, batch norm, ReLU; its
    first 7 channels, positions first, then channels. Shape: (B, 768, 17, 17) -> (B, 2023)."""
    conv, norm = network.Mixed_6d.branch1x1.conv, network.Mixed_6d.branch1x1.bn
    plain = torch.einsum("bchw,kc->bkhw", before.double(), conv.weight[:7, :, 0, 0].double())
    plain = (plain - norm.running_mean[:7, None, None]) / (norm.running_var[:7, None, None] + norm.eps).sqrt()
    plain = (plain * norm.weight[:7, None, None] + norm.bias[:7, None, None]).clamp(min=0).detach()
    return np.array([
        [image[c, y, x] for y in range(17) for x in range(17) for c in range(7)] for image in plain.numpy()
    ])  # fmt: skip


def test_layers_against_the_network_walked_by_hand(random_inception: Path) -> None:
    """Spatial features: first 7 of the 192 channels that Mixed_6d starts with, positions first, then channels."""
    extractor = InceptionFeatures(random_inception)
    images = as_batch(make_pixels(2, size=32, cell=4))
    measured = extractor.extract(images)
    seen = {}
    network = extractor._network

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        return getattr(network, name).register_forward_hook(lambda *call: seen.update({name: call[2]}))

    hooks = [keep(name) for name in ("Mixed_6c", "Mixed_6d", "AvgPool")]
    network(images)
    for hook in hooks:
        hook.remove()
    assert seen["Mixed_6d"].shape == (2, 768, 17, 17)
    by_hand = spatial_by_hand(network, seen["Mixed_6c"])
    np.testing.assert_allclose(measured["spatial"].numpy(), by_hand, rtol=1e-4, atol=1e-5 * by_hand.max())
    assert measured["spatial"].shape == (2, extractor.spatial_dim) and by_hand.std() > 0
    assert torch.equal(measured["spatial"].view(2, 17, 17, 7).permute(0, 3, 1, 2), seen["Mixed_6d"][:, :7])
    assert torch.equal(measured["pooled"], seen["AvgPool"].flatten(1))
    torch.testing.assert_close(extractor.logits(measured["pooled"]), measured["pooled"] @ network.fc.weight.T)


@pytest.mark.slow
def test_spatial_distance_through_files(random_inception: Path, tmp_path: Path) -> None:
    """sFID through files: of the network's own map, all that follows is done by numpy."""
    network = InceptionFeatures(random_inception)._network
    pixels = make_pixels(4, size=16, cell=4), make_pixels(4, size=16, cell=4, seed=3)
    seen: list[torch.Tensor] = []
    hook = network.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        [network(as_batch(each)) for each in pixels]
    hook.remove()
    spatial = [spatial_by_hand(network, each) for each in seen]
    reference = tmp_path / "r.npz"
    mean, covariance = spatial[1].mean(axis=0), np.cov(spatial[1], rowvar=False)
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=mean, sigma_s=covariance)
    np.savez(tmp_path / "s.npz", pixels[0])
    result = measure(
        tmp_path / "s.npz", reference, metrics=("sfid",), inception_weights=random_inception, device="cpu",
        progress=False,
    )  # fmt: skip
    shift = spatial[0].mean(axis=0) - mean
    centred = [(each - each.mean(axis=0)) / 3**0.5 for each in spatial]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = shift @ shift + sum((each**2).sum() for each in centred) - 2 * overlap
    assert result.sfid == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_cut_weights_file(tmp_path: Path, random_inception: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(random_inception.read_bytes()[:1_000_000])
    with pytest.raises(InputError, match="cut.pth is not an intact weights file"):
        InceptionFeatures(tmp_path / "cut.pth")
