"""What `d-emo` can do: a verb each, with the script of the checkout that does the same. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from d_emo.tables import Reference, Table


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A sub-command.

    Attributes:
        name: ``d-emo NAME``.
        script: Name of the file in ``scripts/`` that does the same.
        group: Heading in ``d-emo --help``.
        help: What it does, in a sentence; more paragraphs for its own ``--help``.
        settings: Settings class; where there are several kinds, by the word that chooses one.
        run: Called with the settings.
    """

    name: str
    script: str
    group: str
    help: str
    settings: Reference | Mapping[str, Reference]
    run: Reference


VERBS: Table[Verb] = Table("verb", [
    Verb(
        name="train", script="train_dit", group="Train", settings="d_emo.config:TrainSettings",
        run="d_emo.cli.train:run",
        help="""Train a D-EMO or DiT denoiser. With no data named it trains on the built-in Shapes-1000.

Run it with `accelerate launch scripts/train_dit.py` (any number of processes and GPUs) or with plain `python`.""",
    ),
    Verb(
        name="train-classifier", script="train_classifier", group="Train", settings="d_emo.config:ClassifierSettings",
        run="d_emo.cli.train_classifier:run",
        help="Train an EMOv1 or EMOv2 classifier on an image folder or a built-in data set.",
    ),
    Verb(
        name="train-vae", script="train_vae", group="Train", settings="d_emo.config:VAESettings",
        run="d_emo.cli.train_vae:run",
        help="Train the small VAE on Shapes-1000 and digits, print its held-out PSNR and write it with its card.",
    ),
    Verb(
        name="encode", script="encode_latents", group="Train", settings="d_emo.config:EncodeSettings",
        run="d_emo.cli.encode:run",
        help="""Encode a data set into latents, once, so that training need not: `--latents DIR` of train reads them.

Run it with `accelerate launch scripts/encode_latents.py` (any number of processes and GPUs) or with plain `python`. The
latents depend on the images, their size and the VAE, not on the model that is trained on them.""",
    ),
    Verb(
        name="sample", script="sample", group="Draw", settings="d_emo.config:SampleSettings",
        run="d_emo.cli.sample:run",
        help="Draw pictures of classes with a trained denoiser; prints where they are and how they were made.",
    ),
    Verb(
        name="app", script="app", group="Draw", settings="d_emo.config:AppSettings", run="d_emo.cli.app:run",
        help="Open a page in the browser to draw pictures of classes with a trained denoiser; prints its address.",
    ),
    Verb(
        name="fid", script="fid", group="Measure", settings="d_emo.config:FidSettings", run="d_emo.cli.fid:run",
        help="""Measure images against real ones: FID, sFID, Inception Score, precision and recall, KID.

The images exist (--samples), or are drawn here from a snapshot (--checkpoint), by as many processes as
`accelerate launch` starts. Features of drawn images are kept as they are made; re-run the same command to resume.""",
    ),
    Verb(
        name="reference", script="make_reference", group="Measure", settings="d_emo.config:ReferenceSettings",
        run="d_emo.cli.reference:run",
        help="Build the reference that fid compares with: one .npz in ADM's layout, of images cropped as in training.",
    ),
    Verb(
        name="class-accuracy", script="judge", group="Measure", settings="d_emo.config:JudgeSettings",
        run="d_emo.cli.class_accuracy:run",
        help="Draw with a denoiser and measure by a classifier of the same classes: FID in its features, class "
        "accuracy.",
    ),
    Verb(
        name="evaluate", script="evaluate_classifier", group="Measure",
        settings="d_emo.config:EvaluateClassifierSettings", run="d_emo.cli.evaluate:run",
        help="Measure top-1 and top-5 accuracy of a trained or released classifier on a folder of images or built-in "
        "data.",
    ),
    Verb(
        name="convert", script="convert_weights", group="Use elsewhere", settings="d_emo.config:ConvertSettings",
        run="d_emo.cli.convert:run",
        help="Convert a released EMOv1 or EMOv2 file, or a snapshot trained here, to safetensors and a timm config.",
    ),
    Verb(
        name="export", script="export", group="Use elsewhere", settings="d_emo.config:ExportSettings",
        run="d_emo.cli.export:run",
        help="Write a classifier or denoiser for use without Python (ONNX, torch.export, Core ML) and compare it with "
        "PyTorch.",
    ),
    Verb(
        name="models", script="models_table", group="Study", settings="d_emo.config:ModelsSettings",
        run="d_emo.cli.models:run",
        help="Print every model's parameters and MACs beside the published ones, as a markdown table.",
    ),
    Verb(
        name="explain", script="explain", group="Study", settings="d_emo.config:ExplainSettings",
        run="d_emo.cli.explain:run",
        help="Draw what a classifier looks at in an image: Grad-CAM, effective receptive field, similarity along the "
        "diagonal.",
    ),
    Verb(
        name="plot-loss", script="plot_loss", group="Study", settings="d_emo.config:PlotSettings",
        run="d_emo.cli.plot_loss:run",
        help="Draw the training losses of runs from their TensorBoard logs, with the published curve of the same model "
        "on top.",
    ),
    Verb(
        name="compare", script="compare", group="Study", settings="d_emo.config:StudySettings",
        run="d_emo.cli.compare:run",
        help="""Compare models: train each with several seeds, alike, measure them alike, and write a report.

Re-run the same command to resume. Several processes of one machine can share a study: each takes the next run that
nobody works on.""",
    ),
    Verb(
        name="benchmark", script="benchmark", group="Study",
        settings={
            "denoisers": "d_emo.config:DenoiserBenchmarkSettings",
            "classifiers": "d_emo.config:ClassifierBenchmarkSettings",
            "forms": "d_emo.config:FormsSettings",
        },
        run="d_emo.cli.benchmark:run",
        help="Measure speed beside DiT (`denoisers`) or peers of timm (`classifiers`); `forms`: which kernels run.",
    ),
])  # fmt: skip
