"""WebDataset's tar shards and data sets of the library ``datasets`` behind --data-dir."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import EncodeSettings, TrainSettings
from d_emo.data import HubImages, HubStream, ImageFolder, StepSampler, TarShards, open_dataset
from d_emo.data.tar import expand
from d_emo.errors import InputError, RunError
from d_emo.latents import LatentDataset, PixelCodec, encode

COUNT = 10


def picture(index):
    pixels = np.random.default_rng(index).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def label(index):
    return index % 3


def expected(tmp_path, index):
    """Image ``index`` as the image folder reads it."""
    folder = tmp_path / "one" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.png").write_bytes(picture(index))
    return ImageFolder(folder.parent, 8)[0][0]


# ---- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of five images with things that are not asked for; in the second the class comes first."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"s-{number:03}.tar", "w") as archive:
            for index in range(number * 5, number * 5 + 5):
                parts = [(f"train/{index:04}.png", picture(index)), (f"train/{index:04}.cls", b"%d\n" % label(index)),
                         (f"train/{index:04}.json", b"{}"), (f"train/{index:04}.mask.png", picture(99))]
                for name, content in parts if number == 0 else parts[::-1]:
                    add(archive, name, content)
    return folder


def test_tar_shards_are_read_at_random(shards, tmp_path):
    data = TarShards(f"{shards}/s-{{000..001}}.tar", 8)
    assert len(data) == COUNT and data.class_names == ["0", "1", "2"] and data.flip and data.name == "wds"
    for index in (7, 0, 9, 3):
        image, class_id = data[index]
        assert torch.equal(image, expected(tmp_path, index)) and class_id == label(index) == data.label(index)
    assert data.origin(7) == f"train/0007.png in {shards}/s-001.tar"
    assert expand(f"{shards}/*.tar") == data.shards == sorted(shards.iterdir())


def test_the_table_of_members_is_built_once(shards, cache, monkeypatch):
    TarShards(f"{shards}/*.tar", 8)
    assert [path.suffix for path in (cache / "d-emo").iterdir()] == [".npy"]
    with monkeypatch.context() as patch:
        patch.setattr("d_emo.data.tar._members", None)
        assert TarShards(f"{shards}/*.tar", 8)[9][1] == 0
    (cache / "d-emo" / next((cache / "d-emo").iterdir())).write_bytes(b"damaged")
    assert len(TarShards(f"{shards}/*.tar", 8)) == COUNT
    (shards / "s-001.tar").unlink()
    assert len(TarShards(f"{shards}/*.tar", 8)) == 5


def test_without_a_place_for_the_table_shards_are_read_all_the_same(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(TarShards(f"{shards}/*.tar", 8)) == COUNT


def test_tar_shards_take_class_names(shards, tmp_path):
    (tmp_path / "names.txt").write_text("ape\nbee\ncow\ndog\n")
    data = open_dataset(dataset="shapes", data_dir=f"wds:{shards}/*.tar?class_names={tmp_path}/names.txt", image_size=8)
    assert data.class_names == ["ape", "bee", "cow", "dog"]
    (tmp_path / "names.txt").write_text("ape\nbee\n")
    with pytest.raises(InputError, match="has 2 class names, the data have at least 3"):
        TarShards(f"{shards}/*.tar", 8, class_names=str(tmp_path / "names.txt"))


def test_tar_shards_name_what_is_wrong(shards, tmp_path):
    def refused(words, pattern=f"{shards}/*.tar"):
        with pytest.raises(InputError, match=words):
            TarShards(pattern, 8)

    refused("the shard .*s-002.tar does not exist", f"{shards}/s-{{000..002}}.tar")
    refused("the shard .*none.* does not exist", f"{tmp_path}/none*.tar")
    hurt = shards / "s-001.tar"
    whole = hurt.read_bytes()
    hurt.write_bytes(whole[:700])
    refused("s-001.tar (cannot be read|ends within)")
    hurt.write_bytes(b"x" * 3000)
    refused("s-001.tar cannot be read as an uncompressed tar")
    with tarfile.open(hurt, "w") as archive:
        add(archive, "a.png", picture(0))
    refused(r"a\.png in .*s-001.tar has no class: a member a\.cls")
    with tarfile.open(hurt, "w") as archive:
        add(archive, "a.cls", b"1")
    refused("s-001.tar holds no images")
    with tarfile.open(hurt, "w") as archive:
        add(archive, "a.cls", b"cat")
    refused("s-001.tar cannot be read.*cat")
    with tarfile.open(hurt, "w:gz") as archive:
        add(archive, "a.cls", b"1")
    refused("s-001.tar cannot be read as an uncompressed tar")


def test_a_corrupt_image_in_a_shard_is_named_or_passed_over(shards, capsys):
    with tarfile.open(shards / "s-001.tar", "w") as archive:
        for index, content in enumerate((b"no image", picture(1))):
            add(archive, f"{index}.png", content)
            add(archive, f"{index}.cls", b"%d" % index)
    with pytest.raises(InputError, match=r"0\.png in .*s-001.tar.*`skip_corrupt`"):
        TarShards(f"{shards}/*.tar", 8)[5]
    data = TarShards(f"{shards}/*.tar", 8, skip_corrupt=True)
    assert data[5][1] == 1 and torch.equal(data[5][0], data[6][0])
    assert capsys.readouterr().err.count("0.png in") == 1


def test_shards_that_webdataset_wrote_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs pip install webdataset")
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=4, verbose=0) as writer:
        for index in range(COUNT):
            writer.write({"__key__": f"k{index:03}", "png": picture(index), "cls": label(index)})
    data = TarShards(f"{tmp_path}/w-{{000000..000002}}.tar", 8)
    assert [data.label(index) for index in range(COUNT)] == [label(index) for index in range(COUNT)]
    assert torch.equal(data[8][0], expected(tmp_path, 8))


def test_workers_and_a_later_start_serve_the_same_items(shards):
    """What exact resuming needs: item i is always the same, whoever reads it."""
    data = open_dataset(dataset="shapes", data_dir=f"wds:{shards}/*.tar", image_size=8)

    def batches(start, workers):
        sampler = StepSampler(len(data), 4, 4, seed=0, start_step=start)
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=workers)
        return [batch for _, batch in zip(range(5 - start), loader, strict=False)]

    whole = batches(0, 0)
    for (images, labels), (again, labels_again) in zip(batches(2, 2), whole[2:], strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


# ---- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of parquet files, as a data set on the hub is stored."""
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({
        "picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ape", "bee", "cow"]),
        "word": datasets.Value("string"), "number": datasets.Value("int64"), "share": datasets.Value("float32"),
    })
    rows = {
        "picture": [{"bytes": picture(index), "path": None} for index in range(COUNT)],
        "kind": [label(index) for index in range(COUNT)], "word": ["xyz"[label(index)] for index in range(COUNT)],
        "number": [label(index) for index in range(COUNT)], "share": [0.5] * COUNT,
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    data.save_to_disk(tmp_path / "saved")
    return tmp_path


def test_datasets_are_read_at_random(hub):
    for source in ("hub", "saved"):
        data = open_dataset(dataset="shapes", data_dir=f"hf:{hub / source}", image_size=8)
        assert isinstance(data, HubImages) and len(data) == COUNT and data.class_names == ["ape", "bee", "cow"]
        for index in (7, 0, 9):
            image, class_id = data[index]
            assert torch.equal(image, expected(hub, index)) and class_id == label(index) == data.label(index)


def test_columns_of_words_and_numbers_give_classes_too(hub):
    for column, names in (("word", ["x", "y", "z"]), ("number", ["0", "1", "2"])):
        data = open_dataset(dataset="shapes", data_dir=f"hf:{hub}/hub?label={column}&image=picture", image_size=8)
        assert data.class_names == names and [data.label(index) for index in range(4)] == [0, 1, 2, 0]


def test_datasets_name_what_is_wrong(hub):
    for source, words in (
        ("hub?split=test", "cannot open the data set .*split test"),
        ("none", "cannot open the data set"),
        ("hub?label=breed", "no column breed; choose one by label=NAME after .*: picture, kind, word"),
        ("hub?label=share", "share of .* holds no classes"),
        ("hub?columns=a", "columns is not understood"),
        ("hub?streaming=yes", "streaming takes true or false"),
    ):
        with pytest.raises(InputError, match=words):
            open_dataset(dataset="shapes", data_dir=f"hf:{hub}/{source}", image_size=8)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'd-emo\[datasets\]'"):
        open_dataset(dataset="shapes", data_dir="hf:owner/name", image_size=8)


def test_a_stream_is_for_encoding(hub):
    source = f"hf:{hub}/hub?streaming=true&length={COUNT}"
    with pytest.raises(InputError, match=r"is a stream.*d-emo encode.*`latents` DIR"):
        open_dataset(dataset="shapes", data_dir=source, image_size=8)
    options = {"device": torch.device("cpu"), "batch_size": 2, "shard_size": 4}
    sources = (f"hf:{hub}/hub", source)
    plain, stream = (open_dataset(dataset="shapes", data_dir=name, image_size=8, sequential=True) for name in sources)
    assert isinstance(stream, HubStream)
    encode(plain, PixelCodec(), hub / "plain", **options)
    encode(stream, PixelCodec(), hub / "stream", **options, rank=1, world_size=2)
    encode(stream, PixelCodec(), hub / "stream", **options, rank=0, world_size=2)
    for file in (hub / "plain").iterdir():
        assert (hub / "stream" / file.name).read_bytes() == file.read_bytes()
    assert LatentDataset(hub / "stream").label(7) == 1


def test_a_stream_goes_through_its_rows_once(hub):
    data = HubStream(f"{hub}/hub", 8, length=COUNT)
    starts, rows = [], data.rows
    data.rows = type("Counted", (), {"__iter__": lambda self: starts.append(1) or iter(rows)})()
    for index in range(COUNT):
        assert data[index][1] == label(index) and data[index][1] == label(index)
    assert not starts
    assert data[2][1] == label(2) and len(starts) == 1


def test_a_stream_says_how_long_it_must_be(hub):
    with pytest.raises(InputError, match="does not tell how many images"):
        HubStream(f"{hub}/hub", 8)
    with pytest.raises(RunError, match=r"ended after 10 of 12 images; say so by length=10"):
        HubStream(f"{hub}/hub", 8, length=12)[11]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_run_folders_are_named_after_the_data():
    for source, name in (
        ("/a/pets", "pets"), ("wds:/a/pets/s-{000..001}.tar", "pets"), ("hf:owner/pets?split=train", "pets"),
    ):
        settings = TrainSettings(model="DiT-S-2", data_dir=source, image_size=64).resolve()
        assert settings.output_dir == f"results/DiT-S-2-{name}-64"
    assert TrainSettings(model="DiT-S-2").resolve().image_size == 256
    with pytest.raises(InputError, match="`shard_size` must be at least 1"):
        EncodeSettings(output="x", shard_size=0)
