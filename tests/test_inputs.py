import json
import re

import pytest
from PIL import Image

from d_emo.cli import run_verb
from d_emo.cli.inputs import find_images, free_names, read_images
from d_emo.data import Reading
from d_emo.errors import InputError


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, one deeper, a text, and a picture that is none."""
    for name in ("b.png", "a.jpg", "deep/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 36), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def named(folder, sources):
    return [str(file.relative_to(folder)) for file in find_images([str(folder / source) for source in sources])]


@pytest.mark.parametrize(("sources", "found"), [
    (["b.png"], ["b.png"]),
    (["."], ["a.jpg", "b.png", "broken.png", "deep/a.png"]),
    (["*.png"], ["b.png", "broken.png"]),
    (["*"], ["a.jpg", "b.png", "broken.png", "deep/a.png"]),  # and not the text
    (["**/a.*"], ["a.jpg", "deep/a.png"]),
    (["b.png", "*.png", "[ab].*"], ["b.png", "broken.png", "a.jpg"]),  # none twice, sources in their order
])  # fmt: skip
def test_files_folders_and_patterns(sources, found, pictures):
    assert named(pictures, sources) == found


def test_a_file_whose_name_looks_like_a_pattern(pictures):
    (pictures / "b.png").rename(pictures / "[1].png")
    assert named(pictures, ["[1].png"]) == ["[1].png"]


@pytest.mark.parametrize(("source", "words"), [
    ("*.webp", "what matches .*webp holds no images"), ("*.txt", "1 file of other kinds left out: .txt 1"),
    ("empty", "the folder .*empty holds no images"),
])  # fmt: skip
def test_nothing_found_is_told(source, words, pictures):
    (pictures / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        find_images([str(pictures / source)])


def test_what_cannot_be_read_is_named_and_passed_over(pictures, capsys):
    files = find_images([str(pictures)])
    read = list(read_images(files, Reading(), skip_corrupt=True))
    assert [number for number, _, _ in read] == [0, 1, 3] and read[0][2].shape == (3, 36, 40)
    assert "skipped (1 so far): cannot read the image" in (said := capsys.readouterr().err) and "broken.png" in said
    with pytest.raises(InputError, match="broken.png .*; `skip_corrupt` passes over such images"):
        list(read_images(files, Reading(), skip_corrupt=False))
    with pytest.raises(InputError, match="none of the images could be read"):
        list(read_images([pictures / "broken.png"], Reading(), skip_corrupt=True))


def test_names_are_free(pictures):
    assert free_names(find_images([str(pictures)])) == ["a-1", "b", "broken", "a-2"]


def test_segment_passes_over_what_cannot_be_read(pictures, capsys):
    run_verb("segment", [str(pictures / "*.*"), "--model", "segformer-emov2_1m", "--image-size", "32",
                         "--skip-corrupt", "--output", str(pictures / "out")])  # fmt: skip
    printed = capsys.readouterr()
    assert "(2 of .png, _classes.png and .json each" in printed.out and "broken.png" in printed.err
    written = sorted(file.name for file in (pictures / "out").iterdir())
    assert written == ["a.json", "a.png", "a_classes.png", "b.json", "b.png", "b_classes.png"]
    assert json.loads((pictures / "out" / "a.json").read_text())["image"].endswith("a.jpg")


@pytest.mark.parametrize(("source", "words"), [
    ("{}/none.png", "IMAGES {}/none.png does not exist"), ("{}/*.webp", "matches {}/\\*.webp holds no images"),
    ("{}/broken.png", "--skip-corrupt passes over such images"),
])  # fmt: skip
def test_segment_refuses_in_a_sentence(source, words, pictures, capsys):
    with pytest.raises((SystemExit, InputError)) as stop:
        run_verb("segment", [source.format(pictures), "--model", "segformer-emov2_1m", "--output",
                             str(pictures / "out")])  # fmt: skip
    said = capsys.readouterr().err + str(stop.value)
    assert re.search(words.format(re.escape(str(pictures))), said.replace("`skip_corrupt`", "--skip-corrupt"))
    assert not (pictures / "out").exists()
