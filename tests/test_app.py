"""The page of `d-emo app`: what it draws and what it shows; test_app_browser.py looks at it in a browser."""

import importlib.util
import itertools
import json
import runpy
import shlex
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import snapshot

from d_emo.app import page
from d_emo.app import studio as live
from d_emo.config import AppSettings, parse_settings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.models import create_model

ROOT = Path(__file__).parents[1]
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install -e '.[app]'"
)


def studio_of(folder, **options):
    return live.Studio(load_denoiser(folder), AppSettings(**{"max_images": 12, "preview_share": 0.5, **options}))


@pytest.fixture
def folder(tmp_path, tiny_denoiser):
    return snapshot(tmp_path / "snap", tiny_denoiser)


@pytest.fixture
def studio(folder):
    return studio_of(folder)


def script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.fixture
def no_pause(monkeypatch):
    """A view of every step, however fast."""
    monkeypatch.setattr(live, "_PAUSE", -1)


def drawn(studio, request):
    """Finished pictures."""
    *_, last = studio.draw(request)
    return torch.stack(last.images)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "scale", "options"),
    [("dpm++", [1, 2.5], {}), ("ddpm", 1, {}), ("dpm++", None, {"mixed_precision": "bf16"})],
)
def test_the_page_draws_what_the_sample_script_draws(tmp_path, monkeypatch, folder, scheduler, scale, options):
    studio = studio_of(folder, **options)
    request = studio.read([1, "a nine"], 3, 3, scale, scheduler, 4)
    ours = tmp_path / Path(request.default_path).name
    request.save(ours, drawn(studio, request))
    command, program, *arguments = shlex.split(studio.command(request))
    assert (command, program) == ("d-emo", "sample")
    script(monkeypatch, "sample.py", *arguments, "--output", tmp_path / "theirs.png")
    with Image.open(ours) as mine, Image.open(tmp_path / "theirs.png") as theirs:
        assert np.array_equal(np.array(mine), np.array(theirs)) and len(set(np.array(mine).flat)) > 50
        made_by, expected = json.loads(mine.text["d-emo"]), json.loads(theirs.text["d-emo"])
    assert made_by == {**expected, "output": None} and made_by["seed"] == 3 and made_by["classes"] == [1, 9]
    assert ours.name == f"{'guidance' if isinstance(scale, list) else 'class'}-1-9-seed3.png"


def test_the_command_of_a_snapshot_below_the_working_directory_is_short(tmp_path, monkeypatch, studio):
    monkeypatch.chdir(tmp_path)
    command = studio.command(studio.read([2], 1, 0, 4, "ddim", 5))
    assert command == (
        "d-emo sample --checkpoint snap --class 2 --num-images 1 --seed 0 --guidance-scale 4 "
        "--scheduler ddim --steps 5"
    )


def test_pictures_come_step_by_step(no_pause, studio):
    views = list(studio.draw(studio.read([0, 1], 5, 0, 2, "dpm++", 6)))
    assert len(views) == 2 * 6, "eight pictures, then two, six steps each"
    assert [view.finished for view in views] == [0] * 5 + [8] * 6 + [10]
    assert all(a.fraction <= b.fraction for a, b in itertools.pairwise(views)) and views[-1].fraction == 1
    first, last = views[0].images, views[-1].images
    assert not torch.equal(views[3].images[0], last[0]), "a preview of the noise"
    assert all(image is not None for image in views[3].images[:8]) and first[8:] == [None] * 2
    assert all(image.shape == (3, 64, 64) and image.dtype == torch.uint8 for image in last)
    assert views[8].images[:8] == last[:8]


def test_views_of_fast_steps_are_few_and_the_last_is_among_them(studio, monkeypatch):
    monkeypatch.setattr(live, "_PAUSE", 3600)
    views = list(studio.draw(studio.read([0, 1], 5, 0, 2, "dpm++", 6)))
    assert [view.finished for view in views] == [0, 10]


def test_previews_cost_no_more_than_their_share(monkeypatch, no_pause, folder):
    none = studio_of(folder, preview_share=0)
    decoded = []
    monkeypatch.setattr(live, "decode", lambda codec, latents: decoded.append(1) or torch.zeros(len(latents), 3, 4, 4))
    assert next(none.draw(none.read([0], 2, 0, 2, "dpm++", 6))).images == [None] * 2
    assert drawn(none, none.read([0], 2, 0, 2, "dpm++", 6)).any() and not decoded
    clock = iter(range(1000))  # every look at the clock is a second: a preview takes two, a step one or two
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(clock))
    seldom = studio_of(folder, preview_share=0.2)
    drawn(seldom, seldom.read([0], 2, 0, 2, "dpm++", 40))
    assert 0.15 < 2 * len(decoded) / next(clock) <= 0.25


def test_nothing_goes_on_when_nobody_looks_any_more(no_pause, studio):
    passes = []
    studio.sampler.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    views = studio.draw(studio.read([0], 2, 0, 1, "dpm++", 200))
    assert next(views).step == 1 and next(views).step == 2
    views.close()
    assert len(passes) == 2


def test_what_fails_while_drawing_is_told(monkeypatch, no_pause, studio):
    def broken(*args):
        raise error

    monkeypatch.setattr(studio.sampler.codec, "decode", broken)
    request = studio.read([0], 2, 0, 1, "dpm++", 6)
    error = torch.cuda.OutOfMemoryError("x")
    with pytest.raises(InputError, match="too little memory"):
        list(studio.draw(request))
    error = KeyError("odd")
    with pytest.raises(KeyError, match="odd"):
        list(studio.draw(request))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a nin"]}, "no class is called 'a nin': did you mean a nine"),
        ({"classes": [10]}, "class 10 is out of range"),
        ({"classes": [1, "1"]}, "chosen twice"),
        ({"num_images": 0}, "num.images.? must be at least 1"),
        ({"classes": [1, 2], "num_images": 7}, "14 pictures are more than the 12 that are drawn at once"),
        ({"guidance_scale": [1, 2, 4, 8], "num_images": 4}, "16 pictures are more than the 12"),
        ({"seed": None}, "the seed must be a number, not empty"),
        ({"seed": 1.5}, "the seed must be a whole number, not 1.5"),
        ({"seed": -1}, "seed. must be at least 0"),
        ({"guidance_scale": "much"}, "the guidance must be a number, not 'much'"),
        ({"guidance_scale": float("nan")}, "must be at least 0"),
        ({"steps": 1001}, "steps. must be at least 1 and at most 1000"),
        ({"scheduler": "ddim", "steps": 600}, "ddim cannot lay 600 steps"),
        ({"scheduler": "euler"}, "euler serves the flow objective"),
        ({"scheduler": "magic"}, "scheduler. must be one of ddpm.*not magic"),
    ],
)
def test_what_cannot_be_drawn_is_said(studio, changes, words):
    asked = {"classes": [1], "num_images": 2, "seed": 0, "guidance_scale": 2, "scheduler": "dpm++", "steps": 4}
    with pytest.raises(InputError, match=words):
        studio.read(*{**asked, **changes}.values())


# ---- the page --------------------------------------------------------------------------------------------------------


def parts(studio, folder):
    """Properties of the page's components by their elem_id."""
    components = page.build_page(studio, folder).config["components"]
    return {each["props"]["elem_id"]: each["props"] for each in components if each["props"].get("elem_id")}


@needs_gradio
def test_the_page_offers_what_the_snapshot_can_do(tmp_path, studio, tiny_denoiser):
    shown = parts(studio, tmp_path)
    assert [name for name, _ in shown["classes"]["choices"]][8:] == ["8", "9: a nine"]
    assert all(shown[part]["visible"] for part in ("classes", "guidance", "guidances"))
    assert [name for name, _ in shown["scheduler"]["choices"]] == ["ddpm", "ddim", "dpm++", "unipc", "deis"]
    values = {part: shown[part]["value"] for part in ("guidance", "scheduler", "steps")}
    assert values == {"guidance": 4, "scheduler": "dpm++", "steps": 30} and shown["count"]["maximum"] == 12
    assert "step 5, ema weights" in shown["about"]["value"] and str(studio.snapshot.path) in shown["about"]["value"]

    flow = studio_of(snapshot(tmp_path / "flow", tiny_denoiser, objective="flow", label_dropout=0.0))
    shown = parts(flow, tmp_path)
    assert [name for name, _ in shown["scheduler"]["choices"]] == ["euler", "heun"]
    assert not shown["guidance"]["visible"] and not shown["guidances"]["visible"] and shown["guidance"]["value"] == 1
    with pytest.raises(InputError, match="trained without label dropout"):
        flow.read([1], 2, 0, 2.0, "euler", 4)
    assert "guidance" not in flow.command(flow.read([1], 2, 0, 1.0, "heun", 4))


@needs_gradio
def test_an_unconditional_snapshot_shows_no_classes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    one = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, sample_size=8, num_classes=1, in_channels=3)
    meta = {"codec": "pixels", "image_size": 8, "class_names": ["all"], "label_dropout": 0.0}
    studio = studio_of(snapshot(tmp_path / "one", one.eval(), **meta))
    shown = parts(studio, tmp_path)
    assert not shown["classes"]["visible"] and shown["count"]["label"] == "Pictures"
    request, ours = studio.read([0], 2, 0, 1, "ddim", 4), tmp_path / "ours.png"
    request.save(ours, drawn(studio, request))
    assert "--class" not in studio.command(request) and page._captions(request) == ["seed 0", "seed 1"]
    script(monkeypatch, "sample.py", *shlex.split(studio.command(request))[2:], "--output", tmp_path / "theirs.png")
    with Image.open(ours) as mine, Image.open(tmp_path / "theirs.png") as theirs:
        assert np.array_equal(np.array(mine), np.array(theirs))


def visits(studio, folder):
    return page._Visits(page.import_gradio(), studio, folder)


@needs_gradio
def test_a_visit_sees_its_pictures_and_gets_their_files(tmp_path, studio):
    asked = [0, 9], 2, 7, [1, 2], "dpm++", 3
    shown = list(visits(studio, tmp_path).run("me", *asked))
    expected = drawn(studio, studio.read(*asked))
    first = shown[0][1]["value"]
    assert len(first) == 8 and all((image == 224).all() for image, _ in first), "nothing is drawn yet"
    status, tiles, download, command, how = shown[-1]
    assert [caption for _, caption in tiles["value"]] == [
        f"{name}, guidance {scale}, seed {seed}"
        for scale in (1, 2) for name, seed in (("0", 7), ("0", 8), ("9: a nine", 9), ("9: a nine", 10))
    ]
    for number, (path, _) in enumerate(tiles["value"]):
        with Image.open(path) as picture:
            assert np.array_equal(np.array(picture), expected[number].permute(1, 2, 0).numpy())
            made_by = json.loads(picture.text["d-emo"])
        assert (made_by["guidance_scale"], made_by["seed"]) == (1 + number // 4, 7 + number % 4)
    assert "8 pictures in " in status and "images/s on " in status and download["interactive"]
    assert Path(download["value"]).name == "guidance-0-9-seed7.png" and how == "dpm++, 3 steps, guidance 1, 2"
    assert command.endswith("--class 0 9 --num-images 2 --seed 7 --guidance-scale 1 2 --scheduler dpm++ --steps 3")


@needs_gradio
def test_pictures_are_sent_when_there_are_new_ones(tmp_path, studio, monkeypatch):
    image, other = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    views = [live.View([each], int(each is other), 0, 3, 1.0, 1.0) for each in (image, image, other)]
    monkeypatch.setattr(studio, "draw", lambda request: iter(views))
    shown = list(visits(studio, tmp_path).run("me", [9], 1, 0, 2, "dpm++", 3))
    assert ["value" in tiles for _, tiles, *_ in shown] == [True, True, False, True, True]


@needs_gradio
def test_a_stop_ends_the_drawing_after_its_step_and_offers_no_file(tmp_path, no_pause, studio):
    everybody, passes = visits(studio, tmp_path), []
    hook = studio.sampler.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    everybody.begin("me")
    everybody.begin("another")
    shown = []
    for each in everybody.run("me", [0], 2, 0, 1, "dpm++", 6):
        shown.append(each)
        if "Step 2 of 6" in each[0]:
            everybody.stop("me")
    hook.remove()
    assert len(passes) == 3 and "Stopped; 0 of 2 pictures" in shown[-1][0] and len(shown) == 4
    assert not any(each[2].get("value") for each in shown)
    assert "2 pictures in" in list(everybody.run("another", [0], 2, 0, 2, "dpm++", 3))[-1][0]
    assert not everybody.stops and not everybody.stop("gone")


@needs_gradio
def test_bad_input_is_said_once_as_text_in_the_words_of_the_page(tmp_path, studio):
    import gradio

    for classes, count, words in (([1], 0, "Num images must be at least 1"), (["<b>"], 1, "'&lt;b&gt;'")):
        shown = visits(studio, tmp_path).run("me", classes, count, 0, 2, "dpm++", 3)
        said = next(shown)[0].replace("&#x27;", "'")
        assert 'role="alert"' in said and words in said
        with pytest.raises(gradio.Error) as caught:  # which a client of the API gets, and a visitor does not see
            next(shown)
        assert not caught.value.print_exception and not caught.value.visible


# ---- the script ------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fails_with(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        script(monkeypatch, "app.py", *arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


def test_without_gradio_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "the page needs Gradio: pip install 'd-emo[app]'" in fails_with(monkeypatch, capsys)


@needs_gradio
def test_nothing_can_be_uploaded():
    with page.import_gradio().Blocks() as blocks:
        pass
    address = page.launch(blocks, AppSettings(port=free_port()))
    try:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + b"0" * 99 + b"\r\n--x--"
        request = urllib.request.Request(f"{address}/gradio_api/upload", body, {
            "Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        assert error.value.code == 413
    finally:
        blocks.close()


def test_a_port_in_use_and_other_bad_addresses_are_named(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails_with(monkeypatch, capsys, "--port", port)
        assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use); choose another --port" in said
    assert "of no.such.host.invalid" in fails_with(monkeypatch, capsys, "--host", "no.such.host.invalid")
    said = fails_with(monkeypatch, capsys, "--checkpoint", "nowhere", "--port", free_port())
    assert "--checkpoint nowhere does not exist" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--port", "0"], "at most 65535"), (["--max-images", "0"], "at least 1"), (["--preview-share", "1"], "below 1")],
)
def test_settings_that_mean_nothing_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parse_settings(AppSettings, "", flags)
