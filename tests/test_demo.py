"""`d-emo demo`, with tiny settings from end to end."""

import sys
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from test_detector_training import BACKBONE, TINY
from test_segmentation import BACKBONE as OF_SEGMENTERS
from test_segmentation import TINY as TINY_SEGMENTER

from d_emo.cli import VERBS, demo_segment, demo_video, run_verb
from d_emo.cli.demo_detect import RUNS
from d_emo.config import parse_settings
from d_emo.data import moving
from d_emo.errors import InputError
from d_emo.tables import DEMOS, load
from d_emo.tables.demos import CONFIGS

CLASSIFIER = {"model": "emov2_1m", "model_options": BACKBONE, "dataset": "digits", "image_size": 32, "batch_size": 4,
              "max_steps": 2, "validate_images": 4, "tracker": "none", "output_dir": "demo/classifier"}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_tiny(name, monkeypatch, here, *runs):
    """Let a demo train with these settings, one mapping for each of its runs."""
    row = DEMOS[name]
    files = [here / f"{number}.yaml" for number in range(len(runs))]
    for file, values in zip(files, runs, strict=True):
        file.write_text(yaml.safe_dump(values))
    verbs = [verb for verb, _ in row.runs]
    tiny = replace(row, runs=tuple(zip(verbs, map(str, files), strict=True)))
    monkeypatch.setitem(DEMOS._rows, name, tiny)


def test_the_detect_demo_ends_with_figures_beside_a_floor_and_a_picture(here, monkeypatch, capsys):
    pytest.importorskip("faster_coco_eval")
    detector, floor = ({**TINY, "max_steps": 2, "output_dir": folder} for folder in RUNS.values())
    make_tiny("detect", monkeypatch, here, CLASSIFIER, {**detector, "init_from": "demo/classifier"}, floor)
    run_verb("demo", ["detect"])
    first = capsys.readouterr().out
    table = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("| ")][-3:]
    assert [row[0].strip() for row in table[1:]] == list(RUNS) and len(table[0]) == 7
    cells = [cell.strip() for row in table[1:] for cell in row[1:]]
    assert cells[5] == "-" and all(cell == "-" or 0 <= float(cell) <= 100 for cell in cells)  # none is large
    picture = Image.open(here / "demo" / "detect.png")
    assert min(picture.size) > 320
    (here / "demo" / "detect.png").unlink()
    run_verb("demo", ["detect"])
    second = capsys.readouterr().out
    assert second.count("nothing to do at step 2 of 2") == 3 and second.splitlines()[-4:] == first.splitlines()[-4:]
    assert (here / "demo" / "detect.png").exists()


def test_the_segment_demo_ends_with_figures_beside_a_floor_and_a_picture(here, monkeypatch, capsys):
    segmenter, floor = ({**TINY_SEGMENTER, "max_steps": 2, "validate_every": None, "output_dir": folder}
                        for folder in demo_segment.RUNS.values())  # fmt: skip
    classifier = {**CLASSIFIER, "model_options": OF_SEGMENTERS}
    runs = classifier, {**segmenter, "init_from": "demo/classifier"}, {**floor, "freeze_backbone": True}
    make_tiny("segment", monkeypatch, here, *runs)
    monkeypatch.setattr(demo_segment, "SIDE", 96), monkeypatch.setattr(demo_segment, "WIDE", 64)
    run_verb("demo", ["segment"])
    shown = capsys.readouterr().out
    of_digits, *by_class, header, first, second = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")
    ][-6:]
    assert of_digits == ["IoU of digits, %", *"0123456789"] and header[1:4] == ["mIoU, %", "digits", "background"]
    assert [row[0] for row in (first, second)] == list(demo_segment.RUNS) and header[0] == "3 held-out scenes"
    for row, each in zip((first, second), by_class, strict=True):
        mean, digits, ground, right, wide, _ = map(float, row[1:])
        assert 0 <= digits <= mean < ground <= 100 and 0 <= right <= 100 and 0 < wide < 20  # after two steps: ground
        assert digits == pytest.approx(sum(map(float, each[1:])) / 10, abs=0.5)
    with Image.open(here / "demo" / "segment.png") as picture:
        assert picture.width > 6 * 96 and picture.height > 3 * 96


def test_a_stopped_demo_is_resumed(here, monkeypatch, capsys):
    pytest.importorskip("faster_coco_eval")
    detector, floor = ({**TINY, "max_steps": 2, "output_dir": folder} for folder in RUNS.values())
    stopped = {**detector, "state_every": 1, "init_from": "demo/classifier"}
    make_tiny("detect", monkeypatch, here, CLASSIFIER, {**stopped, "max_minutes": 1e-9}, floor)
    with pytest.raises(SystemExit):
        run_verb("demo", ["detect"])
    assert "re-run the same command to resume" in capsys.readouterr().out and not (here / "demo/detect.png").exists()
    make_tiny("detect", monkeypatch, here, CLASSIFIER, stopped, floor)
    run_verb("demo", ["detect"])
    assert "resuming at step 1 of 2" in capsys.readouterr().out and (here / "demo/detect.png").exists()


def test_the_video_demo_ends_with_figures_beside_those_of_single_frames_and_a_picture(here, monkeypatch, capsys):
    monkeypatch.setattr(moving, "HELD_OUT", 24)
    tiny = {"model_options": BACKBONE, "image_size": 32, "num_videos": 24, "batch_size": 4, "max_steps": 1,
            "warmup_steps": 0, "tracker": "none"}  # fmt: skip
    make_tiny("video", monkeypatch, here, *(
        {**tiny, "model": model, "output_dir": folder}
        for model, folder in zip(("v-emov2_1m", "emov2_1m"), demo_video.RUNS.values(), strict=True)
    ))  # fmt: skip
    run_verb("demo", ["video"])
    *_, first, second, chance, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("| V-EMO | ") and second.startswith("| image network")
    assert chance == "| chance | 8.3% | 41.7% |"
    assert Image.open(here / "demo" / "video.png").size == (280 + 68 * 8, 68 * 12)


def test_an_unknown_demo_and_one_that_lacks_a_package_are_told_in_a_sentence(monkeypatch):
    with pytest.raises(InputError, match="^NAME must be one of detect.*, not detec; did you mean detect[?]$"):
        run_verb("demo", ["detec"])
    with pytest.raises(InputError, match="this is missing: NAME, one of detect, segment, medical, deit, video"):
        run_verb("demo", [])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match="needs faster_coco_eval: pip install 'd-emo.detection.'"):
        run_verb("demo", ["detect"])


RUNS_OF_ALL = [(row.name, *run) for row in DEMOS.values() for run in row.runs]


@pytest.mark.parametrize(("name", "verb", "config"), RUNS_OF_ALL)
def test_every_config_of_a_demo_is_taken_by_its_verb_and_writes_to_the_folder_demo(name, verb, config):
    settings = parse_settings(load(VERBS[verb].settings), "", ["--config", str(CONFIGS / config)])
    assert settings.output_dir.startswith("demo/") and settings.max_steps <= 2000


def test_the_classifier_of_the_demos_is_that_of_make_demo():
    assert DEMOS["segment"].runs[0] == DEMOS["detect"].runs[0] == ("train-classifier", "classifier.yaml")
    ours = CONFIGS.parents[1] / "configs" / "demo_classifier.yaml"
    assert yaml.safe_load(ours.read_text()) == yaml.safe_load((CONFIGS / "classifier.yaml").read_text())


def test_a_folder_of_another_version_is_named_with_the_remedy_and_a_full_one_is_passed_at_once(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(moving, "HELD_OUT", 12)
    tiny = {"model_options": BACKBONE, "image_size": 32, "num_videos": 12, "batch_size": 4, "max_steps": 1,
            "warmup_steps": 0, "tracker": "none"}  # fmt: skip
    runs = [{**tiny, "model": model, "output_dir": folder}
            for model, folder in zip(("v-emov2_1m", "emov2_1m"), demo_video.RUNS.values(), strict=True)]  # fmt: skip
    make_tiny("video", monkeypatch, here, *runs)
    run_verb("demo", ["video"])
    assert "demo      video, run 2 of 2" in capsys.readouterr().out
    run_verb("demo", ["video"])
    assert capsys.readouterr().out.count("nothing to do at step 1 of 1") == 2
    make_tiny("video", monkeypatch, here, *({**run, "learning_rate": 0.5} for run in runs))
    with pytest.raises(InputError, match="learning_rate was .*If nothing in demo/video is needed, remove it, and the"):
        run_verb("demo", ["video"])
    make_tiny("video", monkeypatch, here, *({**run, "output_dir": "demo/new", "batch_size": 0} for run in runs))
    (here / "demo" / "new").mkdir()
    with pytest.raises(InputError, match="batch-size.*not 0$"):  # the folder is not to blame
        run_verb("demo", ["video"])
