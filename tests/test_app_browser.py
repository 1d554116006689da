"""The page of `d-emo app` as served: by a client, and in a headless Chromium of a phone, a tablet and a laptop."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from test_app import ROOT, drawn, free_port, studio_of
from test_pipeline import snapshot

from d_emo.app import page
from d_emo.config import AppSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no Gradio here: pip install -e '.[app]'"),
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def studio(tmp_path, tiny_denoiser):
    return studio_of(snapshot(tmp_path / "snap", tiny_denoiser))


def test_two_visitors_of_the_script_at_once_get_what_each_asked_for(tmp_path, studio):
    from gradio_client import Client

    folder, port, environment = studio.snapshot.path, free_port(), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/app.py", "--checkpoint", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"page      http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        assert process.stdout.readline() == f"snapshot  {folder} (step 5, ema weights)\n"
        asked = [([1], 4, 3, 2, "dpm++", 20), ([2, 9], 3, 8, 1, "ddpm", 20)]
        clients = [Client(f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path / "got") for _ in asked]
        jobs = [client.submit(*each, api_name="/draw") for client, each in zip(clients, asked, strict=True)]
        for job, each in zip(jobs, asked, strict=True):
            status, _, download, command = job.result(timeout=60)
            request, ours = studio.read(*each), tmp_path / "ours.png"
            request.save(ours, drawn(studio, request))
            assert "images/s" in status and command == studio.command(request)
            assert Path(download["value"]).read_bytes() == ours.read_bytes(), "the same picture and settings"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def open_page(studio, tmp_path, monkeypatch):
    """Opens the page of the studio, so many pixels wide, in a headless Chromium of Debian or of Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install playwright")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    said, asked = [], []
    with playwright.sync_playwright() as engine:
        path = CHROMIUM or engine.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        blocks = page.build_page(studio, tmp_path)
        address = page.launch(blocks, AppSettings(port=free_port()))
        chromium = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])

        def open_page(width):
            visitor = chromium.new_page(viewport={"width": width, "height": 844})
            visitor.on("console", lambda said_: said.append(said_.text) if said_.type in ("error", "warning") else None)
            visitor.on("pageerror", lambda error: said.append(str(error)))
            visitor.on("request", lambda request: asked.append(request.url))
            visitor.goto(address)
            return visitor

        yield open_page
        chromium.close()
        blocks.close()
    assert not said and {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}


def ask(visitor, **numbers):
    for name, number in numbers.items():
        visitor.locator(f"#{name} input:not([type=range])").fill(str(number))


def draw(visitor):
    """Press the button, wait until all is drawn; the pictures."""
    visitor.locator("#draw").click()
    visitor.wait_for_function("document.querySelector('#draw').disabled")
    visitor.wait_for_function("!document.querySelector('#draw').disabled")
    return visitor.locator("#pictures .thumbnail-lg img")


def box(part):
    return part.bounding_box()


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_a_visitor_draws(open_page, tmp_path, studio, width):
    visitor = open_page(width)
    button = box(visitor.locator("#draw"))
    assert button["y"] + button["height"] < 844, "within the first screen"
    classes = visitor.locator("#classes input")
    classes.press("Backspace")  # the class that is there
    classes.press_sequentially("nix")
    content = "getComputedStyle(document.querySelector('#classes .option-list'), '::after').content"
    assert visitor.evaluate(content) == '"Nothing found"'
    for _ in "ix":
        classes.press("Backspace")
    classes.press_sequentially("ine")
    classes.press("Enter")
    classes.press("Tab")
    ask(visitor, count=3, steps=5)
    visitor.locator("#random-seed").click()
    visitor.wait_for_function("document.querySelector('#seed input').value != '0'")
    pictures = draw(visitor)
    visitor.get_by_text("images/s").wait_for()
    visitor.wait_for_function("document.querySelector('#pictures').getBoundingClientRect().top < innerHeight")
    visitor.screenshot(path=tmp_path / "page.png", full_page=True)
    assert visitor.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"

    seed = int(visitor.locator("#seed input").input_value())
    request = studio.read(["a nine"], 3, seed, 4, "dpm++", 5)
    captions = [f"9: a nine, seed {seed + i}" for i in range(3)]
    assert [image.get_attribute("alt") for image in pictures.all()] == captions
    for image, label in zip(pictures.all(), visitor.locator("#pictures .caption-label").all(), strict=True):
        assert box(image)["width"] >= 150 and box(label)["y"] >= box(image)["y"] + box(image)["height"] - 1
    command = visitor.locator("#command code")
    assert command.text_content() == studio.command(request)
    height, flags = box(command.locator("span").first)["height"], command.get_by_text(re.compile("^--")).all()
    assert len(flags) == 7 and all(box(flag)["height"] == height for flag in flags), "no line ends in a flag"
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.get_by_role("button", name="Copy", exact=True).click()
    assert visitor.evaluate("navigator.clipboard.readText()") == studio.command(request)
    with visitor.expect_download() as download:
        visitor.locator("#download").click()
    ours = tmp_path / Path(request.default_path).name
    request.save(ours, drawn(studio, request))
    assert download.value.suggested_filename == ours.name and download.value.path().read_bytes() == ours.read_bytes()


def test_a_visitor_enlarges_keeps_and_compares(open_page, studio):
    visitor = open_page(1280)
    visitor.evaluate("Math.random = () => 0.95")
    visitor.locator("#random-class").click()
    visitor.get_by_text("9: a nine").wait_for()
    ask(visitor, count=2, steps=3)
    draw(visitor)
    visitor.locator("#keep").click()
    kept = visitor.locator("#kept .thumbnail-lg img")
    kept.first.wait_for()
    ask(visitor, steps=4)
    pictures = draw(visitor)
    assert [each.get_attribute("alt") for each in kept.all()] == [each.get_attribute("alt") for each in pictures.all()]
    assert visitor.get_by_text("Kept: dpm++, 3 steps, guidance 4").count() == 1
    assert box(kept.first)["y"] == box(pictures.first)["y"] and box(kept.first)["x"] > box(pictures.last)["x"]

    ask(visitor, count=1)
    visitor.locator("#guidances input").check()
    row = draw(visitor)
    assert [each.get_attribute("alt") for each in row.all()] == [
        f"9: a nine, guidance {scale}, seed 0" for scale in (1, 2, 4, 8)
    ]
    with visitor.expect_download() as download:
        visitor.locator("#pictures").get_by_label("Download All").click()
    assert len(zipfile.ZipFile(download.value.path()).namelist()) == 4
    row.nth(1).click()
    large = visitor.locator("#pictures .preview img").first
    assert box(large)["width"] > 300
    with visitor.expect_download() as download:
        visitor.locator("#pictures").get_by_label("Download", exact=True).click()
    with Image.open(download.value.path()) as picture:
        assert picture.size == (64, 64) and '"guidance_scale": 2' in picture.text["d-emo"]


def test_a_visitor_stops_and_is_told_of_mistakes_once(open_page):
    visitor = open_page(1280)
    ask(visitor, steps=250)
    visitor.locator("#draw").click()
    visitor.get_by_text(re.compile("^Step [1-9]")).wait_for()
    visitor.locator("#stop").click()
    visitor.get_by_text("Stopped; 0 of 8 pictures").wait_for()
    visitor.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#draw').disabled")
    ask(visitor, seed=1.5)
    draw(visitor)
    visitor.wait_for_timeout(500)
    assert visitor.get_by_text("The seed must be a whole number, not 1.5").count() == 1
    ask(visitor, seed=1, steps=3)
    draw(visitor)
    visitor.get_by_text("images/s").wait_for()
