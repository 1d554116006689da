"""Data sets of the library ``datasets`` behind --data-dir, on the disk and as streams."""

import shutil
import sys
import types

import pytest
import torch
from test_data_sources import COUNT, cache, expected, label, picture

from d_emo.data import HubImages, HubStream, open_dataset
from d_emo.data.hub import _say_left_out
from d_emo.errors import InputError, RunError
from d_emo.latents import LatentDataset, PixelCodec, encode

__all__ = ["cache"]  # a fixture of all tests


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


def test_labels_in_lists_or_of_other_types_are_understood_or_refused(hub):
    datasets = pytest.importorskip("datasets")
    images, number = [{"bytes": picture(index), "path": None} for index in range(2)], datasets.Value
    for kind, values, said in (
        (datasets.Sequence(number("int64")), [[0], [1]], "no columns of kind ClassLabel; choose one by label=NAME"),
        (number("int64"), [0, 2**62], f"has the label {2**62}; classes are numbered"),
        (number("uint8"), [0, 1], None), (number("bool"), [True, False], None),
    ):  # fmt: skip
        rows, features = {"image": images, "label": values}, {"image": datasets.Image(), "label": kind}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(hub / "odd")
        if said is None:
            assert [opened(hub / "odd").label(index) for index in range(2)] == values
            continue
        with pytest.raises(InputError, match=said):
            opened(hub / "odd")


def opened(source):
    return open_dataset(dataset="shapes", data_dir=f"hf:{source}", image_size=8)


def test_a_saved_data_set_has_the_splits_that_it_has(hub):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_from_disk(hub / "saved")
    with pytest.raises(InputError, match="saved has no split test: it has no named splits"):  # not all of it instead
        opened(f"{hub}/saved?split=test")
    assert len(opened(f"{hub}/saved?split=train")) == len(opened(f"{hub}/saved")) == COUNT
    held_out = datasets.load_dataset(str(hub / "hub"), split="train[:4]")
    datasets.DatasetDict({"train": data, "test": held_out}).save_to_disk(hub / "both")
    assert [len(opened(f"{hub}/both{split}")) for split in ("", "?split=train", "?split=test")] == [COUNT, COUNT, 4]
    with pytest.raises(InputError, match="both has no split val: it has train, test"):
        opened(f"{hub}/both?split=val")
    datasets.DatasetDict({"all": data}).save_to_disk(hub / "all")
    assert len(opened(f"{hub}/all")) == COUNT


def test_rows_that_lack_something_are_said(hub, capsys):
    datasets = pytest.importorskip("datasets")
    kinds = {"jpg": "binary", "cls": "int64", "more": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})

    def saved(name, jpg, cls):
        rows = {"jpg": jpg, "cls": cls, "more": ["x"] * len(jpg)}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(hub / name)
        return f"{hub / name}"

    data = opened(saved("gap", [picture(0), None, picture(2)], [1, 1, 2]))  # columns by their usual names
    assert data.class_names == ["0", "1", "2"] and "first_class=1" in capsys.readouterr().err
    assert torch.equal(data[2][0], expected(hub, 2))
    with pytest.raises(InputError, match="row 1 of .*gap holds no image"):
        data[1]
    skipping = HubImages(str(hub / "gap"), 8, skip_corrupt=True, first_class=1)
    assert torch.equal(skipping[1][0], skipping[2][0]) and skipping.class_names == ["1", "2"]
    for name, jpg, cls, words in (
        ("none", [], [], "none has no rows"), ("unlabelled", [picture(0)], [None], "images without a class"),
        ("below", [picture(0)], [-1], "images without a class"),
    ):
        with pytest.raises(InputError, match=words):
            opened(saved(name, jpg, cls))
    (hub / "empty").mkdir()
    datasets.Dataset.from_dict({name: [] for name in kinds}, features=features).to_parquet(hub / "empty" / "a.parquet")
    with pytest.raises(InputError, match="empty.* (has no rows|corresponds to no data)"):
        opened(hub / "empty")
    with pytest.raises(InputError, match="the column cls of .*gap holds no images; add image=COLUMN"):
        opened(f"{hub}/gap?image=cls&label=more")


def test_names_of_data_sets_are_checked_and_can_be_given(hub):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_from_disk(hub / "saved")
    names = datasets.ClassLabel(names=["/a/abbey", "bee", "cow"])
    data.cast_column("kind", names).save_to_disk(hub / "places")
    with pytest.raises(InputError, match="class 0 is called '/a/abbey', which has a path separator.*class_names=FILE"):
        opened(f"{hub}/places")
    (hub / "names.json").write_text('{"abbey": 0, "bee": 1, "cow": 2}')
    assert opened(f"{hub}/places?class_names={hub}/names.json").class_names == ["abbey", "bee", "cow"]
    words = [str(number) for number in (11, 9, 10)]
    data.add_column("text", [words[label(index)] for index in range(COUNT)]).save_to_disk(hub / "text")
    data = opened(f"{hub}/text?label=text")
    assert data.class_names == ["9", "10", "11"] and [data.label(index) for index in range(3)] == [2, 0, 1]


def test_a_folder_of_which_the_library_reads_a_part_is_refused(hub, capsys):
    datasets = pytest.importorskip("datasets")
    root = hub / "images"
    for name in ("cat/0", "dog/0", "train_station/0", "train_interior/0"):
        (root / name).parent.mkdir(parents=True)
        (root / f"{name}.png").write_bytes(picture(0))
    words = "the library datasets leaves out 2, such as cat/0.png"
    with pytest.raises(InputError, match=f"of the 4 images in {root} {words}"):
        opened(root)
    for name in ("train_station", "train_interior"):
        (root / name).rename(hub / name)
    assert len(opened(root)) == 2
    (root / "more").symlink_to(hub / "train_station", target_is_directory=True)
    with pytest.raises(InputError, match="leaves out 1, such as more/0.png"):
        opened(root)
    _say_left_out("owner/pets", datasets.load_dataset_builder(str(root)))  # as of a repository, whose files it lists
    assert "of the 3 images in owner/pets" not in capsys.readouterr().err  # links are none of its files
    (root / "train_1.png").write_bytes(picture(0))
    _say_left_out("owner/pets", datasets.load_dataset_builder(str(root)))
    assert "of the 3 images in owner/pets the library datasets leaves out 2" in capsys.readouterr().err
    (root / "train_1.png").unlink()
    splits = hub / "splits"
    root.rename(hub / "old")
    (hub / "old" / "more").unlink()
    for split in ("train", "test", "figures"):
        shutil.copytree(hub / "old", splits / split)
    assert len(opened(splits)) == len(opened(f"{splits}?split=test")) == 2


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


def test_a_stream_without_class_names_takes_a_list(hub):
    (hub / "names.txt").write_text("x\ny\nz\n")
    source = f"hf:{hub}/hub?streaming=true&length={COUNT}&label=number"
    with pytest.raises(InputError, match="no class names, which a stream needs; add class_names=FILE"):
        open_dataset(dataset="", data_dir=source, image_size=8, sequential=True)
    data = open_dataset(dataset="", data_dir=f"{source}&class_names={hub}/names.txt", image_size=8, sequential=True)
    assert data.class_names == ["x", "y", "z"] and [data[index][1] for index in range(4)] == [0, 1, 2, 0]
    (hub / "names.txt").write_text("x\ny\n")
    data = open_dataset(dataset="", data_dir=f"{source}&class_names={hub}/names.txt", image_size=8, sequential=True)
    with pytest.raises(InputError, match="row 2 of .* has the class 2, which is none of 2"):
        [data.label(index) for index in range(3)]


def test_a_stream_says_how_long_it_must_be(hub):
    with pytest.raises(InputError, match="does not tell how many images"):
        HubStream(f"{hub}/hub", 8)
    with pytest.raises(RunError, match=r"ended after 10 of 12 images; say so by length=10"):
        HubStream(f"{hub}/hub", 8, length=12)[11]

def test_a_loading_script_is_refused_whatever_the_version_of_datasets(tmp_path, monkeypatch):
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "pets.py").write_text("raise SystemExit('it ran')")
    asked = types.SimpleNamespace(HF_DATASETS_TRUST_REMOTE_CODE=True)

    def builder(source, config):  # as versions before 4 do with a script on the hub
        assert asked.HF_DATASETS_TRUST_REMOTE_CODE is False
        raise ValueError(f"The repository for {source} contains custom code which must be executed")

    library = types.SimpleNamespace(config=asked, load_dataset_builder=builder)
    monkeypatch.setitem(sys.modules, "datasets", library)
    for source in (folder, folder / "pets.py"):
        with pytest.raises(InputError, match="loading script, and code that lies beside data is not run"):
            open_dataset(dataset="", data_dir=f"hf:{source}", image_size=8)
    with pytest.raises(InputError, match="cannot open the data set owner/pets, .*contains custom code"):
        open_dataset(dataset="", data_dir="hf:owner/pets", image_size=8)
