"""WebDataset's tar shards behind --data-dir, and how run folders are named after data."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import EncodeSettings, TrainSettings
from d_emo.data import ImageFolder, StepSampler, TarShards, open_dataset
from d_emo.data.names import read_class_names
from d_emo.data.tar import expand
from d_emo.errors import InputError

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
    assert [path.suffix for path in (cache / "d-emo").iterdir()] == [".npz"]
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
    for content in (b"\xff\xfe\xfa", b"-1"):
        with tarfile.open(hurt, "w") as archive:
            add(archive, "a.png", picture(0))
            add(archive, "a.cls", content)
        refused("in .*s-001.tar is not UTF-8" if content != b"-1" else r"a\.png in .* has no class")
    with tarfile.open(hurt, "w:gz") as archive:
        add(archive, "a.cls", b"1")
    refused("s-001.tar cannot be read as an uncompressed tar")


def shard(path, **members):
    """A tar of these members; double underscores stand for dots."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add(archive, name.replace("__", "."), content if isinstance(content, bytes) else str(content).encode())
    return str(path)


def read(path, **options):
    """Class and index of the picture of each image; pictures are those of `picture`."""
    data, found = TarShards(path, 8, **options), []
    for index in range(len(data)):
        with open(data.shards[0], "rb") as file:
            file.seek(data.offset[index])
            content = file.read(data.size[index])
        found.append((data.class_names[data.label(index)], next(i for i in range(20) if picture(i) == content)))
    return found


def test_keys_of_members_may_have_dots_and_parts(tmp_path):
    dotted = shard(tmp_path / "a.tar", x0__1__png=picture(0), x0__1__cls=1, x0__2__png=picture(1), x0__2__cls=0)
    assert read(dotted) == [("1", 0), ("0", 1)]
    parts = shard(
        tmp_path / "b.tar", a__mask__png=picture(9), a__image__jpg=picture(0), a__cls=0, b__cls=1,
        b__input__png=picture(1), c__depth__png=picture(9), c__mask__png=picture(9), c__png=picture(2), c__cls=2,
    )
    assert read(parts) == [("0", 0), ("1", 1), ("2", 2)]
    unclear = shard(tmp_path / "c.tar", a__input__png=picture(0), a__target__png=picture(1), a__cls=0)
    with pytest.raises(InputError, match=r"two images of one key, a\.input\.png and a\.target\.png"):
        TarShards(unclear, 8)
    mac = shard(tmp_path / "._d.tar", a__png=picture(0))
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for name in ("a", "._a", ".hidden/b", "__MACOSX/a"):
            add(archive, f"{name}.png", picture(0))
            add(archive, f"{name}.cls", b"0")
    assert len(TarShards(f"{tmp_path}/d*.tar", 8)) == 1 and mac not in map(str, expand(f"{tmp_path}/*.tar"))


def test_members_that_are_no_images_links_and_capitals(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.PNG", picture(0)), ("a.CLS", b"0"), ("a.txt", b"x"), ("c.psd", b"x"), ("c.cls", b"1"),
                              ("b.cls", b"1")):
            add(archive, name, content)
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.PNG"
            archive.addfile(member)
    for _ in range(2):  # the second time from the table that was kept
        assert read(str(path)) == [("0", 0), ("1", 0)]
        assert TarShards(str(path), 8).left_out == "2 files of other kinds left out: .psd 1, .png 1"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1000000", "b.png in .* has the label 1000000; classes are numbered"), (b"9" * 30, "has the label 999"),
        ("caf\u00e9".encode("latin-1"), r"b\.cls in .*a\.tar is not UTF-8"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        TarShards(shard(tmp_path / "a.tar", a__png=picture(0), a__cls=0, b__png=picture(1), b__cls=content), 8)


def test_classes_may_be_words_or_lie_in_json(tmp_path):
    words = shard(tmp_path / "a.tar", a__png=picture(0), a__cls="dog\n", b__png=picture(1), b__cls="\ufeffcat")
    for _ in range(2):  # the second time from the table that was kept
        assert read(words) == [("dog", 0), ("cat", 1)] and TarShards(words, 8).class_names == ["cat", "dog"]
    (tmp_path / "names.txt").write_text("dog\ncat\ncow\n")
    assert TarShards(words, 8, class_names=str(tmp_path / "names.txt")).class_names == ["dog", "cat", "cow"]
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(InputError, match="names.txt does not have the class 'cat'"):
        TarShards(words, 8, class_names=str(tmp_path / "names.txt"))
    objects = shard(
        tmp_path / "b.tar", a__json='{"caption": "x", "label": 1, "breed": "pug"}', a__png=picture(0),
        b__png=picture(1), b__json='{"label": "0", "breed": "tom", "box": [1]}',
    )
    assert read(objects) == [("1", 0), ("0", 1)] and read(objects, label="breed") == [("pug", 0), ("tom", 1)]
    for field, reason in (
        ("caption", r"b\.png in .* has no class"),
        ("box", r"the field box of b\.json in .* is no class; name another with label=FIELD"),
    ):
        with pytest.raises(InputError, match=reason):
            TarShards(objects, 8, label=field)


def test_labels_from_one_leave_class_zero_empty_and_are_said(tmp_path, capsys):
    counted = shard(tmp_path / "a.tar", a__png=picture(0), a__cls=1, b__png=picture(1), b__cls=2)
    source = f"wds:{counted}"

    def opened(options=""):
        return open_dataset(dataset="", data_dir=source + options, image_size=8)

    assert opened().class_names == ["0", "1", "2"]
    said = capsys.readouterr().err
    assert "1 of 3 classes of" in said
    assert "have no images, such as 0 (0); where labels count from 1, add first_class=1" in said
    data = opened("?first_class=1")
    assert data.class_names == ["1", "2"] and [data.label(0), data.label(1)] == [0, 1] and not capsys.readouterr().err
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="2 class names.*labels 1 to 2; if these count from 1, add first_class=1"):
        opened(f"?class_names={tmp_path}/names.txt")
    assert opened(f"?class_names={tmp_path}/names.txt&first_class=1").class_names == ["cat", "dog"]
    for wrong, words in (("2", "the label 1, below first_class=2"), ("x", "first_class takes a number")):
        with pytest.raises(InputError, match=words):
            opened(f"?first_class={wrong}")


def test_class_lists_are_read_in_the_forms_that_people_have(tmp_path, capsys):
    path, cranes = tmp_path / "names.txt", ["crane", "crâne"]
    marked = b"\xef\xbb\xbfcrane\r\ncr\xc3\xa2ne\r\n\r\n"
    for content in (b"crane\ncr\xc3\xa2ne", marked, "crane\ncrâne\n".encode("utf-16")):
        path.write_bytes(content)
        assert read_class_names(str(path)) == cranes
    assert not capsys.readouterr().err
    path.write_bytes(b"crane\ncr\xe2ne\n")
    assert read_class_names(str(path)) == cranes and "read as Latin-1" in capsys.readouterr().err
    path = tmp_path / "imagenet_class_index.json"
    for content, first in (
        ({"0": ["n02012849", "crane"], "1": ["n03126707", "crâne"]}, 0), ({"2": "crâne", "1": "crane"}, 1),
        ({"crâne": 1, "crane": 0}, 0), (cranes, 0), (cranes, 1),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        assert read_class_names(str(path), first) == cranes
    for content in ("{", "3", '{"0": "a", "2": "b"}', '{"0": null}', "[[]]"):
        path.write_text(content)
        with pytest.raises(InputError, match="is no JSON of class names"):
            read_class_names(str(path))
    with pytest.raises(InputError, match="cannot read the class names in .*none: No such file"):
        read_class_names(str(tmp_path / "none"))


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
