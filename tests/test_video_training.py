"""Training and measuring V-EMO and the mean of frames: exact resumes, inflated starts, bad settings."""

import json

import pytest
import torch
import yaml
from PIL import Image
from test_video_data import write_video

from d_emo.cli import run_verb, train_video
from d_emo.config import ClassifierSettings, VideoSettings
from d_emo.data import moving
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import kind_of, load_classifier
from d_emo.io.training_state import load_state
from d_emo.io.video import KIND, VideoClassifier, open_video_classifier
from d_emo.models import create_model
from d_emo.models.video import inflate
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask
from d_emo.training.rehearsal import Rehearsal
from d_emo.training.video import VideoTask

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "head_dims": [8] * 4}
TINY = {
    "model": "v-emov2_1m", "model_options": NETWORK, "image_size": 32, "frames": 4, "batch_size": 4, "max_steps": 4,
    "warmup_steps": 1, "num_videos": 24, "validate_images": 4, "state_every": 2, "snapshot_every": 4,
    "tracker": "none",
}  # fmt: skip


def settings_of(folder, **changes):
    return VideoSettings.from_mapping({**TINY, "output_dir": str(folder), **changes})


def train(folder, **changes):
    settings = settings_of(folder, **changes)
    return fit(VideoTask(settings), settings)


@pytest.fixture(autouse=True)
def few_are_held_out(monkeypatch):
    monkeypatch.setattr(moving, "HELD_OUT", 24)


@pytest.fixture
def films(tmp_path):
    """Four videos in two classes to train on, and one of each class held out."""
    for part, count in (("train", 2), ("val", 1)):
        for label in ("run", "jump"):
            for number in range(count):
                write_video(tmp_path / "films" / part / label / f"{number}.avi", count=5 + number)
    return tmp_path / "films"


@pytest.fixture
def image_classifier(tmp_path):
    """A snapshot of a tiny classifier of digits."""
    settings = ClassifierSettings.from_mapping({
        "model": "emov2_1m", "model_options": NETWORK, "dataset": "digits", "image_size": 32, "batch_size": 4,
        "max_steps": 1, "warmup_steps": 0, "output_dir": str(tmp_path / "images"), "tracker": "none",
        "num_workers": 0,
    })  # fmt: skip
    return fit(ClassifierTask(settings), settings)


def equal_states(one, other):
    one, other = load_state(one), load_state(other)
    return all(torch.equal(one[part][name], other[part][name]) for part in ("model", "ema") for name in one[part]
               if isinstance(one[part][name], torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, films, own, monkeypatch):
    pytest.importorskip("av")
    data = {"data_dir": str(films)} if own else {}
    train(tmp_path / "whole", **data)
    step = VideoTask.loss
    monkeypatch.setattr(VideoTask, "loss", lambda self, *args: 1 / 0 if self.lost() else step(self, *args))
    seen = []
    monkeypatch.setattr(VideoTask, "lost", lambda self: seen.append(1) or len(seen) == 4, raising=False)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "killed", **data)
    train(tmp_path / "killed", **data)
    assert len(seen) == 4 + 2
    assert equal_states(tmp_path / "whole/states/step-4", tmp_path / "killed/states/step-4")


def test_videos_are_trained_and_measured_on(tmp_path, films, capsys):
    pytest.importorskip("av")
    run_verb("train-video", [
        f"--data-dir={films}", f"--output-dir={tmp_path}/run", "--max-steps=1", "--batch-size=2", "--warmup-steps=0",
        "--model=v-emov2_1m", f"--model-options={yaml.safe_dump(NETWORK, default_flow_style=True)}",
        "--image-size=32", "--frames=8", "--sampling=dense", "--frame-interval=2", "--tracker=none",
        "--validate-every=1",
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert "2 classes; 4 videos of" in output and "2 held out; clips of 8 frames of 32 px" in output
    assert "of 2 videos held out (ema weights)" in output and "repeated  frames of 2 videos with fewer than 8" in output
    run_verb("evaluate", [f"{tmp_path}/run", "--clips=2", "--crops=3", f"--output={tmp_path}/found.json"])
    assert "of 2 videos" in capsys.readouterr().out and json.loads((tmp_path / "found.json").read_text())["images"] == 2
    opened = open_video_classifier(str(tmp_path / "run"), "raw")
    assert (opened.sampler.kind, opened.sampler.interval, opened.class_names) == ("dense", 2, ["jump", "run"])
    assert kind_of(tmp_path / "run") == KIND and opened.validate_dir == str(films / "val")


def test_an_image_classifier_is_trained_on_the_mean_of_frames(tmp_path, capsys):
    snapshot = train(tmp_path / "run", model="emov2_1m", max_steps=1)
    model = open_video_classifier(str(snapshot)).model
    assert model.model.spatial_dims == 2
    model.model = network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 8), torch.nn.ReLU())
    network.spatial_dims = 2
    clips = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    with torch.no_grad():
        frames = torch.stack([network(clips[:, :, t]) for t in range(4)])
        answer, shuffled = model(clips), model(clips[:, :, [2, 0, 3, 1]])
    assert torch.allclose(answer, frames.mean(0).log_softmax(1), atol=1e-5) and frames.std(0).max() > 0.1
    assert torch.allclose(answer, shuffled, atol=1e-5)
    run_verb("evaluate", [str(snapshot), "--num-images=12"])
    assert "on moving-digits, 32 px: top-1" in capsys.readouterr().out


def test_probabilities_of_several_views_are_averaged():
    torch.manual_seed(0)
    model = VideoClassifier(create_model("v-emov2_1m", **NETWORK, num_classes=3), [0.4] * 3, [0.2] * 3).eval()
    torch.nn.init.normal_(model.model.head.weight)
    views = torch.rand(2, 3, 3, 4, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = torch.stack([model.model(((views[:, i] + 1) / 2 - 0.4) / 0.2).softmax(1) for i in range(3)]).mean(0)
        assert torch.allclose(model(views).exp(), expected, atol=1e-6)
        assert torch.allclose(model(views[:, 0]), model(views[:, :1]), atol=1e-6)


@pytest.mark.parametrize("rule", ["divide", "repeat"])
def test_runs_start_from_inflated_image_classifiers(tmp_path, image_classifier, rule):
    task = VideoTask(settings_of(tmp_path / "run", init_from=str(image_classifier), inflate=rule))
    image, fresh = open_classifier(str(image_classifier)), VideoTask(settings_of(tmp_path / "run"))
    expected = inflate(image.emo.state_dict(), fresh.model, rule)
    assert all(torch.equal(value, expected[name]) for name, value in task.model.state_dict().items())
    assert "inflated" in task.start[0] and task.normalisation == ((0.5,) * 3, (0.5,) * 3)
    frames = VideoTask(settings_of(tmp_path / "run", init_from=str(image_classifier), model="emov2_1m"))
    assert torch.equal(frames.model.stem.conv.conv.weight, image.emo.stem.conv.conv.weight)


def test_runs_start_from_snapshots_of_videos(tmp_path, films):
    pytest.importorskip("av")
    first = train(tmp_path / "first", max_steps=1)
    task = VideoTask(settings_of(tmp_path / "second", init_from=str(first), data_dir=str(films)))
    there = load_classifier(first, KIND).model.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in task.model.state_dict().items()
               if not name.startswith("head."))  # fmt: skip
    assert "knows 0 of the 2 classes by name" in task.start[0] and task.started_from["step"] == 1
    same = VideoTask(settings_of(tmp_path / "same", init_from=str(tmp_path / "first")))
    assert torch.equal(same.model.head.weight, there["head.weight"])
    frames = train(tmp_path / "frames", model="emov2_1m", max_steps=1)
    inflated = VideoTask(settings_of(tmp_path / "inflated", init_from=str(frames)))
    assert "inflated, divided by their depth" in inflated.start[0]
    with pytest.raises(InputError, match="the classifier .* does not fit|stem.conv"):
        VideoTask(settings_of(tmp_path / "flat", init_from=str(first), model="emov2_1m"))


@pytest.mark.parametrize("changes, message", [
    ({"model": "D-EMOv2-S-2"}, "is a denoiser; train it with `d-emo train`"),
    ({"model_options": {"spatial_dims": 2}}, "spatial_dims follows from the data or from `model`"),
    ({"data_dir": "nowhere"}, "the data folder nowhere does not exist"),
    ({"validate_dir": "."}, "belongs to a `data_dir`"), ({"flip": True}, "a mirrored motion is of another class"),
    ({"rand_augment": "rand-m7-n4"}, "needs videos of your own"), ({"crop_scale": [1, 0.5]}, "two rising shares"),
    ({"init_from": "nowhere"}, "Unknown model 'nowhere'"),
])  # fmt: skip
def test_bad_settings_are_told_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        VideoTask(settings_of(tmp_path / "run", **changes))


def test_other_verbs_say_what_a_snapshot_of_videos_is(tmp_path, image_classifier):
    snapshot = train(tmp_path / "run", max_steps=1)
    with pytest.raises(InputError, match="holds a video classifier, not a classifier"):
        open_classifier(str(snapshot))
    with pytest.raises(InputError, match="--clips and --crops are for classifiers of videos"):
        run_verb("evaluate", [str(image_classifier), "--clips=2"])
    with pytest.raises(InputError, match="--dataset digits holds images"):
        run_verb("evaluate", [str(snapshot), "--dataset=digits"])
    with pytest.raises(InputError, match="v-emov2_5m is a video classifier; train it with `d-emo train-video`"):
        ClassifierTask(ClassifierSettings.from_mapping({"model": "v-emov2_5m", "dataset": "digits"}))
    meta = json.loads((snapshot / "snapshot.json").read_text())
    del meta["frames"]
    (snapshot / "snapshot.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="does not say its frames; it is damaged"):
        open_video_classifier(str(snapshot))


def test_a_dry_run_says_what_there_is_and_writes_one_picture_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_video.run(settings_of("run", dry_run=True))
    said = {line[:10].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert said["data"].startswith("moving-digits: 24 videos of") and said["data"].endswith("24 looked at")
    assert said["training"].startswith("6 steps of 4 images an epoch") and "all 4 steps" in said["time"]
    (picture,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert picture == tmp_path / "samples" / "dry-run-run.png" and "(4 images as" in said["batch"]
    assert Image.open(picture).size == (4 * 132 + 4, 4 * (128 + 22) + 4)


def test_a_clip_is_drawn_in_its_order_under_its_class():
    task = VideoTask(settings_of("run"))
    clips = torch.full((1, 3, 4, 32, 32), -1.0)
    clips[:, :, 1] = 1  # the second frame is white
    drawn, count = train_video.picture(task, Rehearsal([clips, torch.tensor([1])], None, 1.0, 1.0))
    greys = [drawn.getpixel((4 + 132 * frame + 64, 22 + 64))[0] for frame in range(4)]
    assert count == 1 and greys == [0, 255, 0, 0]
