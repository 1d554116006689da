"""A page to draw pictures on, by Gradio, which only the functions here import. Nothing of it needs the internet."""

import base64
import html
import io
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image

from d_emo.app.studio import Studio, View
from d_emo.config import AppSettings
from d_emo.errors import InputError, fields_as
from d_emo.sampling import SampleRequest
from d_emo.text import plural

# No `from __future__ import annotations` in this file: Gradio reads the annotation of `request` below as an object.

_STYLE = Path(__file__).with_name("page.css").read_text()
_SHOW = "() => { if (innerWidth < 700) document.querySelector('#status').scrollIntoView({ behavior: 'smooth' }) }"
"""Where the results lie below the controls, goes down to them."""


def import_gradio() -> Any:
    """Gradio, told to keep to itself.

    Raises:
        InputError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise InputError("the page needs Gradio: pip install 'd-emo[app]' (in a checkout: -e '.[app]')") from None
    return gradio


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
    with gr.Blocks(title="D-EMO", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_about(studio), elem_id="about")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields = _fields(gr, studio, first)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80, scale=2)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(_status("The pictures will appear here."), elem_id="status")
                pictures = gr.HTML(_Tiles(studio, first).html(), elem_id="pictures")
                download = gr.DownloadButton("Download as PNG", interactive=False, elem_id="download")
                command = gr.Textbox(
                    label="The same pictures from the command line", lines=2, interactive=False, buttons=["copy"],
                    elem_id="command", placeholder="is written here when they are drawn",
                )

        def begin(request: gr.Request) -> list[Any]:
            visits.begin(request.session_hash)
            return [gr.update(interactive=False), gr.update(interactive=True), _status("Waiting for its turn.")]

        def run(classes, num_images, seed, scale, scheduler, steps, request: gr.Request) -> Iterator[list[Any]]:
            yield from visits.run(request.session_hash, classes, num_images, seed, scale, scheduler, steps)

        def leave(request: gr.Request) -> None:
            visits.stop(request.session_hash)

        def end() -> list[Any]:
            return [gr.update(interactive=True), gr.update(interactive=False)]

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        drawing = gr.on([draw.click, fields["seed"].submit], begin, None, [draw, stop, status], js=_SHOW, **quick).then(
            run, list(fields.values()), [status, pictures, download, command], show_progress="hidden",
            concurrency_limit=1, api_name="draw",
        )
        drawing.success(end, None, [draw, stop], **quick)
        drawing.failure(end, None, [draw, stop], **quick)
        stop.click(leave, None, None, **quick)
        page.unload(leave)
    return page


def _fields(gr: Any, studio: Studio, request: SampleRequest) -> dict[str, Any]:
    """The controls, by the names and in the order of `Studio.read`."""
    names, first = studio.snapshot.class_names, request.settings
    fields = {"classes": gr.Dropdown(
        [(f"{label}: {name}", label) for label, name in enumerate(names)], value=[0], multiselect=True, label="Class",
        info=f"one or more of {len(names):,}; type a part of a name, or a number", elem_id="classes",
        visible=len(names) > 1,
    )}
    fields["num_images"] = gr.Slider(
        1, max(2, min(16, studio.settings.max_images)), first.num_images, step=1, elem_id="count",
        label="Pictures of each class" if len(names) > 1 else "Pictures",
    )
    with gr.Row():
        fields["seed"] = gr.Number(first.seed, label="Seed", elem_id="seed", min_width=160, scale=2)
        dice = gr.Button("Random seed", size="md", elem_id="random", min_width=130, scale=1)
    fields["guidance_scale"] = gr.Slider(
        0, 10, first.guidance_scale[0], step=0.1, label="Guidance", elem_id="guidance",
        info="how strongly the class is enforced; 1 is none", visible=studio.snapshot.label_dropout > 0,
    )
    fields["scheduler"] = gr.Dropdown(studio.schedulers, value=first.scheduler, label="Scheduler", elem_id="scheduler")
    fields["steps"] = gr.Slider(1, 250, first.steps, step=1, label="Steps", elem_id="steps")
    dice.click(
        lambda: random.randrange(2**31), None, fields["seed"], queue=False, show_progress="hidden",
        api_visibility="private",
    )
    return fields


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
        """Values of status, pictures, download and command line, as long as there is news."""
        gr, studio, stop = self.gr, self.studio, self.stops.setdefault(visit, Event())
        try:
            request = studio.read(*asked)
            tiles = _Tiles(studio, request)
            yield [_status("Starting."), tiles.html(), gr.update(value=None, interactive=False), ""]
            for view in studio.draw(request):
                stopped = stop.is_set() and view.finished < len(view.images)
                status = _status(_progress(view, stopped=stopped), fraction=view.fraction)
                yield [status, tiles.html() if tiles.take(view) else gr.skip(), gr.skip(), gr.skip()]
                if stopped:
                    return
            path = Path(tempfile.mkdtemp(dir=self.folder)) / Path(request.default_path).name
            request.save(path, torch.stack(view.images))
            file = gr.update(value=path, interactive=True)
            yield [_finished(studio, view), gr.skip(), file, studio.command(request)]
        except InputError as error:
            words = fields_as(str(error), lambda field: field.replace("_", " "))
            words = words[0].upper() + words[1:]
            yield [_status(words, wrong=True), gr.skip(), gr.skip(), gr.skip()]
            raise gr.Error(html.escape(words), print_exception=False) from None
        finally:
            if self.stops.get(visit) is stop:
                del self.stops[visit]


class _Tiles:
    """The pictures as HTML, a section for each class; each picture is encoded once."""

    def __init__(self, studio: Studio, request: SampleRequest):
        self.captions, self.columns, self.seeds = request.captions, request.settings.num_images, request.seeds
        (self.height, self.width), self.finished = studio.sampler.image_size, 0
        self.images: list[Any] = [None] * len(self.seeds)
        self.sources = [""] * len(self.seeds)

    def take(self, view: View) -> bool:
        """Encode what is new: finished pictures without loss, the others small. Tells whether there was any."""
        new = False
        for index, image in enumerate(view.images):
            if image is not self.images[index] or self.finished <= index < view.finished:
                self.images[index], new = image, True
                self.sources[index] = _data_url(image, "PNG" if index < view.finished else "JPEG")
        self.finished = view.finished
        return new

    def html(self) -> str:
        sections = []
        small = " small" if self.width < 256 else ""
        columns = f"grid-template-columns: repeat({min(4, self.columns)}, minmax(0, 256px))"
        size = f'width="{self.width}" height="{self.height}"'
        for row, caption in enumerate(self.captions):
            cells = []
            for index in range(row * self.columns, (row + 1) * self.columns):
                name = html.escape(f"{caption}, seed {self.seeds[index]}")
                cells.append(
                    f'<img src="{self.sources[index]}" alt="{name}" title="{name}" {size} decoding="sync">'
                    if self.sources[index] else f'<i style="aspect-ratio: {self.width} / {self.height}"></i>'
                )
            sections.append(
                f'<section><h3>{html.escape(caption)}</h3><div class="tiles{small}" style="{columns}">'
                f'{"".join(cells)}</div></section>'
            )
        return "".join(sections)


def _data_url(image: torch.Tensor, kind: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


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
        "Pictures of a class, out of noise: latent diffusion as in DiT, with EMOv2's light i2RMB blocks.  \n"
        f"This is {name}, {studio.parameters / 1e6:.1f} M parameters, {width} x {height} px, {classes}, on "
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
