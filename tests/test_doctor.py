"""What doctor says of a data set that has one of everything wrong."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from d_emo import doctor
from d_emo.cli import doctor as cli_doctor
from d_emo.cli import run_verb, train, train_classifier
from d_emo.config import ClassifierSettings, TrainSettings
from d_emo.data import open_dataset
from d_emo.doctor import contact_sheet, describe, describe_latents, examine, sheet_of
from d_emo.errors import InputError
from d_emo.training import progress
from d_emo.training.classifier import ClassifierTask, augment
from d_emo.training.feed import Feed


class Codec:
    """Doubles images and moves them: latents that no noise is like, and a decoder that gives the images back."""

    name = "doubling"

    def moments(self, images):
        return torch.cat([4 * images + 3, torch.zeros_like(images)], dim=1)

    def decode(self, latents):
        return (latents - 3) / 4


def picture(path, seed, side=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Twelve cats, one dog: two cats alike, the dog one of the cats, a small one, a turned one, a damaged one."""
    root, turned = tmp_path / "pets", Image.Exif()
    turned[0x0112] = 6
    for number in range(9):
        picture(root / "cat" / f"{number}.png", number)
    picture(root / "cat" / "again.png", 0)
    picture(root / "dog" / "cat.png", 1)
    picture(root / "cat" / "small.bmp", 20, (9, 12))
    picture(root / "cat" / "turned.jpg", 21, (16, 24), exif=turned)
    (root / "cat" / "torn.png").write_bytes((root / "cat" / "0.png").read_bytes()[:80])
    return root


def lines_of(folder, held_out=None, **options):
    found, others = (
        each and examine(open_dataset(dataset="shapes", data_dir=str(each), image_size=16))
        for each in (folder, held_out)
    )
    return found, describe(found, batch_size=4, max_steps=30, held_out=others)


def test_everything_that_is_wrong_is_said(folder, tmp_path):
    found, lines = lines_of(folder)
    said = {topic: text for topic, text in lines if topic != "LOOK"}
    assert said["data"] == "folder: 14 images of 2 classes; 14 looked at"
    assert said["sizes"] == "shorter side 9 to 16 px, median 16; 3 sizes, most often 16 x 16"
    assert said["formats"] == "PNG 11, BMP 1, JPEG 1; modes RGB 13"
    assert said["EXIF"] == "1 with an orientation" and "alpha" not in said
    assert said["classes"] == "1 (dog) to 13 (cat) images, median 7"
    assert said["duplicates"].startswith("2 the same as another, such as ")
    assert said["training"] == "4 steps of 4 images an epoch; 30 steps pass over the data 8.6 times; images are " \
                               "mirrored at random"
    look = [text for topic, text in lines if topic == "LOOK"]
    starts = ("1 smaller than 16 px", "cat has 13 times the images of dog", "1 unreadable", "1 of them in sev")
    assert [any(text.startswith(start) for text in look) for start in starts] == [True] * 4 and len(look) == 4
    assert "torn.png" in look[2] and found.images.origin(next(iter(found.unreadable))).endswith("torn.png")


def test_held_out_images_that_are_trained_on_are_found(folder, tmp_path):
    picture(tmp_path / "val" / "cat" / "new.png", 50)
    picture(tmp_path / "val" / "dog" / "old.png", 4)
    _, lines = lines_of(folder, tmp_path / "val")
    assert ("held out", "2 images; 2 looked at") in lines
    assert [text for topic, text in lines if "trained on" in text] == [
        f"1 of them trained on, such as {tmp_path}/val/dog/old.png, which is {folder}/cat/4.png"
    ]


def test_a_sample_is_spread_and_the_same_every_time():
    images = open_dataset(dataset="digits", data_dir=None, image_size=8)
    found, again = (examine(images, 50) for _ in range(2))
    assert found.digests == again.digests and len(found.digests) == 50 and found.headers == {}
    assert len({found.labels[index] for index in found.digests}) > 6 and max(found.digests) > len(images) * 0.9


def test_the_sheet_shows_what_training_sees_by_class(folder):
    found, _ = lines_of(folder)
    chosen, pixels = sheet_of(found)
    assert len(chosen) == 13 and [found.labels[index] for index in chosen] == [0] * 12 + [1]
    sheet = np.asarray(contact_sheet(found, chosen, pixels))
    tile = sheet[22 : 22 + 128 : 8, 4 : 4 + 128 : 8]
    assert np.array_equal(tile, np.asarray(Image.open(found.images.origin(chosen[0])).convert("RGB")))


def test_latents_far_from_the_noise_are_said():
    lines = dict(describe_latents(Codec(), torch.linspace(-1, 1, 48).repeat(2, 3, 16, 1)))
    assert lines["latents"].startswith("of doubling, 2 images; decoded again they have 10") and "dB" in lines["latents"]
    assert lines["  mean"] == "+3.00 +3.00 +3.00" and lines["  deviation"] == "+2.36 +2.36 +2.36"
    assert lines["LOOK"].startswith("the latent channels 0, 1, 2 are far")


def test_colour_profiles_are_counted_and_a_damaged_tag_spoils_nothing(folder, monkeypatch):
    for name, profile in ("a", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), ("b", b"P3"):
        picture(folder / "cat" / f"{name}.jpg", 40, icc_profile=profile)
    assert any(text.startswith("1 with a colour profile other than sRGB") for _, text in lines_of(folder)[1])

    def damaged(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", damaged)
    assert len(lines_of(folder)[0].unreadable) == 1  # the torn one, as in training


def test_sizes_that_the_vae_does_not_take_are_refused(folder):
    with pytest.raises(InputError, match="image.size.? 20 is not a multiple of 8"):
        run_verb("doctor", ["--data-dir", str(folder), "--image-size", "20", "--vae", "d-emo-f8"])


def test_doctor_prints_a_table_and_writes_the_sheet(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_verb("doctor", ["--data-dir", str(folder), "--image-size", "16", "--vae", "pixels", "--sample", "0"])
    out = capsys.readouterr().out
    assert out.startswith("data         folder: 14 images") and "of pixels, 13 images" in out
    assert "training stops at them unless --skip-corrupt passes over them" in out
    assert Image.open(tmp_path / "samples" / "doctor-pets-16.png").size == (8 * 132 + 4, 2 * (128 + 22) + 4)
    with pytest.raises(InputError, match="--skip-corrupt is for training"):
        run_verb("doctor", ["--data-dir", str(folder), "--skip-corrupt"])
    for each in (folder / "cat").iterdir():
        each.write_bytes(b"")
    (folder / "dog" / "cat.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 14 images that were tried could be read; the first: "):
        run_verb("doctor", ["--data-dir", str(folder), "--image-size", "16"])


def test_findings_do_not_depend_on_which_thread_was_first(folder, monkeypatch):
    class LastFirst:
        """A pool whose last task ends first."""

        def __init__(self, threads):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, inputs):
            return [function(each) for each in reversed(inputs)]

    found, lines = lines_of(folder)
    monkeypatch.setattr(doctor, "ThreadPoolExecutor", LastFirst)
    again, lines_again = lines_of(folder)
    assert lines_again == lines
    for name in ("headers", "digests", "labels", "unreadable"):
        assert list(getattr(again, name)) == list(getattr(found, name)) != [], name


def test_a_dry_run_of_training_says_what_there_is_and_writes_one_picture_only(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (folder / "cat" / "notes.txt").touch()
    tiny = {"image_size": 16, "vae": "pixels", "cache_latents": True, "skip_corrupt": True, "batch_size": 8,
            "micro_batch_size": 4, "model_options": {"depth": 1, "hidden_size": 48}, "model": "D-EMOv2-Ti-2"}
    monkeypatch.setattr(progress, "LONG_RUN", 0)
    train.run(TrainSettings(data_dir=str(folder), dry_run=True, max_steps=30, **tiny))
    said = {line[:10].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert said["by class"] == "cat 13, dog 1" and said["formats"].startswith("PNG 12, BMP 1, JPEG 1")
    assert said["training"].startswith("2 steps of 8 images an epoch") and said["memory"].endswith(" GiB")
    assert re.fullmatch(r".* s a step of 8 images by one process here; all 30 steps: .* \(h:mm:ss\)", said["time"])
    assert said["LOOK"].startswith("At ") and "A small one for such a machine" in said["LOOK"]
    picture = tmp_path / "samples" / "dry-run-D-EMOv2-Ti-2-pets-16.png"
    assert said["batch"].startswith("samples/dry-run") and [each for each in tmp_path.rglob("*") if each.is_file()
                                                            and folder not in each.parents] == [picture]


def test_a_dry_run_shows_the_augmented_images_of_a_classifier(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (folder / "cat" / "torn.png").unlink()
    shown = []
    monkeypatch.setattr(cli_doctor, "contact_sheet", lambda found, chosen, pixels: shown.append(pixels) or Image.new(
        "RGB", (8, 8)))
    values = {"model": "emov2_1m", "model_options": {"depths": [1, 1, 1, 1]}, "image_size": 32, "batch_size": 4}
    settings = ClassifierSettings(data_dir=str(folder), dry_run=True, output_dir="run", **values)
    train_classifier.run(settings)
    assert "run folder run" in capsys.readouterr().out and not (tmp_path / "run").exists()
    feed = Feed(ClassifierTask(settings).dataset, ClassifierTask(settings).draw, seed=0, batch_size=4,
                micro_batch_size=4, device=torch.device("cpu"))
    next(feed.step(0))
    (((images, _), draws),) = feed.step(1)
    assert torch.equal(shown[0], augment(images, draws)) and shown[0].shape == (4, 3, 32, 32)
