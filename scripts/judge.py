"""Draw with a denoiser and let a classifier of the same classes judge: FID in its features, and class accuracy."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from d_emo.config import DEFAULT_SCHEDULERS, InputError, JudgeSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(JudgeSettings, __doc__)
    import torch

    from d_emo import card
    from d_emo.checkpoint import load_classifier, load_denoiser
    from d_emo.data import load_uint8, open_dataset
    from d_emo.evaluation import ClassifierFeatures, compute_statistics, frechet_distance
    from d_emo.evaluation.features import scale_for_classifier
    from d_emo.latents import load_codec
    from d_emo.sampling import draw_grid, make_scheduler, sample_images, save_png

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot, judge = load_denoiser(settings.checkpoint), load_classifier(settings.classifier)
    if snapshot.class_names != judge.class_names:
        raise InputError(f"{judge.path} knows other classes than {snapshot.path}; name a classifier of the same data")
    if settings.write_card and not os.access(snapshot.path, os.W_OK):
        raise InputError(f"--write-card cannot write to {snapshot.path}; copy the snapshot and judge the copy")
    model, codec = snapshot.model.to(device), load_codec(snapshot.codec).to(device)
    sampler = DEFAULT_SCHEDULERS[snapshot.objective]
    features, classes = ClassifierFeatures(judge.path, device=device), len(snapshot.class_names)

    def draw(labels: list[int]) -> torch.Tensor:
        scheduler = make_scheduler(sampler, snapshot.scheduler_config)
        options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale, "batch_size": 100}
        return torch.cat(list(sample_images(model, scheduler, codec, labels, range(len(labels)), **options)))

    def statistics(images: torch.Tensor):
        return compute_statistics(images.split(100), features, device=device)

    def fid(images: torch.Tensor) -> float:
        measured = statistics(images)
        return frechet_distance(measured.mean, measured.covariance, real.mean, real.covariance)

    @torch.no_grad()
    def classes_seen(images: torch.Tensor) -> torch.Tensor:
        batches = (scale_for_classifier(batch.to(device), judge.image_size) for batch in images.split(100))
        return torch.cat([judge.model.to(device)(batch).argmax(dim=1).cpu() for batch in batches])

    train_set, test_set = (
        open_dataset(dataset=snapshot.meta["data"], data_dir=settings.data_dir, split=split,
                     image_size=snapshot.image_size) for split in ("train", "test")
    )
    held_out = load_uint8(test_set, limit=1000)
    held_out_labels = torch.tensor([test_set.label(index) for index in range(len(held_out))])
    noise = torch.randint(256, held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(settings.num_images) * classes // settings.num_images
    drawn, real = draw(labels.tolist()), statistics(load_uint8(train_set, limit=5000))
    seen = classes_seen(drawn)
    shares = {
        "recognised": (seen == labels, "of the drawn images are the class asked for, to the classifier"),
        "  real": (classes_seen(held_out) == held_out_labels, "of real held-out images are their class, to it"),
    }
    if snapshot.meta["data"] == "shapes":  # class id = 100 shape + 10 colour + ground
        for name, place in (("shape", 100), ("colour", 10), ("ground", 1)):
            shares[f"  {name}"] = seen // place % 10 == labels // place % 10, f"of the drawn images have the {name}"
    figures = [
        (f"FID-{len(drawn)}", fid(drawn), f"of drawn images, in the features of {features.name}"),
        ("  floor", fid(held_out), f"FID-{len(held_out)} of real held-out images"),
        ("  ceiling", fid(noise), f"FID-{len(noise)} of noise"),
        *((name, 100 * right.float().mean().item(), f"% {words}") for name, (right, words) in shares.items()),
    ]

    shown = [index * classes // 10 for index in range(10)]
    captions = [f"{label}: {snapshot.class_names[label]}" for label in shown]
    output = Path(settings.output)
    save_png(draw_grid(draw([label for label in shown for _ in range(10)]), captions, 10), output, vars(settings))
    measurement = {
        "command": shlex.join(["python", *sys.argv]), "settings": vars(settings), "step": snapshot.meta["step"],
        "conditions": f"guidance {settings.guidance_scale:g}, {settings.steps} steps of {sampler}, images {len(drawn)}",
        "figures": [{"name": name.strip(), "value": round(value, 2), "remark": remark}
                    for name, value, remark in figures],
    }
    output.with_suffix(".json").write_text(json.dumps(measurement, indent=1) + "\n")
    print(f"picture      {output}  (seeds 0 to 99; the figures beside it as JSON)")
    print(f"settings     {measurement['conditions']}")
    for name, value, remark in figures:
        print(f"{name:<12} {value:<7.2f} {remark}")
    if settings.write_card:
        shutil.copy(output, snapshot.path / card.PICTURE)
        print(f"card         {card.add_measurement(snapshot.path, measurement)}")


if __name__ == "__main__":
    run_cli(main)
