"""Measure the FID of a folder of images, or what a snapshot draws, against a folder of real ones, without a download.

The features are those of a classifier trained here, such as the one of `make demo`; values compare with others in the
same features only. For published tables use `d-emo fid`, which takes Inception's.

    python examples/measure.py REAL demo/classifier --images GENERATED
    python examples/measure.py REAL demo/classifier --snapshot demo/denoiser
"""

import argparse

from d_emo.device import best_device
from d_emo.evaluation import ClassifierFeatures, FeatureStatistics, frechet_distance, open_images
from d_emo.sampling import Sampler

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("real")
parser.add_argument("classifier", help="snapshot of a classifier")
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--images", help="folder, zip or .npz")
source.add_argument("--snapshot", help="denoiser to draw with")
parser.add_argument("--count", type=int, default=500, help="images to draw")
parser.add_argument("--steps", type=int, help="default: what the snapshot was trained for, else 30")
args = parser.parse_args()

device = best_device()
features = ClassifierFeatures(args.classifier, device=device)


def statistics(batches):
    """Mean and covariance of the features. Shape of a batch: (B, 3, H, W) uint8; never all in memory."""
    seen = FeatureStatistics(features.dim)
    for batch in batches:
        seen.update(features(batch.to(device)))
    return seen


real = statistics(open_images(args.real).batches(64))
if args.images:
    drawn = statistics(open_images(args.images).batches(64))
else:
    sampler = Sampler.open(args.snapshot, steps=args.steps, guidance=1.0)
    labels = [index % len(sampler.class_names) for index in range(args.count)]
    drawn = statistics(sampler.images(labels, range(args.count)))
distance = frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)
print(f"FID-{drawn.count} {distance:.3f} in the features of {features.name}")
