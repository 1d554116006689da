"""Stored pictures against what an image viewer shows of them, and what becomes of those that cannot be read."""

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import EncodeSettings, TrainSettings, parse_settings
from d_emo.data import (
    AugmentedFolder,
    CentreCroppedFolder,
    Digits,
    ImageFolder,
    Reading,
    centre_crop,
    describe_left_out,
    image_endings,
    is_image,
    load_image,
    open_dataset,
    to_uint8,
)
from d_emo.data import reading as reading_module
from d_emo.errors import InputError
from d_emo.evaluation import open_images
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def noise(width, height, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def pixels(file, **options):
    """What is read of a file. Shape: (H, W, 3) uint8."""
    return np.array(Reading(**options).read(file, lambda: "it"))


# ---- the crop --------------------------------------------------------------------------------------------------------


def adm_crop(pixels, size):
    """ADM's crop, after its description: boxes of 2 x 2 while both sides stay at least twice ``size``, then bicubic."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = (side // 2 for side in pixels.shape[:2])
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.BOX))
    height, width = (round(side * size / min(pixels.shape[:2])) for side in pixels.shape[:2])
    pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(500, 33), (33, 500), (31, 32), (9, 9), (32, 32), (63, 64), (64, 65), (131, 300), (75, 50), (33, 48)]
)
def test_the_crop_is_adms_for_smaller_and_larger_pictures(shape):
    picture = noise(*shape)
    assert np.array_equal(np.array(centre_crop(Image.fromarray(picture), 32)), adm_crop(picture, 32))
    loaded = to_uint8(load_image(stored(Image.fromarray(picture), "PNG"), 32))
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), adm_crop(picture, 32))


def test_boxes_are_means_of_four():
    picture = noise(64, 64)
    means = picture.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    cropped = np.array(centre_crop(Image.fromarray(picture), 32)).astype(float)
    assert np.abs(cropped - means).max() <= 1  # rounded along each side


def test_a_line_of_pixels_is_refused_not_blown_up(tmp_path):
    stored_line = stored(Image.new("RGB", (20000, 1)), "PNG")
    with pytest.raises(InputError, match="cannot use the image it .20000 x 1 px is too narrow"):
        load_image(stored_line, 512, name=lambda: "it")


# ---- pixels ----------------------------------------------------------------------------------------------------------


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=-1)


DEEP = np.array([[0, 128, 129, 257], [32768, 65278, 65406, 65535]], dtype=np.uint16)
SHOWN = grey([[0, 0, 1, 1], [128, 254, 254, 255]])
COLOURED = Image.fromarray(noise(8, 8))


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        (stored(Image.fromarray(DEEP), "PNG"), SHOWN),
        (stored(Image.fromarray(DEEP), "TIFF"), SHOWN),
        (stored(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), 255 - SHOWN),  # WhiteIsZero
        (io.BytesIO(b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes()), SHOWN),
        (io.BytesIO(b"P5 2 1 1023\n" + np.array([1023, 0], ">u2").tobytes()), grey([[255, 0]])),
        (stored(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"), grey([[0, 128, 255]])),
        (stored(Image.fromarray(RAMP), "PNG"), grey(RAMP)),
        (stored(Image.fromarray(RAMP > 99), "PNG"), grey(255 * (RAMP > 99))),
        (stored(COLOURED, "TIFF", compression="tiff_lzw"), np.array(COLOURED)),
        (stored(COLOURED, "PPM"), np.array(COLOURED)),
        (stored(COLOURED.convert("P"), "PNG"), np.array(COLOURED.convert("P").convert("RGB"))),
        (stored(COLOURED.convert("CMYK"), "TIFF"), np.array(COLOURED)),
    ],
    ids=["16", "16tif", "16tif-inverted", "pgm", "pgm10", "float", "8", "1", "rgb", "ppm", "palette", "cmyk"],
)
def test_every_depth_comes_out_as_a_viewer_shows_it(file, shown):
    assert np.array_equal(pixels(file), shown)


WAYS = {
    "LAB": ["RGB", "LAB"], "YCbCr": ["RGB", "YCbCr"], "HSV": ["RGB", "HSV"], "La": ["LA", "La"], "RGBa": ["RGBa"],
    "PA": ["P", "PA"], "RGBX": ["RGB", "RGBX"], "LA": ["LA"],
}  # fmt: skip


@pytest.mark.parametrize("mode", WAYS)
def test_modes_without_a_common_file_come_out_near_their_colour(mode):
    colour = (102, 102, 102) if mode in ("La", "LA", "PA") else (200, 100, 50)
    image = Image.new("RGBA", (2, 2), (*colour, 255))
    for step in WAYS[mode]:
        image = image.convert(step)
    assert image.mode == mode and np.abs(np.array(Reading().as_viewed(image)).astype(int) - colour).max() <= 4


@pytest.mark.parametrize(("image", "reason"), [
    (Image.fromarray(np.array([[0, 300]], np.float32)), "from 0 to 300, where viewers show 0 to 1"),
    (Image.fromarray(np.array([[0, np.nan]], np.float32)), "from nan to nan"),
    (Image.fromarray(np.array([[0, 70000]], np.int32)), "signed or of 32 bits"),
])  # fmt: skip
def test_pixels_without_a_known_range_are_refused_by_name(image, reason):
    with pytest.raises(InputError, match=f"cannot read the image it .*{reason}"):
        pixels(stored(image, "TIFF"))


def test_signed_pixels_of_8_bits_are_refused_too():
    file = stored(Image.new("L", (2, 2), 200), "TIFF", tiffinfo={339: 2})  # SampleFormat
    with pytest.raises(InputError, match="signed or of 32 bits"):
        pixels(file)


def png(depth, kind, row, *, clear=None, palette=None):
    """A PNG of one row, bit by bit: Pillow writes no such ones."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(row) * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))]
    parts += [chunk(name, data) for name, data in ((b"PLTE", palette), (b"tRNS", clear)) if data]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


RED = [255, 0, 0]
CLEAR = {
    "1 bit": (png(1, 0, b"\xa0", clear=b"\0\1"), [RED, [0] * 3, RED] + [[0] * 3] * 5),
    "2 bits": (png(2, 0, b"\x1b", clear=b"\0\2"), [[0] * 3, [85] * 3, RED, [255] * 3]),
    "4 bits": (png(4, 0, b"\x1f", clear=b"\0\x0f"), [[17] * 3, RED]),
    "8 bits": (png(8, 0, b"\5\xff", clear=b"\0\5"), [RED, [255] * 3]),
    "16 bits": (png(16, 0, b"\x12\x34\xff\xff", clear=b"\x12\x34"), [RED, [255] * 3]),
    "rgb": (png(8, 2, b"\1\2\3\4\5\6", clear=b"\0\1\0\2\0\3"), [RED, [4, 5, 6]]),
    "rgb, 16 bits": (png(16, 2, b"\x80\1\0\0\0\0\1\0\2\0\3\0", clear=b"\x80\1\0\0\0\0"), [RED, [1, 2, 3]]),
    "palette": (
        png(2, 3, b"\x1b", clear=b"\xff\0\x80", palette=bytes(range(12))), [[0, 1, 2], RED, [130, 4, 4], [9, 10, 11]]
    ),
    "grey and alpha": (png(8, 4, b"\x64\0\x64\xff"), [RED, [100] * 3]),
    "rgb and alpha": (png(8, 6, b"\1\2\3\x80\1\2\3\xff"), [[128, 1, 1], [1, 2, 3]]),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_shows_the_background(name):
    file, shown = CLEAR[name]
    assert np.abs(pixels(file, background="red")[0].astype(int) - shown).max() <= 1
    clear = [each[0] > each[1] + 99 for each in shown]
    assert any(clear) and (pixels(file)[0][clear] > 126).all()  # white by default


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_once(kind, orientation):
    upright = Image.fromarray(np.kron(noise(3, 2, 5), np.ones((16, 16, 1), np.uint8)))
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # as Transpose counts
    lying = upright
    for method in undo:
        lying = lying.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    file = stored(lying, kind, exif=exif, **options)
    assert np.abs(pixels(file).astype(int) - np.array(upright)).max() < 12
    assert Reading().size(file, str) == upright.size
    with Image.open(file) as plain:
        assert np.array_equal(pixels(file, exif=False), np.array(plain.convert("RGB")))
    assert Reading(exif=False).size(file, str) == lying.size or kind == "TIFF"  # Pillow itself turns these


def test_a_damaged_exif_tag_spoils_no_pixels():
    assert np.array_equal(pixels(stored(COLOURED, "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff")), np.array(COLOURED))


def test_the_first_picture_of_a_film_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG", "TIFF", "GIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        shown = pixels(stored(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert (shown == RED).all(), kind


@pytest.fixture
def folder(tmp_path):
    for label in ("ape", "bee"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(noise(24, 30, index)).save(tmp_path / "set" / label / f"{index}.png")
    return tmp_path / "set"


def test_all_readers_see_the_same(folder, tmp_path):
    key = png(2, 0, b"\x1b" * 2, clear=b"\0\2")
    with Image.open(key) as image:
        image = image.resize((8, 8), 0)
        image.info["transparency"] = 170
        image.save(tmp_path / "key.png", transparency=170)
    for name in ("ape", "bee"):
        for index in range(3):
            (folder / name / f"{index}.png").write_bytes((tmp_path / "key.png").read_bytes())
    wanted = pixels(tmp_path / "key.png", background="blue")
    assert (wanted == [0, 0, 255]).all(axis=-1).any()
    blue = Reading(background="blue")
    crops = [
        ImageFolder(folder, 8, reading=blue)[0][0], load_image(folder / "ape" / "0.png", 8, reading=blue),
        CentreCroppedFolder(folder, 8, crop_share=1.0, reading=blue)[0][0],
        AugmentedFolder(folder, 8, crop_scale=(1.0, 1.0), rand_augment=None, seed=0, reading=blue)[0][0],
        open_dataset(dataset="", data_dir=str(folder), image_size=8, reading=blue)[0][0],
    ]  # fmt: skip
    for each in [*map(to_uint8, crops), next(open_images(folder, reading=blue).batches(1))[0]]:
        assert np.array_equal(each.permute(1, 2, 0).numpy(), wanted)


def test_a_set_to_be_measured_may_mix_modes_and_turned_pictures(folder):
    for path in folder.rglob("*.png"):
        path.unlink()
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise(8, 6)).save(folder / "ape" / "0.png")
    Image.fromarray(noise(6, 8)).save(folder / "ape" / "1.jpg", exif=exif)
    Image.fromarray(noise(8, 6)[..., 0]).save(folder / "ape" / "2.tif")
    images = open_images(folder)
    assert images.image_size == (8, 6) and next(images.batches(3)).shape == (3, 3, 6, 8)
    with pytest.raises(InputError, match="is 8 x 6 px but .*1.jpg is 6 x 8 px"):
        open_images(folder, reading=Reading(exif=False))


# ---- what cannot be read ---------------------------------------------------------------------------------------------


class OddError(Exception):
    pass


@pytest.mark.parametrize("error", [OddError("odd"), struct.error("unpack"), EOFError(), KeyError(5)])
def test_whatever_a_decoder_raises_names_the_file_and_is_passed_over(folder, monkeypatch, capsys, error):
    def fail(image, *rest, open=Image.open):
        if str(image).endswith("ape/1.png"):
            raise error
        return open(image)

    monkeypatch.setattr(reading_module.Image, "open", fail)
    with pytest.raises(InputError, match=r"cannot read the image .*ape/1\.png \(.+\)"):
        ImageFolder(folder, 16)[1]
    with pytest.raises(InputError, match=r"cannot read the image .*ape/1\.png \(.+\)"):
        open_images(folder)
    data = ImageFolder(folder, 16, skip_corrupt=True)
    assert torch.equal(data[1][0], data[2][0]) and data.remarks() == ["skipped   1 image that cannot be read"]
    assert "ape/1.png" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_not_the_files_fault_is_not_passed_over(folder, monkeypatch, error):
    def fail(self, image):
        raise error

    monkeypatch.setattr(Reading, "as_viewed", fail)
    with pytest.raises(error):
        ImageFolder(folder, 16, skip_corrupt=True)[1]


def test_pictures_of_hundreds_of_megapixels_are_read_and_a_limit_of_ones_own_stays(monkeypatch):
    huge = png(1, 0, b"")  # a head without pixels is enough: the limit is looked at first
    head = bytearray(huge.getvalue())
    head[16:24] = struct.pack(">II", 20000, 10000)
    head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    for limit, reason in ((reading_module.PILLOWS_LIMIT, "truncated"), (10**6, "exceeds limit of 2000000 pixels")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        reading_module.prepare_pillow.__wrapped__()
        with pytest.raises(InputError, match=reason):
            pixels(io.BytesIO(head))


def test_large_and_cut_pictures(folder, monkeypatch):
    path = folder / "ape" / "0.png"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"ape/0\.png \(.*truncated"):
        ImageFolder(folder, 16)[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30 / 2 - 1)  # Pillow refuses more than twice as many
    with pytest.raises(InputError, match=r"ape/1\.png \(.*exceeds limit"):
        ImageFolder(folder, 16)[1]


# ---- which files are images ------------------------------------------------------------------------------------------


def test_endings_are_those_that_pillow_and_its_plug_ins_read(monkeypatch, folder):
    assert {".png", ".jpg", ".jfif", ".tif", ".tiff", ".webp", ".ppm"} <= image_endings()
    assert is_image("a.TIF") and is_image("a.gif") and not any(map(is_image, ("a.psd", "a.svg", "tif")))
    kinds = Image.registered_extensions()
    assert (".avif" in image_endings()) == (".avif" in kinds) and (".heic" in image_endings()) == (".heic" in kinds)
    Image.fromarray(noise(24, 30)).save(folder / "bee" / "9.TIFF")
    assert len(ImageFolder(folder, 16)) == open_images(folder).num_images == 7
    plug_in = types.ModuleType("pillow_heif")
    plug_in.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    monkeypatch.setattr(Image, "EXTENSION", dict(kinds))
    for name in ("image_endings", "prepare_pillow"):
        monkeypatch.setattr(reading_module, name, getattr(reading_module, name).__wrapped__)
    assert is_image("a.heic")


def test_what_is_left_out_is_counted_with_the_endings(folder, monkeypatch):
    assert describe_left_out(["a.psd"] * 12 + ["b.SVG"] * 9) == "21 files of other kinds left out: .psd 12, .svg 9"
    assert describe_left_out(["README"]) == "1 file of other kinds left out: without an ending 1"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "d-emo[heif]" in describe_left_out(["a.heic"]) and describe_left_out([]) == ""
    (folder / "ape" / "a.psd").touch()
    assert ImageFolder(folder, 16).left_out == "1 file of other kinds left out: .psd 1"
    for path in (folder / "ape").glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"ape holds no images .*left out: \.psd 1"):
        ImageFolder(folder, 16)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_switches_that_are_on_have_an_off():
    def read(*flags):
        settings = parse_settings(EncodeSettings, "", ["--output", "o", *flags])
        return settings.exif, settings.flip, settings.background

    assert read() == (True, None, "white")
    assert read("--no-exif", "--no-flip", "--background", "#ff8000") == (False, False, "#ff8000")
    assert read("--exif", "false", "--flip") == (False, True, "white")
    with pytest.raises(InputError, match="--background must be a colour such as white .*, not whyte"):
        read("--background", "whyte")
    with pytest.raises(InputError, match="--flip must be true or false, not maybe"):
        read("--flip", "maybe")


def test_a_data_set_may_refuse_to_be_mirrored(folder):
    with pytest.raises(InputError, match="`flip`: a mirror image of scikit-learn's digits is of no class"):
        open_dataset(dataset="digits", data_dir=None, image_size=8, flip=True)
    assert not Digits(8).flip and not open_dataset(dataset="digits", data_dir=None, image_size=8, flip=False).flip
    assert open_dataset(dataset="shapes", data_dir=None, image_size=8, flip=True).flip
    assert not open_dataset(dataset="", data_dir=str(folder), image_size=8, flip=False).flip


def test_a_run_without_mirroring_sees_no_mirror_image_and_says_what_it_did_to_images(folder, tmp_path, capsys):
    Image.fromarray(noise(9, 12)).save(folder / "ape" / "0.png")
    (folder / "bee" / "0.png").write_bytes(b"no image")
    (folder / "bee" / "a.svg").touch()
    task = DenoiserTask(TrainSettings(
        model="D-EMOv2-Ti-2", model_options={"depth": 1, "hidden_size": 48}, vae="pixels", data_dir=str(folder),
        image_size=16, batch_size=6, max_steps=1, tracker="none", output_dir=str(tmp_path / "run"), flip=False,
        skip_corrupt=True,
    ))  # fmt: skip
    batch = torch.stack([task.dataset[index][0] for index in range(2)])
    step = task.draw(torch.Generator().manual_seed(0), 2)._replace(flip=torch.ones(2, dtype=torch.bool))
    assert torch.equal(task._latents(batch, step), batch)
    fit(task, task.settings)
    said = capsys.readouterr().out
    assert "1 file of other kinds left out: .svg 1" in said
    assert "enlarged  1 image smaller than 16 px\nskipped   1 image that cannot be read\n" in said
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    assert all(line in recorded for line in ("exif: true", "background: white", "flip: false"))
