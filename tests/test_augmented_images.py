"""Images as a classifier sees them: crops, policies, and what they depend on."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from d_emo.data import AugmentedFolder, CentreCroppedFolder, StepSampler
from d_emo.data.sampler import EpochIndex
from d_emo.errors import InputError


def augmented(photos, **options):
    settings = {"crop_scale": (0.08, 1.0), "rand_augment": "rand-m9-mstd0.5-inc1", "seed": 3, **options}
    return AugmentedFolder(photos / "train", 32, **settings)


def served(dataset, start, steps, workers):
    sampler = StepSampler(len(dataset), 4, 2, seed=1, start_step=start)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
    return torch.cat([next(batches)[0] for _ in range(2 * steps)])


def test_augmentation_depends_on_seed_epoch_and_index_alone(photos):
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    whole = served(augmented(photos), 0, 5, 0)
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(served(augmented(photos), 3, 2, 2), whole[12:])  # a later start, in other processes
    other = served(augmented(photos, seed=4), 0, 1, 0)
    assert not torch.equal(other, whole[:4])


def test_every_epoch_sees_another_crop_and_another_policy(photos):
    for options in ({"rand_augment": None}, {"crop_scale": (1.0, 1.0)}):
        images = served(augmented(photos, **options), 0, 30, 0)  # 20 epochs of 6 images
        distinct = {tuple(image.flatten()[:500].tolist()) for image in images}
        assert len(distinct) > 20
    plain = served(augmented(photos, rand_augment=None), 0, 3, 0)
    assert plain.shape[1:] == (3, 32, 32) and not torch.equal(plain, served(augmented(photos), 0, 3, 0))


def test_what_replaces_an_unreadable_image_is_cropped_anew_every_epoch_too(photos, capfd):
    (photos / "train" / "ant" / "0.png").write_text("no image")
    dataset = augmented(photos, skip_corrupt=True)
    first, again, second = (dataset[EpochIndex(0, epoch)][0] for epoch in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(first, dataset[EpochIndex(1, 1)][0]) and capfd.readouterr().err.count("skipped") == 1


def test_every_operation_runs_at_every_strength(photos):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    dataset, seen = augmented(photos), set()
    for op in dataset.change.transforms[1].ops:
        seen.add(op.name)
        op.prob, op.magnitude_std = 1.0, 0.0
        for op.magnitude in range(11):
            assert op(image).size == (32, 32)
    assert {"PosterizeIncreasing", "Rotate", "SolarizeIncreasing"} <= seen


def test_centre_crop_keeps_the_share_of_the_shorter_side(photos):
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    image[6:94, 56:144] = 255  # 88 px of 100: a crop of 7/8, give or take a pixel
    (photos / "val" / "ant").joinpath("0.png").unlink()
    Image.fromarray(image).save(photos / "val" / "ant" / "0.png")
    inner = CentreCroppedFolder(photos / "val", 56, crop_share=0.875)[0][0]
    assert inner.shape == (3, 56, 56) and inner[:, 2:-2, 2:-2].min() > 0.9
    outer = CentreCroppedFolder(photos / "val", 64, crop_share=1.0)[0][0]
    assert outer[:, :2].max() < -0.9 and outer[:, :, :2].max() < -0.9


def test_an_image_that_cannot_be_read_is_named(photos):
    (photos / "train" / "ant" / "0.png").write_text("no image")
    with pytest.raises(InputError, match="cannot read the image .*0.png"):
        served(augmented(photos), 0, 3, 0)
