"""``d-emo fid``."""

import sys

from d_emo.config import FidSettings
from d_emo.data import Reading
from d_emo.evaluation import Measurement, Ranks
from d_emo.io.snapshot import load_denoiser
from d_emo.threads import use_threads
from d_emo.training.parallel import open_processes


def run(settings: FidSettings) -> None:
    """Measure images that are there, or a snapshot's; print the result and what to know before comparing it."""
    state = open_processes()
    use_threads(state.device, state.num_processes)
    options = ("metrics", "features", "inception_weights", "batch_size", "skip_corrupt", "overwrite")
    measurement = Measurement(
        settings.reference, device=state.device, reading=Reading.of(settings),
        output=settings.output if state.is_main_process else None,
        **{name: getattr(settings, name) for name in options},
    )
    if settings.checkpoint is not None:
        from d_emo.evaluation import measure_snapshot  # brings diffusers along

        ranks = Ranks(state.process_index, state.num_processes, state.wait_for_everyone)
        snapshot = load_denoiser(settings.checkpoint)
        result = measure_snapshot(measurement, snapshot, settings, device=state.device, ranks=ranks)
    elif state.is_main_process:
        result = measurement.of_images(settings.samples, num_images=settings.num_images)
    if state.is_main_process:
        if state.num_processes > 1:
            print(f"{state.num_processes} processes shared the work", file=sys.stderr)
        for warning in result.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{result}\n\n{result.to_markdown()}")
