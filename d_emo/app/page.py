"""A page to draw pictures on, by Gradio, which only the functions here import. Nothing of it needs the internet."""

import html
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from d_emo.app.studio import Studio, View
from d_emo.config import AppSettings
from d_emo.errors import InputError, fields_as, imported
from d_emo.sampling import SampleRequest, caption, save_pngs
from d_emo.tables import OBJECTIVES
from d_emo.text import plural

# No `from __future__ import annotations` in this file: Gradio reads the annotation of `request` below as an object.

_STYLE = Path(__file__).with_name("page.css").read_text()
_SHOW = "() => { if (innerWidth < 700) document.querySelector('#status').scrollIntoView({ behavior: 'smooth' }) }"
"""Where the results lie below the controls, goes down to them."""

_COMMAND = """<code>${value
    .replace(/[&<>"'`{}$]/g, (sign) => `&#${sign.charCodeAt()};`)
    .replace(/\\S+/g, '<span>$&</span>')}</code>"""
"""The command line, each word whole; a text area would break `--class` after its dashes."""

_COPY = """() => {
    const line = document.querySelector('#command code');
    if (navigator.clipboard) navigator.clipboard.writeText(line.textContent);
    else getSelection().selectAllChildren(line);
}"""
"""Copies the command line; where a browser has no clipboard for pages without TLS, selects it."""

_QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How events are handled that do not draw."""

_GUIDANCES = [1, 2, 4, 8]
"""Guidance scales that are drawn side by side."""


def import_gradio() -> Any:
    """Gradio, told to keep to itself.

    Raises:
        InputError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return imported("gradio", "the page needs Gradio", "d-emo[app]")


def check_address(host: str, port: int) -> None:
    """Whether one can listen there; asked early, before a snapshot is read.

    Raises:
        InputError: One cannot.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of a name that no network has
        reason = getattr(error, "strerror", None) or "it is no address"
        raise InputError(
            f"cannot listen on port {port} of {host} ({reason}); choose another `port` or `host`"
        ) from None


def build_page(studio: Studio, folder: Path) -> Any:
    """The page, a ``gradio.Blocks`` ready to be launched.

    Args:
        studio: What draws.
        folder: Where finished pictures are kept for the download.
    """
    gr = import_gradio()
    visits, first = _Visits(gr, studio, folder), studio.defaults()
    look = {"interactive": False, "object_fit": "contain", "buttons": ["download", "download_all", "fullscreen"]}
    with gr.Blocks(title="D-EMO", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_about(studio), elem_id="about")
        with gr.Row(elem_id="main"):
            with gr.Column(min_width=320):
                fields = _subject(gr, studio, first)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80, scale=2)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
            with gr.Column(min_width=320, elem_id="results"):
                status = gr.HTML(_status("The pictures will appear here. A click enlarges one."), elem_id="status")
                with gr.Row():
                    pictures = gr.Gallery(label="Pictures", elem_id="pictures", **look)
                    kept = gr.Gallery(elem_id="kept", visible=False, **look)
                with gr.Row():
                    download = gr.DownloadButton("Download all", size="md", interactive=False, elem_id="download")
                    keep = gr.Button("Keep to compare", size="md", elem_id="keep")
                copy = gr.Button("Copy", size="sm")
                command = gr.HTML(
                    "", label="On the command line", show_label=True, container=True, html_template=_COMMAND,
                    buttons=[copy], elem_id="command",
                )
            with gr.Column(min_width=320):
                fields |= _settings(gr, studio, first)
        how = gr.State("")

        def begin(request: gr.Request) -> list[Any]:
            visits.begin(request.session_hash)
            return [gr.update(interactive=False), gr.update(interactive=True), _status("Waiting for its turn.")]

        def run(
            classes, num_images, seed, scale, scheduler, steps, several, request: gr.Request
        ) -> Iterator[list[Any]]:
            scale = _GUIDANCES if several else scale
            yield from visits.run(request.session_hash, classes, num_images, seed, scale, scheduler, steps)

        def leave(request: gr.Request) -> None:
            visits.stop(request.session_hash)

        def compare(shown: Any, how: str) -> Any:
            return gr.update(value=shown, label=f"Kept: {how}", visible=True) if shown else gr.skip()

        asked = gr.on([draw.click, fields["seed"].submit], begin, None, [draw, stop, status], js=_SHOW, **_QUICK)
        drawing = asked.then(
            run, list(fields.values()), [status, pictures, download, command, how], show_progress="hidden",
            concurrency_limit=1, api_name="draw",
        )
        for ended in (drawing.success, drawing.failure):  # a `then` would wait for success
            ended(lambda: [gr.update(interactive=True), gr.update(interactive=False)], None, [draw, stop], **_QUICK)
        stop.click(leave, None, None, **_QUICK)
        keep.click(compare, [pictures, how], kept, **_QUICK)
        copy.click(None, None, None, js=_COPY, **_QUICK)
        page.unload(leave)
    return page


def _subject(gr: Any, studio: Studio, request: SampleRequest) -> dict[str, Any]:
    """The controls of what is drawn, by the names and in the order of `Studio.read`."""
    names, most = studio.snapshot.class_names, max(2, min(16, studio.settings.max_images))
    several = len(names) > 1
    with gr.Row(visible=several):
        classes = gr.Dropdown(
            [(caption(label, names), label) for label in range(len(names))], value=[0], multiselect=True,
            label=f"Class, one or more of {len(names):,}", elem_id="classes", min_width=200, scale=5, visible=several,
        )
        dice = gr.Button("Random", size="md", elem_id="random-class", min_width=80, scale=1)
    dice.click(None, None, classes, js=f"() => [[Math.floor(Math.random() * {len(names)})]]", **_QUICK)
    count = gr.Slider(
        1, most, request.settings.num_images, step=1, elem_id="count",
        label="Pictures of each class" if several else "Pictures",
    )
    return {"classes": classes, "num_images": count}


def _settings(gr: Any, studio: Studio, request: SampleRequest) -> dict[str, Any]:
    """The other controls, in the order of `Studio.read`; the last tells whether guidances are drawn side by side."""
    first, guided = request.settings, studio.snapshot.label_dropout > 0
    with gr.Row():
        seed = gr.Number(first.seed, label="Seed", elem_id="seed", min_width=200, scale=5)
        dice = gr.Button("Random", size="md", elem_id="random-seed", min_width=80, scale=1)
    dice.click(None, None, seed, js="() => Math.floor(Math.random() * 10000)", **_QUICK)
    scale = gr.Slider(
        0, 10, first.guidance_scale[0], step=0.1, label="Guidance (1 is none)", elem_id="guidance", visible=guided
    )
    several = gr.Checkbox(
        label=f"Guidance {', '.join(map(str, _GUIDANCES))} from the same noise", elem_id="guidances", visible=guided
    )
    scheduler = gr.Dropdown(studio.schedulers, value=first.scheduler, label="Scheduler", elem_id="scheduler")
    steps = gr.Slider(
        1, 250, first.steps, step=1, label="Steps", elem_id="steps",
        interactive=OBJECTIVES[studio.snapshot.objective].steps is None,
    )
    return {"seed": seed, "guidance_scale": scale, "scheduler": scheduler, "steps": steps, "several": several}


class _Visits:
    """What is being drawn for whom; a visit is one tab of a browser."""

    def __init__(self, gr: Any, studio: Studio, folder: Path):
        self.gr, self.studio, self.folder = gr, studio, folder
        self.stops: dict[str | None, Event] = {}

    def begin(self, visit: str | None) -> None:
        self.stops[visit] = Event()

    def stop(self, visit: str | None) -> None:
        if visit in self.stops:
            self.stops[visit].set()

    def run(self, visit: str | None, *asked: Any) -> Iterator[list[Any]]:
        """Values of status, pictures, download, command line and settings in words, as long as there is news."""
        gr, studio, stop = self.gr, self.studio, self.stops.setdefault(visit, Event())
        same = gr.skip()

        def tiles(images: list[Any]) -> Any:
            return gr.update(value=list(zip(images, captions, strict=True)), label=how, columns=columns)

        try:
            request = studio.read(*asked)
            captions, how, count = _captions(request), _how(request), request.settings.num_images
            columns = min(4, count if count > 1 else len(captions))
            blank = np.full((*studio.sampler.image_size, 3), 224, np.uint8)
            shown: list[torch.Tensor | None] = [None] * len(captions)
            yield [_status("Starting."), tiles([blank] * len(shown)), gr.update(value=None, interactive=False), "", how]
            for view in studio.draw(request):
                stopped = stop.is_set() and view.finished < len(view.images)
                same_pictures = all(new is old for new, old in zip(view.images, shown, strict=True))
                shown = view.images
                arrays = [blank if image is None else image.permute(1, 2, 0).numpy() for image in shown]
                status = _status(_progress(view, stopped=stopped), fraction=view.fraction)
                yield [status, same if same_pictures else tiles(arrays), same, same, same]
                if stopped:
                    return
            grid, files = self.save(request, torch.stack(view.images))
            download = gr.update(value=grid, interactive=True)
            yield [_finished(studio, view), tiles(files), download, studio.command(request), how]
        except InputError as error:
            words = fields_as(str(error), lambda field: field.replace("_", " "))
            words = words[0].upper() + words[1:]
            yield [_status(words, wrong=True), same, same, same, same]
            raise gr.Error(words, visible=False, print_exception=False) from None  # the page has said it
        finally:
            if self.stops.get(visit) is stop:
                del self.stops[visit]

    def save(self, request: SampleRequest, images: torch.Tensor) -> tuple[Path, list[Path]]:
        """Write the grid and each picture; returns their paths. Shape: (N, 3, H, W) uint8."""
        folder, scales = Path(tempfile.mkdtemp(dir=self.folder)), request.settings.guidance_scale
        request.save(folder / Path(request.default_path).name, images)
        files = []
        for scale, drawn in zip(scales, images.chunk(len(scales)), strict=True):
            made_by = {**request.made_by, "guidance_scale": scale}
            files += save_pngs(drawn, folder / f"guidance-{scale:g}", request.labels, request.seeds, made_by)
        return folder / Path(request.default_path).name, files


def _captions(request: SampleRequest) -> list[str]:
    """Of each picture, in the order of the drawing."""
    scales, names = request.settings.guidance_scale, request.snapshot.class_names
    return [
        f"{f'{caption(label, names)}, ' * (len(names) > 1)}{f'guidance {scale:g}, ' * (len(scales) > 1)}seed {seed}"
        for scale in scales for label, seed in zip(request.labels, request.seeds, strict=True)
    ]


def _how(request: SampleRequest) -> str:
    """The settings in words."""
    settings = request.settings
    guidance = f", guidance {', '.join(f'{scale:g}' for scale in settings.guidance_scale)}"
    return f"{settings.scheduler}, {plural(settings.steps, 'step')}{guidance * bool(request.snapshot.label_dropout)}"


def _status(words: str, *, fraction: float = 0.0, wrong: bool = False) -> str:
    if wrong:
        return f'<p role="alert" class="wrong">{html.escape(words)}</p>'
    return f'<p role="status">{html.escape(words)}</p><div class="bar"><div style="width: {fraction:.1%}"></div></div>'


def _progress(view: View, *, stopped: bool) -> str:
    if stopped:
        return f"Stopped; {view.finished} of {len(view.images)} pictures were finished."
    return f"Step {view.step} of {view.steps}; {view.finished} of {len(view.images)} pictures finished."


def _finished(studio: Studio, view: View) -> str:
    speed = f"{len(view.images) / view.seconds:.1f} images/s on {studio.sampler.device.type}, previews included"
    return _status(f"{plural(len(view.images), 'picture')} in {view.seconds:.1f} s: {speed}.", fraction=1)


def _about(studio: Studio) -> str:
    snapshot, (height, width) = studio.snapshot, studio.sampler.image_size
    count = len(snapshot.class_names)
    classes = f"{count:,} classes" if count > 1 else "without classes"
    name = snapshot.meta.get("model", "denoiser")
    return (
        "# D-EMO\n\n"
        f"{name}, {studio.parameters / 1e6:.1f} M parameters, {width} x {height} px, {classes}, on "
        f"{studio.sampler.device.type}.  \n"
        f"`{studio.path}`, step {snapshot.meta['step']:,}, {snapshot.meta.get('weights', 'ema')} weights."
    )


def launch(page: Any, settings: AppSettings) -> str:
    """Serve the page in the background; ``page.block_thread()`` waits for Ctrl-C. Returns the address.

    Raises:
        InputError: One cannot listen there.
    """
    gr = import_gradio()
    fonts = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # what the visitor has; nothing to fetch
    page.queue(default_concurrency_limit=1)
    try:
        _, local, public = page.launch(
            server_name=settings.host, server_port=settings.port, share=settings.share, prevent_thread_lock=True,
            quiet=True, ssr_mode=False, footer_links=[], max_file_size="1b",  # nothing is uploaded here
            css=_STYLE, theme=gr.themes.Default(primary_hue="indigo", font=fonts[0], font_mono=fonts[1]),
        )
    except OSError:  # taken since it was checked
        check_address(settings.host, settings.port)
        raise
    return public or local.rstrip("/")
