import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.data import Digits, ImageFolder, Shapes1000
from d_emo.errors import InputError, RunError
from d_emo.latents import LatentDataset, PixelCodec, encode

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
SMALL = {"device": CPU, "batch_size": 4, "shard_size": 10, "dtype": "float32"}


class HalfCodec(PixelCodec):
    """Cheap, with something to scale, and a deviation."""

    name, scaling, shift, fingerprint = "half", 0.5, 0.25, "half-encoder"

    def moments(self, images):
        return torch.cat([(images - self.shift) * self.scaling, images.abs() * 0.1], dim=1)


def shapes(count=27, size=8):
    return Shapes1000(size, num_images=count)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ape", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


# ---- what is written -------------------------------------------------------------------------------------------------


def test_stored_latents_are_the_moments_of_each_image_and_its_mirror(tmp_path, pictures):
    images, codec = ImageFolder(pictures, 8), HalfCodec()
    assert encode(images, codec, tmp_path / "out", **SMALL)
    stored = LatentDataset(tmp_path / "out")
    assert len(stored) == 8 and stored.flip and stored.class_names == ["ape", "bee"] and stored.name == "folder"
    for index in (0, 5):
        image, label = images[index]
        moments, stored_label = stored[index]
        both = torch.cat([codec.moments(image[None]), codec.moments(image[None].flip(-1))], dim=1)[0]
        assert torch.equal(moments, both) and stored_label == label == stored.label(index)
    with pytest.raises(IndexError):
        stored[8]


def test_images_that_may_not_be_mirrored_have_one_set_of_moments(tmp_path):
    encode(Digits(8, split="test"), HalfCodec(), tmp_path, **SMALL)
    assert LatentDataset(tmp_path)[3][0].shape == (6, 8, 8)


def test_the_index_tells_what_the_latents_are(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path, **{**SMALL, "dtype": "bfloat16"})
    index = json.loads((tmp_path / "index.json").read_text())
    known = {"data": "shapes", "images": 27, "image_size": 8, "codec": "half", "scaling": 0.5, "shift": 0.25,
             "dtype": "bfloat16", "mirrored": False, "shard_size": 10, "moments_shape": [6, 8, 8]}
    assert known.items() <= index.items() and len(index["class_names"]) == 1000
    assert [shard["images"] for shard in index["shards"]] == [10, 10, 7]
    assert len({shard["sha256_of_content"] for shard in index["shards"]}) == 3
    assert LatentDataset(tmp_path)[26][0].dtype == torch.bfloat16


def test_processes_together_write_what_one_writes(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path / "one", **SMALL)
    for rank in (1, 0):
        last = encode(shapes(), HalfCodec(), tmp_path / "two", **SMALL, rank=rank, world_size=2)
        assert last == (rank == 0) == (tmp_path / "two" / "index.json").exists()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_script_on_two_processes_writes_what_one_writes(tmp_path):
    encode(Digits(8), PixelCodec(), tmp_path / "one", **{**SMALL, "dtype": "float16", "shard_size": 400})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "scripts/encode_latents.py", "--dataset", "digits", "--image-size", "8",
               "--vae", "pixels", "--shard-size", "400", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "1,438 images of 10 classes" in done.stdout, done.stderr
    assert "2 processes shared the work" in done.stdout
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_workers_read_the_same_images(tmp_path, pictures):
    encode(ImageFolder(pictures, 8), HalfCodec(), tmp_path / "a", **SMALL)
    encode(ImageFolder(pictures, 8), HalfCodec(), tmp_path / "b", **SMALL, num_workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---- stopping, damage, trouble ---------------------------------------------------------------------------------------


class StopsIn(HalfCodec):
    """Is interrupted in its n-th batch."""

    def __init__(self, batch):
        self.left = batch

    def moments(self, images):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().moments(images)


def test_a_stopped_encoding_goes_on_and_keeps_finished_shards(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path / "whole", **SMALL)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        encode(shapes(), StopsIn(5), parts, **SMALL)
    assert [path.name for path in parts.iterdir()] == ["shard-00000.safetensors"]
    with pytest.raises(InputError, match=r"not complete \(index.json is missing\).*d-emo encode"):
        LatentDataset(parts)
    (parts / ".tmp-1-0-shard-00001.safetensors").write_bytes(b"half a shard")
    before = (parts / "shard-00000.safetensors").stat().st_mtime_ns
    assert encode(shapes(), HalfCodec(), parts, **SMALL)
    assert (parts / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert contents(parts) == contents(tmp_path / "whole")


def test_nothing_is_encoded_twice(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert encode(shapes(), StopsIn(1), tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_every_kind_of_damage_is_named_and_repaired(tmp_path, capsys):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    whole, rng, hurt = contents(tmp_path), random.Random(0), tmp_path / "shard-00001.safetensors"
    size = len(whole[hurt.name])
    places = [rng.randrange(size) for _ in range(30)] + [rng.randrange(400) for _ in range(20)]  # many in the header
    for place in places:
        damaged = bytearray(whole[hurt.name])
        damaged[place] ^= 1 << rng.randrange(8)
        hurt.write_bytes(damaged if place % 3 else damaged[:place])
        assert encode(shapes(), HalfCodec(), tmp_path, **SMALL)
        assert f"{hurt} " in capsys.readouterr().err
        assert contents(tmp_path) == whole


def test_an_index_that_says_something_else_than_the_shards_is_written_anew(tmp_path, capsys):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    whole, file = contents(tmp_path), tmp_path / "index.json"
    for damaged in (b"", b"{", b"[]", whole["index.json"].replace(b'"images": 10', b'"images": 11', 1)):
        file.write_bytes(damaged)
        assert encode(shapes(), HalfCodec(), tmp_path, **SMALL) and contents(tmp_path) == whole
        assert "index.json" in capsys.readouterr().err
    file.unlink()
    assert encode(shapes(), HalfCodec(), tmp_path, **SMALL) and contents(tmp_path) == whole
    assert capsys.readouterr().err == ""


def test_a_shard_that_cannot_be_opened_is_named_and_kept(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    hurt = tmp_path / "shard-00001.safetensors"
    hurt.rename(tmp_path / "elsewhere")
    hurt.mkdir()  # fails to open for everybody; permissions do not stop the superuser
    with pytest.raises(RunError, match=r"shard-00001.safetensors cannot be read \(Is a directory\) and is kept"):
        encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    assert hurt.is_dir()


def test_a_missing_or_cut_shard_is_refused_in_training(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    hurt = tmp_path / "shard-00001.safetensors"
    content = hurt.read_bytes()
    hurt.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"shard-00001.*not of its size.*d-emo encode"):
        LatentDataset(tmp_path)
    hurt.write_bytes(b"\xff" * len(content))
    with pytest.raises(InputError, match=r"shard-00001.*cannot be read"):
        LatentDataset(tmp_path)[13]
    hurt.unlink()
    with pytest.raises(InputError, match=r"shard-00001.*is missing.*d-emo encode"):
        LatentDataset(tmp_path)
    hurt.write_bytes(content)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"]  # older versions wrote none
    LatentDataset(tmp_path)
    for key in index.keys() - {"exif", "background"}:
        (tmp_path / "index.json").write_text(json.dumps({name: each for name, each in index.items() if name != key}))
        with pytest.raises(InputError, match=rf"index\.json lacks '{key}'; run `d-emo encode`"):
            LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(InputError, match="has format 2, which a later D-EMO wrote"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({**index, "shards": index["shards"][:1]}))
    with pytest.raises(InputError, match="index.json is damaged"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        LatentDataset(tmp_path)
    with pytest.raises(InputError, match="folder of latents .* does not exist"):
        LatentDataset(tmp_path / "none")


def test_latents_of_something_else_are_not_mixed_in(tmp_path):
    encode(shapes(), HalfCodec(), tmp_path, **SMALL)
    before = contents(tmp_path)
    for images, codec, changes, words in (
        (shapes(size=16), HalfCodec(), {}, "image_size 8, not 16"),
        (shapes(), PixelCodec(), {}, "encoder half-encoder, not pixels; scaling 0.5, not 1.0"),
        (shapes(), HalfCodec(), {"dtype": "float16"}, "dtype float32, not float16"),
        (shapes(28), HalfCodec(), {}, "images 27, not 28"),
    ):
        with pytest.raises(InputError, match=words):
            encode(images, codec, tmp_path, **{**SMALL, **changes})
    assert contents(tmp_path) == before


def test_an_image_whose_latents_are_not_finite_is_named(tmp_path, pictures):
    class Wild(HalfCodec):
        def moments(self, images):
            marked = (images[:, :1, :1, :1] == 1) & (images[:, 1:2, :1, :1] == -1)
            return super().moments(images) * torch.where(marked, self.factor, 1.0)

    Image.new("RGB", (8, 8), (255, 0, 0)).save(pictures / "bee" / "2.png")
    for factor, dtype in ((float("nan"), "float32"), (1e6, "float16")):
        codec = Wild()
        codec.factor = torch.tensor(factor)
        with pytest.raises(RunError, match=rf"bee/2\.png are not finite in {dtype}"):
            encode(ImageFolder(pictures, 8), codec, tmp_path / dtype, **{**SMALL, "shard_size": 4, "dtype": dtype})
        assert [path.name for path in (tmp_path / dtype).iterdir()] == ["shard-00000.safetensors"]


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(tmp_path):
    """The second shard does not fit: a process may write files of so many bytes only."""
    code = f"""
import resource, signal, torch
from d_emo.config import run_cli
from d_emo.data import Shapes1000
from d_emo.latents import PixelCodec, encode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def go(size):
    encode(Shapes1000(8, num_images=3), PixelCodec(), {str(tmp_path)!r}, device=torch.device("cpu"), shard_size=size)
def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    go(2)
run_cli(full)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in errors[0] and "the finished shards stay" in errors[0]
    assert not list(tmp_path.iterdir())


def test_corrupt_images_stop_or_are_passed_over(tmp_path, pictures):
    (pictures / "ape" / "1.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"ape/1\.png.*`skip_corrupt`"):
        encode(ImageFolder(pictures, 8), HalfCodec(), tmp_path / "a", **SMALL)
    (pictures / "ape" / "3.png").write_bytes(b"nor this")  # its place is taken by the first bee
    images = ImageFolder(pictures, 8, skip_corrupt=True)
    encode(images, HalfCodec(), tmp_path / "b", **SMALL)
    stored = LatentDataset(tmp_path / "b")
    assert torch.equal(stored[1][0], stored[2][0]) and torch.equal(stored[3][0], stored[4][0])
    assert [stored.label(index) for index in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_encoding_survives_kills_at_random_moments(tmp_path):
    code = """
import sys, torch
from d_emo.data import Shapes1000
from d_emo.latents import PixelCodec, encode
encode(Shapes1000(64, num_images=1000), PixelCodec(), sys.argv[1], device=torch.device("cpu"), shard_size=25)
"""
    def start(name):
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, stderr=subprocess.DEVNULL)

    def shards_in(name):
        return len(list((tmp_path / name).glob("shard-*")))

    assert start("whole").wait() == 0
    rng, kills = random.Random(0), 0
    for _ in range(20):
        count, process = shards_in("parts"), start("parts")
        while process.poll() is None and shards_in("parts") <= count:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert start("parts").wait() == 0
    assert kills > 5 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
