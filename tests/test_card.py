"""Model cards: what they say, and that measured figures enter them by a command."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard

from d_emo.cli import run_verb
from d_emo.config import ClassifierSettings, TrainSettings
from d_emo.data import Shapes1000
from d_emo.data.shapes import COLOURS, GROUNDS, SHAPES
from d_emo.errors import InputError
from d_emo.evaluation import classifier_metrics
from d_emo.io import card
from d_emo.io.snapshot import SHIPPED_SNAPSHOT, save_classifier, save_denoiser
from d_emo.models import create_model

ROOT = Path(__file__).parents[1]
DIGITS = list("0123456789")
META = {
    "step": 30, "weights": "ema", "codec": "pixels", "image_size": 8, "class_names": DIGITS, "data": "digits",
    "num_images": 1438, "parameters": 4_380_000, "training_minutes": 18.9, "hardware": "2 CPU threads",
}
FIGURES = {
    "command": "python scripts/judge.py --x", "figures": [{"name": "FID-20", "value": 5.16, "remark": "of drawn"}]
}


@pytest.fixture
def snapshot(tmp_path):
    model = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, in_channels=3, sample_size=8, num_classes=10)
    settings = TrainSettings(model="D-EMOv2-Ti-2", dataset="digits", max_steps=40, batch_size=8, warmup_steps=5)
    return save(tmp_path / "run" / "snapshots" / "step-30", model, settings)


def save(folder, model, settings, scheduler=None, **meta):
    save_denoiser(folder, model, scheduler=scheduler or DDPMScheduler(), meta={**META, **meta}, settings=settings)
    return folder


def text_of(folder):
    return (folder / "README.md").read_text()


def test_the_card_holds_what_the_run_was(snapshot):
    text = text_of(snapshot)
    for fact in (
        "# D-EMOv2-Ti-2 on scikit-learn's digits, 8 px", "10 classes, 4.38 M trained parameters",
        "1,438 images at 8 px", "objective eps, label dropout 0.1, AdamW at 0.0001, constant schedule after 5 warm-up",
        "30 of 40, batch 8: 240 images seen", "EMA, decay 0.9999", "18.9 minutes on 2 CPU threads", "scripts/sample.py",
        "Apache-2.0", "inherit the terms of the data", "CC BY 4.0", "arXiv:2412.06674", "arXiv:2212.09748",
    ):
        assert fact in text, fact
    assert "Measured" not in text and "samples.png" not in text
    metadata = ModelCard.load(snapshot / "README.md").data
    assert (metadata.license, metadata.library_name) == ("apache-2.0", "d-emo")
    assert metadata.pipeline_tag == "unconditional-image-generation" and "D-EMOv2-Ti-2" in metadata.tags
    assert metadata.datasets is None


def test_the_card_holds_the_recipe(tmp_path):
    model = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, in_channels=3, sample_size=8, num_classes=10)
    settings = TrainSettings(
        model="D-EMOv2-Ti-2", dataset="digits", objective="flow", optimizer="muon", learning_rate=2e-3, warmup_steps=5,
        timestep_sampling="logit-normal", time_shift="auto", contrastive=0.05, align="emov2:/home/me/runs/digits",
        align_block=3,
    ).resolve()  # fmt: skip
    flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert (
        "| objective flow, label dropout 0.1, Muon at 0.002, constant schedule after 5 warm-up steps; logit-normal "
        "timesteps (0, 1); timesteps shifted by 2; contrastive flow matching, weight 0.05; block 3 aligned with "
        "emov2:digits, weight 0.5 |"
    ) in text_of(save(tmp_path / "c", model, settings, scheduler=flow, objective="flow"))


@pytest.mark.parametrize("key, value, words", [
    ("align", "emov2:/home/me/runs/digits/snapshots/step-40", "aligned with emov2:digits/snapshots/step-40"),
    ("fd_features", "timm:hf-hub:timm/resnet18", "in the features of timm:hf-hub:timm/resnet18"),
    ("align", "sra", "aligned with sra"), ("align", "emov2:weights/emov2_1m.pth", "aligned with emov2:emov2_1m.pth"),
    ("fd_features", "emov2:digits/snapshots/step-40", "in the features of emov2:digits/snapshots/step-40"),
])  # fmt: skip
def test_a_card_names_the_snapshot_whose_features_were_looked_at(snapshot, key, value, words):
    settings = yaml.safe_load((snapshot / "config.yaml").read_text())
    more = {"align_block": None, "align_weight": 0.5, key: value}
    (snapshot / "config.yaml").write_text(yaml.safe_dump({**settings, **more}))
    card.write_card(snapshot)
    assert words in text_of(snapshot) and "/home" not in text_of(snapshot)


def test_a_classifier_has_its_own_card(tmp_path):
    model = create_model("emov2_1m", num_classes=10)
    measured = {"ema": {"top1": 0.98764, "top5": 1, "images": 359}, "raw": {"top1": 0.5, "top5": 0.75, "images": 359}}
    meta = {**META, "held_out_accuracy": 0.9876, "accuracy": measured}
    settings = ClassifierSettings(dataset="digits", teacher="/home/me/results/big/snapshots/step-9")
    save_classifier(tmp_path / "c", model, meta=meta, settings=settings)
    text = text_of(tmp_path / "c")
    for fact in ("# emov2_1m on", "smoothing 0.1, the soft logits of big/snapshots/step-9 with weight 5, AdamW",
                 "weight decay 0.05", "98.76%", "load_classifier"):  # fmt: skip
        assert fact in text, fact
    assert "(EMA), these here | 98.76% | 100.00% | 359 |" in text and "| raw | 50.00% | 75.00% | 359 |" in text
    assert "arXiv:2301.01146" in text and "arXiv:2212.09748" not in text
    assert ModelCard.load(tmp_path / "c" / "README.md").data.pipeline_tag == "image-classification"


def test_your_own_data_bring_their_own_terms_and_no_paths(tmp_path):
    names = ["n01440764", *map(str, range(998)), "n15075141"]
    model = create_model("DiT-S-2", depth=1, hidden_size=48, num_heads=3, in_channels=3, sample_size=8)
    settings = TrainSettings(model="DiT-S-2", data_dir="/secret/place/imagenet", objective="eps")
    folder = save(tmp_path / "s", model, settings, class_names=names, data="folder")
    text = text_of(folder)
    assert "# DiT-S-2 on imagenet" in text and "/secret" not in text
    assert "See to it that the licence" in text and "CC BY 4.0" not in text
    assert "zhang2025emov2" not in text and "peebles2023scalable" in text
    assert ModelCard.load(folder / "README.md").data.datasets == ["ILSVRC/imagenet-1k"]


@pytest.mark.parametrize(
    ("place", "name", "hub"),
    [("hf:owner/birds?split=train", "owner/birds", ["owner/birds"]), ("wds:/data/birds/{000..9}.tar", "birds", None)],
)
def test_data_from_elsewhere_keep_their_name(snapshot, place, name, hub):
    settings = yaml.safe_load((snapshot / "config.yaml").read_text())
    (snapshot / "config.yaml").write_text(yaml.safe_dump({**settings, "data_dir": place, "init_from": "results/a"}))
    meta = json.loads((snapshot / "snapshot.json").read_text())
    (snapshot / "snapshot.json").write_text(json.dumps({**meta, "data": "elsewhere"}))
    card.write_card(snapshot)
    assert f"# D-EMOv2-Ti-2 on {name}, 8 px" in text_of(snapshot) and "weights of `results/a`" in text_of(snapshot)
    assert ModelCard.load(snapshot / "README.md").data.datasets == hub


def test_a_fine_tuned_snapshot_says_what_it_started_from_and_how_it_was_trained(snapshot):
    settings = yaml.safe_load((snapshot / "config.yaml").read_text())
    changes = {"init_from": "results/a", "label_init": "names", "timestep_sampling": "logit-normal", "logit_mean": -1.2}
    (snapshot / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    meta = json.loads((snapshot / "snapshot.json").read_text())
    before = {"step": 28000, "training_minutes": 90.8}
    (snapshot / "snapshot.json").write_text(json.dumps({**meta, "started_from": before}))
    card.write_card(snapshot)
    assert "| the weights of `results/a` (28,000 steps, 90.8 minutes), with a new label table |" in text_of(snapshot)
    assert "logit-normal timesteps (-1.2, 1)" in text_of(snapshot) and "words of the class names" in text_of(snapshot)


def test_measurements_are_added_and_replaced_by_their_command(snapshot):
    card.add_measurement(snapshot, FIGURES)
    assert "| FID-20 | 5.16 | of drawn |" in text_of(snapshot) and "`python scripts/judge.py --x`" in text_of(snapshot)
    better = {**FIGURES, "figures": [{"name": "FID-20", "value": 4.5, "remark": "of drawn"}]}
    card.add_measurement(snapshot, better)
    card.add_measurement(snapshot, {**FIGURES, "command": "another"})
    assert json.loads((snapshot / "metrics.json").read_text()) == [better, {**FIGURES, "command": "another"}]
    assert text_of(snapshot).count("## Measured") == 1 and "| FID-20 | 4.5 | of drawn |" in text_of(snapshot)


def test_a_picture_in_the_folder_is_shown(snapshot):
    (snapshot / "samples.png").touch()
    assert "](samples.png)" in card.write_card(snapshot).read_text()


def test_the_shipped_snapshot_can_have_its_card_written(tmp_path):
    shutil.copytree(SHIPPED_SNAPSHOT, tmp_path / "s")
    card.write_card(tmp_path / "s")
    assert "Shapes-1000" in text_of(tmp_path / "s") and "images seen" in text_of(tmp_path / "s")


def test_papers_are_those_of_the_citation_file():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = {}
    for entry in card.CITATIONS.values():
        fields = dict(re.findall(r"(\w+)\s+= \{(.*?)\},?\n", entry, re.DOTALL))
        authors = [" ".join(name.split()) for name in re.split(r"\s+and\s+", fields["author"])]
        cited[fields["note"]] = (fields["title"], authors, int(fields["year"]))
    assert cited == {
        each["identifiers"][0]["value"]: (
            each["title"], [f"{a['family-names']}, {a['given-names']}" for a in each["authors"]], each["year"]
        )
        for each in references
    }


def judge(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scripts/judge.py", *map(str, arguments)])
    run_verb("class-accuracy", [*map(str, arguments)])


def few_images(monkeypatch, count):
    for name in ("REAL_IMAGES", "HELD_OUT_IMAGES"):
        monkeypatch.setattr(classifier_metrics, name, count)


def opened(classifier):
    """With layer scales of 1: as they start, all features are the same."""
    for name, parameter in classifier.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    return classifier


@pytest.fixture
def classifier(tmp_path):
    model = opened(create_model("emov2_1m", num_classes=10, window_size=1))
    meta = {**META, "image_size": 32}
    save_classifier(tmp_path / "c", model, meta=meta, settings=ClassifierSettings(dataset="digits"))
    return tmp_path / "c"


def test_judge_writes_its_figures_beside_the_picture_and_into_the_card(
    snapshot, classifier, tmp_path, monkeypatch, capsys
):
    few_images(monkeypatch, 40)
    arguments = ["--checkpoint", snapshot, "--classifier", classifier, "--num-images", 20, "--steps", 2]
    judge(monkeypatch, *arguments, "--output", tmp_path / "o.png")
    printed, measured = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    assert [row["name"] for row in measured["figures"]] == ["FID-20", "precision-20", "recall-20", "class accuracy"]
    assert all(f"{row['value']:.1f}"[:-1] in printed and row["remark"] in printed for row in measured["figures"])
    assert measured["step"] == 30 and measured["command"].startswith("python scripts/judge.py --checkpoint")
    assert not (snapshot / "metrics.json").exists()
    judge(monkeypatch, *arguments, "--output", tmp_path / "o.png", "--write-card", "--overwrite")
    (written,) = json.loads((snapshot / "metrics.json").read_text())
    assert written == json.loads((tmp_path / "o.json").read_text())
    words = f"(guidance 1.5, 2 steps of dpm++, images 20, in the features of {written['features']})"
    assert f"`{written['command']}` {words}" in text_of(snapshot)
    assert (snapshot / "samples.png").read_bytes() == (tmp_path / "o.png").read_bytes()


def test_judge_tells_shape_colour_and_ground_apart(tmp_path, monkeypatch, capsys):
    names = Shapes1000(8).class_names
    model = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, in_channels=3, sample_size=8, num_classes=1000)
    denoiser = save(tmp_path / "d", model, TrainSettings(), class_names=names, data="shapes")
    classifier = opened(create_model("emov2_1m", num_classes=1000, window_size=1))
    with torch.no_grad():  # it says "class 125" of every picture
        classifier.head.bias.zero_()[125] = 1e6
    meta = {**META, "image_size": 32, "class_names": names}
    save_classifier(tmp_path / "c", classifier, meta=meta, settings=ClassifierSettings())
    few_images(monkeypatch, 20)
    judge(monkeypatch, "--checkpoint", denoiser, "--classifier", tmp_path / "c", "--num-images", 40, "--steps", 1,
          "--output", tmp_path / "o.png")
    measured = json.loads((tmp_path / "o.json").read_text())
    figures = {row["name"]: row["value"] for row in measured["figures"]}
    asked = classifier_metrics.even_labels(40, 1000)
    parts = {
        "class accuracy": asked == 125, "shape": asked // 100 == 1, "colour": asked // 10 % 10 == 2,
        "ground": asked % 10 == 5,
    }
    assert {name: figures[name] for name in parts} == {
        name: round(100 * right.float().mean().item(), 2) for name, right in parts.items()
    }
    assert len({figures["shape"], figures["colour"], figures["ground"]}) == 3
    words = {"shape": (SHAPES, 100), "colour": (list(COLOURS), 10), "ground": (list(GROUNDS), 1)}
    assert measured["by_part"] == {
        part: {known[digit]: 100.0 * (digit == 125 // place % 10) for digit in set((asked // place % 10).tolist())}
        for part, (known, place) in words.items()
    }
    assert re.search(r"^by colour +(\w+ 0\.0, )+yellow 100\.0 %$", capsys.readouterr().out, re.MULTILINE)


def test_judge_refuses_a_classifier_of_other_classes(snapshot, tmp_path, monkeypatch):
    meta = {**META, "class_names": ["a", "b"], "image_size": 32}
    model = create_model("emov2_1m", num_classes=2, window_size=1)
    save_classifier(tmp_path / "other", model, meta=meta, settings=ClassifierSettings())
    with pytest.raises(InputError, match="other classes"):
        judge(monkeypatch, "--checkpoint", snapshot, "--classifier", tmp_path / "other")
