"""Images drawn on the spot: any number of processes and of stops gives the same numbers."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import ColourFeatures, as_batch, make_pixels, read_all, write_folder
from PIL import Image

from d_emo.errors import InputError, RunError
from d_emo.evaluation import Measurement, Ranks, Result, draw_labels, feature_shards, measure

ALL = ("fid", "sfid", "isc", "prc", "kid")
SAMPLING = {"scheduler": "ddpm", "steps": 9, "guidance_scale": 1.5, "seed": 3, "labels": "random", "weights": "ema"}
COUNT = 43  # in shards of 8, the last one shorter


class Drawer:
    """StepNoise image i from i alone, three at a time; may break down."""

    def __init__(self, breaks_at: int | None = None):
        self.drawn: list[int] = []
        self._breaks_at = breaks_at

    def __call__(self, first: int, end: int) -> Iterator[torch.Tensor]:
        for start in range(first, end, 3):
            indices = range(start, min(start + 3, end))
            if self._breaks_at in indices:
                raise KeyboardInterrupt
            self.drawn += indices
            yield as_batch(np.concatenate([make_pixels(1, seed=index) for index in indices]))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, colours: ColourFeatures) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_SIZE", 8)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "reference", make_pixels(30, seed=99, cell=2))


def run(reference: Path, work_dir: Path, drawer: Drawer, count: int = COUNT, metrics=ALL, **options) -> Result | None:
    identity = options.pop("identity", {"denoiser": "d"})
    return Measurement(reference, metrics=metrics, progress=False).of_generated(
        drawer, count, image_size=(8, 8), name="snap", sampling=SAMPLING, identity=identity, work_dir=work_dir,
        **options,
    )  # fmt: skip


def test_drawn_images_measure_as_stored_ones(tmp_path: Path, reference: Path) -> None:
    drawer = Drawer()
    result = run(reference, tmp_path / "work", drawer)
    assert drawer.drawn == list(range(COUNT)) and result.num_samples == COUNT and result.images_per_second > 0
    pixels = np.concatenate([make_pixels(1, seed=index) for index in range(COUNT)])
    stored = measure(write_folder(tmp_path / "stored", pixels), reference, metrics=ALL, progress=False)
    assert result.values == pytest.approx(stored.values, rel=1e-6)  # features in files are float32
    assert result.sampling == SAMPLING and stored.sampling == {}
    assert "\nsampling      ddpm, 9 steps, guidance 1.5, seed 3, random labels, ema weights\n" in str(result)
    assert "| ddpm | 9 | 1.5 | 3 | random | ema |" in result.to_markdown()


def test_processes_share_the_work(tmp_path: Path, reference: Path) -> None:
    alone = run(reference, tmp_path / "alone", Drawer())
    drawers, waits = [Drawer(), Drawer(), Drawer()], []

    def let_the_others_work() -> None:
        waits.append(len(drawers[0].drawn))
        if len(waits) == 2:
            for rank in (2, 1):
                assert run(reference, tmp_path / "work", drawers[rank], ranks=Ranks(rank, 3)) is None

    result = run(reference, tmp_path / "work", drawers[0], ranks=Ranks(0, 3, let_the_others_work))
    assert result.values == alone.values
    assert [each.drawn[0] for each in drawers] == [0, 8, 16] and waits == [0, len(drawers[0].drawn)]
    assert sorted(sum((drawer.drawn for drawer in drawers), [])) == list(range(COUNT))


def test_a_stopped_measurement_goes_on(tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture) -> None:
    whole = run(reference, tmp_path / "whole", Drawer())
    with pytest.raises(KeyboardInterrupt):
        run(reference, tmp_path / "work", Drawer(breaks_at=20), ranks=Ranks())
    (tmp_path / "work" / ".tmp-1-features-0000016.safetensors").write_bytes(b"left by a kill")
    (tmp_path / "early").mkdir()  # by a process that was killed while it wrote the settings
    (tmp_path / "early" / ".tmp-1-settings.json").write_text("{")
    assert run(reference, tmp_path / "early", Drawer(), count=8, metrics=["fid"]).num_samples == 8
    capsys.readouterr()
    drawer = Drawer()
    result = run(reference, tmp_path / "work", drawer, ranks=Ranks(0, 1))
    assert capsys.readouterr().out == f"resuming in {tmp_path / 'work'}: 16 of 43 images are there\n"
    assert drawer.drawn == list(range(16, COUNT)) and result.values == whole.values
    again = Drawer()
    assert run(reference, tmp_path / "work", again).values == whole.values and again.drawn == []
    more = Drawer()
    assert run(reference, tmp_path / "work", more, count=50).num_samples == 50 and more.drawn == list(range(40, 50))
    assert not list((tmp_path / "work").glob(".tmp-*"))


def test_a_damaged_shard_is_made_again(tmp_path: Path, reference: Path) -> None:
    whole = run(reference, tmp_path / "work", Drawer())
    part = tmp_path / "work" / "features-0000008.safetensors"
    content = part.read_bytes()
    flipped = [content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :] for place in (3, 40, 150, -50)]
    for damaged in (b"", content[:300], *flipped):
        part.write_bytes(damaged)
        drawer = Drawer()
        assert run(reference, tmp_path / "work", drawer).values == whole.values and drawer.drawn == list(range(8, 16))
        assert part.read_bytes() == content


def test_features_of_other_settings_are_never_taken(tmp_path: Path, reference: Path, monkeypatch) -> None:
    run(reference, tmp_path / "work", Drawer(), metrics=["fid"])
    with pytest.raises(InputError, match="of other settings, see .*settings.json"):
        run(reference, tmp_path / "work", Drawer(), identity={"denoiser": "another"})
    with pytest.raises(InputError, match="reference exists and is not overwritten"):
        run(reference, reference, Drawer())
    monkeypatch.chdir(tmp_path)
    for denoiser in ("a", "b", "a"):
        run(reference, None, Drawer(), metrics=["fid"], identity={"denoiser": denoiser})
    assert len(list(Path("results/fid").iterdir())) == 2


def test_images_are_written(tmp_path: Path, reference: Path) -> None:
    png, npz = tmp_path / "png", tmp_path / "samples.npz"
    run(reference, tmp_path / "work", Drawer(), metrics=["fid"])  # features alone do not do
    result = run(reference, tmp_path / "work", Drawer(), metrics=["fid"], save_png=png, save_npz=npz)
    expected = torch.cat(list(Drawer()(0, COUNT)))
    with np.load(npz, allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].flags.c_contiguous
        assert torch.equal(as_batch(archive["arr_0"]), expected)
    assert torch.equal(read_all(png), expected) and torch.equal(read_all(npz), expected)
    assert sorted(path.name for path in png.glob("*.png"))[-1] == "000042.png"
    assert Image.open(png / "000000.png").mode == "RGB"
    for path in (png, npz):  # the files say how they were made
        again = measure(path, reference, progress=False)
        assert again.sampling == SAMPLING and again.fid == pytest.approx(result.fid, rel=1e-6)
    assert not list((tmp_path / "work").glob("pixels*"))
    drawer = Drawer()
    run(reference, tmp_path / "work", drawer, save_npz=npz)  # it says that it holds these images
    with pytest.raises(InputError, match="samples.npz exists and is not overwritten"):
        run(reference, tmp_path / "work", drawer, count=40, save_npz=npz)
    assert drawer.drawn == []
    content = npz.read_bytes()
    npz.write_bytes(content[:5000] + bytes([content[5000] ^ 4]) + content[5001:])
    run(reference, tmp_path / "work", Drawer(), save_npz=npz)
    assert npz.read_bytes() == content
    with pytest.raises(InputError, match="reference exists and is not overwritten"):
        run(reference, tmp_path / "work", Drawer(), save_png=reference)
    for damage in (Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\x89PNG")):
        damage(png / "000009.png")
        drawer = Drawer()
        run(reference, tmp_path / "work", drawer, metrics=["fid"], save_png=png)
        assert drawer.drawn == list(range(8, 16)) and torch.equal(read_all(png), expected)


def test_nothing_but_finite_features_is_kept(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ColourFeatures.extract
    monkeypatch.setattr(
        ColourFeatures, "extract", lambda self, images: {k: v / (v.sum() * 0) for k, v in broken(self, images).items()}
    )
    with pytest.raises(InputError, match="features of images 0 to 7 hold NaN"):
        run(reference, tmp_path / "work", Drawer())
    assert not list((tmp_path / "work").glob("features*"))


@pytest.mark.parametrize(
    ("writer", "name", "options"),
    [
        (feature_shards, "save_file", {}),
        (Image.Image, "save", {"save_png": "out"}),
        (np.lib.format, "write_array", {"save_npz": "out.npz"}),
    ],
)
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, writer: object, name: str, options: dict
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    options = {key: tmp_path / value for key, value in options.items()}
    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot write .*: No space left on device"):
        patch.setattr(writer, name, full)
        run(reference, tmp_path / "work", Drawer(), metrics=["fid"], **options)
    assert not list(tmp_path.glob("**/.tmp-*")) and not (tmp_path / "out.npz").exists()
    assert run(reference, tmp_path / "work", Drawer(), metrics=["fid"], **options).num_samples == COUNT


def test_too_few_images_are_an_error(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(ValueError, match="images 0 to 7 were to be drawn, but 3 came"):
        run(reference, tmp_path / "work", lambda first, end: iter(list(Drawer()(first, end))[:1]))


class Counted:
    """StepNoise batches of four, and notes of how many of them the memory is held at once."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def __call__(self, first: int, end: int) -> Iterator[torch.Tensor]:
        for start in range(first, end, 4):
            yield as_batch(self.watch(make_pixels(min(4, end - start), seed=start)))

    def watch(self, array: np.ndarray) -> np.ndarray:
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._gone)  # it lives as long as any tensor upon it
        return array

    def _gone(self) -> None:
        self.alive -= 1


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, reference: Path) -> None:
    """Drawn images are let go shard by shard; features are read a shard at a time."""
    most, parts_alive = {}, {}
    for count in (24, 240):
        counted, read = Counted(), Counted()
        original = feature_shards.FeatureShards.read

        def reading(self, *args, read=read, original=original):
            for part in original(self, *args):
                read.alive += 1
                read.most = max(read.most, read.alive)
                weakref.finalize(part["pooled"], read._gone)
                yield part

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feature_shards.FeatureShards, "read", reading)
            run(reference, tmp_path / f"work{count}", counted, count=count)
        most[count], parts_alive[count] = counted.most, read.most
        assert counted.alive == 0
    assert most[24] == most[240] <= 5 and parts_alive[24] == parts_alive[240] <= 2


def test_random_labels_depend_on_seed_and_index_only() -> None:
    labels = draw_labels("random", range(3000), seed=1, num_classes=10)
    assert labels[700:800] == draw_labels("random", range(700, 800), seed=1, num_classes=10)
    assert labels != draw_labels("random", range(3000), seed=2, num_classes=10)
    counts = np.bincount(labels, minlength=10)
    assert set(labels) == set(range(10)) and 0 < (counts != 300).sum() and abs(counts - 300).max() < 6 * 270**0.5


def test_balanced_labels() -> None:
    assert draw_labels("balanced", range(3, 8), seed=1, num_classes=4) == [3, 0, 1, 2, 3]
    assert draw_labels("random", range(3), seed=1, num_classes=1) == [0, 0, 0]
    with pytest.raises(InputError, match="names no classes"):
        draw_labels("random", range(3), seed=1, num_classes=0)
    with pytest.raises(InputError, match="unknown `labels` 'uniform'; use random or balanced"):
        draw_labels("uniform", range(3), seed=1, num_classes=4)


def test_json_holds_all_of_it(tmp_path: Path, reference: Path) -> None:
    result = run(reference, tmp_path / "work", Drawer())
    written = json.loads(result.to_json())
    assert written["sampling"] == SAMPLING and written["num_compared"] == written["num_reference"] == 30
    assert {name: written[name] for name in result.values} == result.values
