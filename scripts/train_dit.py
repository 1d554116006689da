"""Train a D-EMO or DiT denoiser. With no data named it trains on the built-in Shapes-1000.

Run it with `accelerate launch scripts/train_dit.py` (any number of processes and GPUs) or with plain `python`.
"""

from functools import partial

from d_emo.config import TrainSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(TrainSettings, __doc__)
    from d_emo.io.hub import prepare_push, push_snapshot
    from d_emo.sampling import preview_grid
    from d_emo.training import fit
    from d_emo.training.denoiser import DenoiserTask

    prepare_push(settings.push_to_hub)
    task = DenoiserTask(settings)
    preview = partial(
        preview_grid, scheduler_config=task.scheduler.config, codec=task.codec, class_names=task.images.class_names,
        guidance_scale=settings.preview_guidance,
    )
    snapshot = fit(task, settings, preview=preview)
    if snapshot is not None:
        print(f"snapshot  {snapshot}\nsample it  python scripts/sample.py --checkpoint {snapshot} --class 0")
        if settings.push_to_hub:
            print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")


if __name__ == "__main__":
    run_cli(main)
