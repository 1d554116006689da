"""Draw pictures of classes with a trained denoiser; prints where they are and how they were made."""

import time
from dataclasses import asdict

from d_emo.config import SampleSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(SampleSettings, __doc__)
    import torch
    from tqdm import tqdm

    from d_emo.checkpoint import load_denoiser, newest_denoiser
    from d_emo.latents import load_codec
    from d_emo.sampling import draw_grid, find_classes, free_path, make_scheduler, sample_images, save_png, set_steps

    snapshot = load_denoiser(settings.checkpoint or newest_denoiser())
    settings.fill_in(objective=snapshot.objective, label_dropout=snapshot.label_dropout)
    classes = find_classes(settings.classes, snapshot.class_names)
    output = free_path(settings.output, f"samples/class-{'-'.join(map(str, classes[:10]))}-seed{settings.seed}.png")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = load_codec(snapshot.codec).to(device)
    labels = [label for label in classes for _ in range(settings.num_images)]
    seeds = [settings.seed + index for index in range(len(labels))]
    started = time.perf_counter()
    scheduler = make_scheduler(settings.scheduler, snapshot.scheduler_config)
    set_steps(scheduler, settings.steps)
    total = -(-len(labels) // settings.batch_size) * len(scheduler.timesteps)
    with tqdm(total=total, desc="sampling", unit="step") as bar:
        images = torch.cat(list(sample_images(
            snapshot.model.to(device), scheduler, codec, labels, seeds,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
            batch_size=settings.batch_size, on_step=bar.update,
        )))
    speed = len(labels) / (time.perf_counter() - started)
    captions = [f"{label}: {snapshot.class_names[label]}" for label in classes]
    grid = draw_grid(images, captions, settings.num_images, scale=max(1, 128 // images.shape[-1]))
    step, weights = snapshot.meta["step"], snapshot.meta["weights"]
    save_png(grid, output, {**asdict(settings), "classes": classes, "checkpoint": str(snapshot.path), "step": step})
    print(f"picture   {output}\nsnapshot  {snapshot.path} (step {step:,}, {weights} weights)")
    print(f"classes   {', '.join(captions)}\nseed      {settings.seed} to {seeds[-1]}, one per image")
    print(f"settings  {settings.scheduler}, {settings.steps} steps, guidance {settings.guidance_scale:g}")
    print(f"speed     {speed:.1f} images/s on {device.type}")


if __name__ == "__main__":
    run_cli(main)
