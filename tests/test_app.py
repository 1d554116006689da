"""The page of scripts/app.py: what it draws, what it shows, and that it works in a browser."""

import base64
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import NAMES, snapshot

from d_emo.app import page
from d_emo.app import studio as live
from d_emo.config import AppSettings, parse_settings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
    [("dpm++", 2.5, {}), ("ddpm", 1, {}), ("dpm++", None, {"mixed_precision": "bf16"})],
)
def test_the_page_draws_what_the_sample_script_draws(tmp_path, monkeypatch, folder, scheduler, scale, options):
    studio = studio_of(folder, **options)
    request = studio.read([1, "a nine"], 5, 3, scale, scheduler, 4)
    ours = tmp_path / Path(request.default_path).name
    request.save(ours, drawn(studio, request))
    command, program, *arguments = shlex.split(studio.command(request))
    assert (command, program) == ("python", "scripts/sample.py")
    script(monkeypatch, "sample.py", *arguments, "--output", tmp_path / "theirs.png")
    with Image.open(ours) as mine, Image.open(tmp_path / "theirs.png") as theirs:
        assert np.array_equal(np.array(mine), np.array(theirs)) and len(set(np.array(mine).flat)) > 50
        made_by, expected = json.loads(mine.text["d-emo"]), json.loads(theirs.text["d-emo"])
    assert made_by == {**expected, "output": None} and made_by["seed"] == 3 and made_by["classes"] == [1, 9]
    assert ours.name == "class-1-9-seed3.png"


def test_the_command_of_a_snapshot_below_the_working_directory_is_short(tmp_path, monkeypatch, studio):
    monkeypatch.chdir(tmp_path)
    command = studio.command(studio.read([2], 1, 0, 4, "ddim", 5))
    assert command == (
        "python scripts/sample.py --checkpoint snap --class 2 --num-images 1 --seed 0 --guidance-scale 4 "
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
    passes, before = [], threading.active_count()
    studio.sampler.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    views = studio.draw(studio.read([0], 2, 0, 1, "dpm++", 200))
    assert next(views).step == 1 and next(views).step == 2
    views.close()
    assert len(passes) == 2 and threading.active_count() == before


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
        ({"classes": [1, 2], "num_images": 7}, "2 classes of 7 pictures are 14, more than the 12"),
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
    assert [name for name, _ in shown["classes"]["choices"]][8:] == ["8: 8", "9: a nine"]
    assert shown["classes"]["visible"] and shown["guidance"]["visible"] and shown["guidance"]["value"] == 4
    assert [name for name, _ in shown["scheduler"]["choices"]] == ["ddpm", "ddim", "dpm++", "unipc", "deis"]
    assert shown["scheduler"]["value"] == "dpm++" and shown["steps"]["value"] == 30 and shown["count"]["maximum"] == 12
    assert "step 5, ema weights" in shown["about"]["value"] and str(studio.snapshot.path) in shown["about"]["value"]

    flow = studio_of(snapshot(tmp_path / "flow", tiny_denoiser, objective="flow", label_dropout=0.0))
    shown = parts(flow, tmp_path)
    assert [name for name, _ in shown["scheduler"]["choices"]] == ["euler", "heun"]
    assert shown["scheduler"]["value"] == "euler"
    assert not shown["guidance"]["visible"] and shown["guidance"]["value"] == 1
    with pytest.raises(InputError, match="trained without label dropout"):
        flow.read([1], 2, 0, 2.0, "euler", 4)
    assert "guidance" not in flow.command(flow.read([1], 2, 0, 1.0, "heun", 4))


@needs_gradio
def test_an_unconditional_snapshot_shows_no_classes(tmp_path, monkeypatch):
    from d_emo.models import create_model

    torch.manual_seed(0)
    one = create_model("D-EMOv2-Ti-2", depth=1, hidden_size=48, sample_size=8, num_classes=1, in_channels=3)
    studio = studio_of(snapshot(
        tmp_path / "one", one.eval(), codec="pixels", image_size=8, class_names=["all"], label_dropout=0.0
    ))
    shown = parts(studio, tmp_path)
    assert not shown["classes"]["visible"] and shown["count"]["label"] == "Pictures"
    request, ours = studio.read([0], 2, 0, 1, "ddim", 4), tmp_path / "ours.png"
    request.save(ours, drawn(studio, request))
    assert "--class" not in studio.command(request)
    script(monkeypatch, "sample.py", *shlex.split(studio.command(request))[2:], "--output", tmp_path / "theirs.png")
    with Image.open(ours) as mine, Image.open(tmp_path / "theirs.png") as theirs:
        assert np.array_equal(np.array(mine), np.array(theirs))


def visits(studio, folder):
    return page._Visits(page.import_gradio(), studio, folder)


@needs_gradio
def test_a_visit_sees_its_pictures_and_gets_its_file(tmp_path, studio):
    asked = [0, 9], 2, 7, 2, "dpm++", 3
    shown = list(visits(studio, tmp_path).run("me", *asked))
    expected = drawn(studio, studio.read(*asked))
    grids = [html for _, html, _, _ in shown if isinstance(html, str)]
    assert grids[0].count("<i ") == 4 and "<img" not in grids[0] and "9: a nine" in grids[0]
    pngs = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', grids[-1])
    assert [name for _, name in pngs] == [
        "0: 0, seed 7", "0: 0, seed 8", "9: a nine, seed 9", "9: a nine, seed 10"
    ]
    for (code, _), image in zip(pngs, expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
            assert np.array_equal(np.array(picture), image.permute(1, 2, 0).numpy())
    status, _, download, command = shown[-1]
    assert re.search(r"4 pictures in [\d.]+ s: [\d.]+ images/s on (cpu|cuda)", status) and download["interactive"]
    assert Path(download["value"]).name == "class-0-9-seed7.png" and command.endswith("--class 0 9 --num-images 2 "
        "--seed 7 --guidance-scale 2 --scheduler dpm++ --steps 3")  # fmt: skip


@needs_gradio
def test_a_stopped_visit_says_so_and_offers_no_file(tmp_path, studio):
    all_visits = visits(studio, tmp_path)
    all_visits.begin("me")
    all_visits.begin("another")
    all_visits.stop("me")
    shown = list(all_visits.run("me", [0], 2, 0, 2, "dpm++", 3))
    assert "Stopped; 0 of 2 pictures" in shown[-1][0] and not any(each[2].get("value") for each in shown)
    assert "2 pictures in" in list(all_visits.run("another", [0], 2, 0, 2, "dpm++", 3))[-1][0]
    assert not all_visits.stops and not all_visits.stop("gone")


@needs_gradio
def test_a_stop_ends_the_drawing_after_its_step(tmp_path, no_pause, studio):
    all_visits, passes = visits(studio, tmp_path), []
    studio.sampler.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    all_visits.begin("me")
    shown = []
    for each in all_visits.run("me", [0], 2, 0, 1, "dpm++", 6):
        shown.append(each[0])
        if "Step 2 of 6" in each[0]:
            all_visits.stop("me")
    assert len(passes) == 3 and "Stopped; 0 of 2 pictures" in shown[-1] and len(shown) == 4


@needs_gradio
def test_bad_input_becomes_a_message_in_the_words_of_the_page(tmp_path, studio):
    import gradio

    shown = visits(studio, tmp_path).run("me", [1], 0, 0, 2, "dpm++", 3)
    assert re.search('role="alert".*num images must be at least 1', next(shown)[0], re.IGNORECASE)
    with pytest.raises(gradio.Error, match="(?i)num images must be at least 1") as caught:
        next(shown)
    assert not caught.value.print_exception


@needs_gradio
def test_names_of_classes_are_text(tmp_path, tiny_denoiser):
    names = [*NAMES[:9], "<script>x</script>"]
    studio = studio_of(snapshot(tmp_path / "snap", tiny_denoiser, class_names=names))
    tiles = page._Tiles(studio, studio.read([9], 1, 0, 2, "dpm++", 3))
    blank = tiles.html()
    tiles.take(live.View([torch.zeros(3, 64, 64, dtype=torch.uint8)], 0, 1, 3, 0.3, 1.0))
    for html in (blank, tiles.html()):
        assert "9: &lt;script&gt;x" in html and "<script" not in html


@needs_gradio
def test_a_picture_is_sent_again_without_loss_once_it_is_finished(tmp_path, studio):
    tiles = page._Tiles(studio, studio.read([9], 1, 0, 2, "dpm++", 3))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    sent = []
    for finished in (0, 0, 1, 1):
        new = tiles.take(live.View([image], finished, 0, 3, 1.0, 1.0))
        sent.append((new, "image/png" in tiles.html()))
    assert sent == [(True, False), (False, False), (True, True), (False, True)]


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
@needs_gradio
def test_nothing_can_be_uploaded(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with page.import_gradio().Blocks() as blocks:
        pass
    address = page.launch(blocks, AppSettings(port=port))
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


@pytest.fixture
def served(folder):
    """scripts/app.py at work on the tiny snapshot; yields its address."""
    port, environment = free_port(), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/app.py", "--checkpoint", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"page      http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        assert process.stdout.readline() == f"snapshot  {folder} (step 5, ema weights)\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@needs_gradio
def test_two_visitors_at_once_get_what_each_asked_for(tmp_path, served, studio):
    from gradio_client import Client

    asked = [([1], 4, 3, 2, "dpm++", 20), ([2, 9], 3, 8, 1, "ddpm", 20)]
    clients = [Client(served, verbose=False, download_files=tmp_path / "got") for _ in asked]
    jobs = [client.submit(*each, api_name="/draw") for client, each in zip(clients, asked, strict=True)]
    for job, each in zip(jobs, asked, strict=True):
        status, _, download, command = job.result(timeout=60)
        request, ours = studio.read(*each), tmp_path / "ours.png"
        request.save(ours, drawn(studio, request))
        assert "images/s" in status and command == studio.command(request)
        assert Path(download["value"]).read_bytes() == ours.read_bytes(), "the same picture, the same settings in it"


@pytest.fixture
def browser():
    """A headless Chromium, of Debian's package or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install playwright")
    with playwright.sync_playwright() as engine:
        path = CHROMIUM or engine.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        chromium = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_draws_in_a_browser(served, browser, tmp_path, studio, width):
    visitor, said, asked = browser.new_page(viewport={"width": width, "height": 850}), [], []
    visitor.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    visitor.on("pageerror", lambda error: said.append(str(error)))
    visitor.on("request", lambda request: asked.append(request.url))
    visitor.goto(served)
    classes = visitor.locator("#classes input")
    classes.click()
    classes.press("Backspace")  # the class that is there
    classes.press_sequentially("nine")
    classes.press("Enter")
    classes.press("Tab")
    for name, number in (("count", 3), ("steps", 5)):
        visitor.locator(f"#{name} input[type=number]").fill(str(number))
    visitor.get_by_role("button", name="Random seed").click()
    visitor.wait_for_function("document.querySelector('#seed input').value != '0'")
    before = visitor.locator("#pictures").screenshot()
    visitor.get_by_role("button", name="Draw").click()
    visitor.get_by_text("images/s").wait_for()
    assert visitor.locator("#pictures").screenshot() != before
    visitor.wait_for_function("document.querySelector('#pictures').getBoundingClientRect().top < innerHeight")
    visitor.screenshot(path=tmp_path / "page.png", full_page=True)
    assert visitor.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"

    seed = int(visitor.locator("#seed input").input_value())
    request = studio.read(["a nine"], 3, seed, 4, "dpm++", 5)
    shown = visitor.locator("#pictures img")
    assert [image.get_attribute("alt") for image in shown.all()] == [f"9: a nine, seed {seed + i}" for i in range(3)]
    assert visitor.locator("#command textarea").input_value() == studio.command(request)
    with visitor.expect_download() as download:
        visitor.locator("#download").click()
    ours = tmp_path / Path(request.default_path).name
    request.save(ours, drawn(studio, request))
    assert download.value.suggested_filename == ours.name and download.value.path().read_bytes() == ours.read_bytes()
    assert not said and {url.split("/")[2] for url in asked if url.startswith("http")} == {served.removeprefix("http://")}


@pytest.mark.slow
@needs_gradio
def test_a_visitor_stops_and_is_told_of_mistakes(served, browser):
    visitor = browser.new_page()
    visitor.goto(served)
    visitor.locator("#steps input[type=number]").fill("250")
    draw, stop = visitor.get_by_role("button", name="Draw"), visitor.get_by_role("button", name="Stop")
    assert draw.is_enabled() and stop.is_disabled()
    draw.click()
    visitor.get_by_text(re.compile("^Step [1-9]")).wait_for()
    assert draw.is_disabled()
    stop.click()
    visitor.get_by_text("Stopped; 0 of 8 pictures").wait_for()
    visitor.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#draw').disabled")
    visitor.locator("#seed input").fill("1.5")
    draw.click()
    visitor.get_by_role("alert").get_by_text("The seed must be a whole number, not 1.5").first.wait_for()
    visitor.wait_for_function("!document.querySelector('#draw').disabled")
    visitor.locator("#seed input").fill("1")
    visitor.locator("#steps input[type=number]").fill("3")
    draw.click()
    visitor.get_by_text("images/s").wait_for()
    visitor.wait_for_function("!document.querySelector('#draw').disabled")
