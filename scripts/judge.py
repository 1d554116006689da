"""Draw with a denoiser and let a classifier of the same classes judge: FID in its features, and class accuracy."""

from pathlib import Path

from d_emo.config import DEFAULT_SCHEDULERS, JudgeSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(JudgeSettings, __doc__)
    import torch

    from d_emo.checkpoint import load_classifier, load_denoiser
    from d_emo.data import load_uint8, open_dataset
    from d_emo.evaluation import ClassifierFeatures, class_accuracy, compute_statistics, frechet_distance
    from d_emo.latents import load_codec
    from d_emo.sampling import draw_grid, make_scheduler, sample_images, save_png

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot, judge = load_denoiser(settings.checkpoint), load_classifier(settings.classifier)
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

    train, held_out = (
        load_uint8(open_dataset(dataset=snapshot.meta["data"], data_dir=settings.data_dir, split=split,
                                image_size=snapshot.image_size), limit=limit)
        for split, limit in (("train", 5000), ("test", 1000))
    )
    noise = torch.randint(256, held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = [index * classes // settings.num_images for index in range(settings.num_images)]
    drawn, real = draw(labels), statistics(train)
    shown = [index * classes // 10 for index in range(10)]
    captions = [f"{label}: {snapshot.class_names[label]}" for label in shown]
    output = Path(settings.output)
    save_png(draw_grid(draw([label for label in shown for _ in range(10)]), captions, 10), output, vars(settings))
    print(f"picture      {output}  (seeds 0 to 99)")
    print(f"settings     guidance {settings.guidance_scale:g}, {settings.steps} steps {sampler}, images {len(drawn)}")
    print(f"FID-{len(drawn)}      {fid(drawn):.2f}  in the features of {features.name}")
    print(f"  floor      {fid(held_out):.2f}  (FID-{len(held_out)} of real held-out images)")
    print(f"  ceiling    {fid(noise):.2f}  (FID-{len(noise)} of noise)")
    print(f"recognised   {class_accuracy(judge, drawn, labels):.1%} of the drawn images are the class asked for")


if __name__ == "__main__":
    run_cli(main)
