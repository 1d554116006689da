"""What `make demo` ends with: draw digits with the denoiser just trained and let the classifier judge them."""

from dataclasses import dataclass
from pathlib import Path

from d_emo.config import parse_settings, run_cli, setting


@dataclass(kw_only=True)
class DemoSettings:
    """Settings of ``scripts/demo.py``."""

    checkpoint: str = setting("demo/denoiser", "snapshot or run folder of the denoiser")
    classifier: str = setting("demo/classifier", "snapshot or run folder of the classifier")
    num_images: int = setting(500, "digits to draw and judge")
    guidance_scale: float = setting(1.5, "classifier-free guidance")
    steps: int = setting(30, "denoising steps of dpm++")
    output: str = setting("demo/digits.png", "PNG of the first digits of each class")


def main() -> None:
    settings = parse_settings(DemoSettings, __doc__)
    import torch

    from d_emo.checkpoint import load_classifier, load_denoiser
    from d_emo.data import Digits, to_uint8
    from d_emo.evaluation import ClassifierFeatures, class_accuracy, compute_statistics, frechet_distance
    from d_emo.latents import load_codec
    from d_emo.sampling import draw_grid, make_scheduler, sample_images, save_png

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot, judge = load_denoiser(settings.checkpoint), load_classifier(settings.classifier)
    labels = [index % 10 for index in range(settings.num_images)]
    drawn = torch.cat(list(sample_images(
        snapshot.model.to(device), make_scheduler("dpm++", snapshot.scheduler_config),
        load_codec(snapshot.codec).to(device), labels, range(len(labels)),
        num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, batch_size=100,
    )))
    size = snapshot.image_size
    train, held_out = (
        to_uint8(torch.stack([image for image, _ in (data[i] for i in range(len(data)))]))
        for data in (Digits(size), Digits(size, split="test"))
    )
    noise = torch.randint(256, held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = ClassifierFeatures(judge.path, device=device)
    real = compute_statistics(train.split(100), features, device=device)

    def fid(images: torch.Tensor) -> float:
        statistics = compute_statistics(images.split(100), features, device=device)
        return frechet_distance(statistics.mean, statistics.covariance, real.mean, real.covariance)

    by_class = torch.stack([drawn[digit::10][:10] for digit in range(10)]).flatten(0, 1)
    output = Path(settings.output)
    save_png(draw_grid(by_class, [str(digit) for digit in range(10)], 10), output, vars(settings))
    how = f"guidance {settings.guidance_scale:g}, {settings.steps} steps, seeds 0 to {len(drawn) - 1}"
    print(f"picture      {output}  ({how})")
    print(f"FID-{len(drawn)}      {fid(drawn):.2f}  in the classifier's features, against the real training digits")
    print(f"  floor      {fid(held_out):.2f}  (FID-{len(held_out)} of real held-out digits)")
    print(f"  ceiling    {fid(noise):.2f}  (FID-{len(noise)} of noise)")
    print(f"recognised   {class_accuracy(judge, drawn, labels):.1%} of the drawn digits are the digit asked for")


if __name__ == "__main__":
    run_cli(main)
