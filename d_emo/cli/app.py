"""``d-emo app``."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from d_emo.app import page
from d_emo.app.studio import Studio
from d_emo.config import AppSettings
from d_emo.io.snapshot import load_denoiser, newest_denoiser


def run(settings: AppSettings) -> None:
    """Serve the page until Ctrl-C."""
    page.import_gradio()
    page.check_address(settings.host, settings.port)
    snapshot = load_denoiser(settings.checkpoint or newest_denoiser())
    studio = Studio(snapshot, settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="d-emo-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # so that nothing is left behind
        blocks = page.build_page(studio, Path(folder))
        address = page.launch(blocks, settings)
        print(f"page      {address} (Ctrl-C ends it)")
        step, weights = snapshot.meta["step"], snapshot.meta["weights"]
        print(f"snapshot  {snapshot.path} (step {step:,}, {weights} weights)", flush=True)
        blocks.block_thread()
