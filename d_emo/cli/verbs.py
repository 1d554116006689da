"""What `d-emo` can do: a verb each, with the script of the checkout that does the same. Free of torch."""

import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from d_emo.tables import Reference, Table, load
from d_emo.threads import spare_neighbours


@dataclass(frozen=True)
class Verb:
    """A sub-command.

    Attributes:
        name: ``d-emo NAME``; what it does is ``run`` of the module of this name beside this one, called with settings.
        script: Name of the file in ``scripts/`` that does the same.
        group: Heading in ``d-emo --help``.
        settings: Settings class; where there are several kinds, by the word that chooses one.
        help: What it does, in a sentence; more paragraphs for its own ``--help``.
    """

    name: str
    script: str
    group: str
    settings: Reference | Mapping[str, Reference]
    help: str

    def kinds(self) -> Mapping[str, Reference]:
        """Its settings classes by the word that chooses one; the word is empty where there is no choice."""
        return self.settings if isinstance(self.settings, Mapping) else {"": self.settings}

    def run(self, settings: object) -> None:
        """Do it. The module is imported now: help and typing errors need no torch."""
        with importing():
            run = load(f"d_emo.cli.{self.name.replace('-', '_')}:run")
        run(settings)


@contextmanager
def importing() -> Iterator[None]:
    """A context for the seconds that PyTorch and others take to be imported, which a terminal is told of."""
    waiting, fresh = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0", "torch" not in sys.modules
    if waiting:
        print("loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
    for name in ("scipy.stats", "scipy.integrate"):  # diffusers' schedulers import them for kinds that are none of ours
        defer(name)
    if fresh:
        spare_neighbours()
    gc.disable()  # a tenth of the time, for the little garbage that there is
    try:
        yield
    finally:
        if fresh:
            gc.freeze()  # what is there now stays: later searches for garbage need not go through it
        gc.enable()
        if waiting:
            print(" " * 19, end="\r", file=sys.stderr, flush=True)


def defer(name: str) -> None:
    """Let a module be loaded only when something of it is looked up.

    The standard library's LazyLoader takes ``__file__`` for that, which `inspect` looks up in every module.
    """
    spec = None
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    module, loaded, lock = importlib.util.module_from_spec(spec), False, threading.RLock()

    def __getattr__(wanted: str) -> object:
        nonlocal loaded
        with lock:
            if not loaded:
                loaded = True
                spec.loader.exec_module(module)
        if wanted in vars(module):
            return vars(module)[wanted]
        raise AttributeError(f"module {name!r} has no attribute {wanted!r}")

    module.__getattr__ = __getattr__
    sys.modules[name] = module


VERBS: Table[Verb] = Table("verb", [
    Verb(
        "train", "train_dit", "Train", "d_emo.config:TrainSettings",
        """Train a D-EMO or DiT denoiser. With no data named it trains on the built-in Shapes-1000.

By itself it is one process; `accelerate launch -m d_emo train` runs it in several, one on each GPU.""",
    ),
    Verb(
        "distill", "distill", "Train", "d_emo.config:DistillSettings",
        """Train a flow snapshot on until it draws in one step, or four, by the Frechet distance of features.

The same as `train --init-from SNAPSHOT --objective one-step` (or four-step), with defaults for it. One process. A
snapshot of eps needs `train --init-from SNAPSHOT --objective flow` first.""",
    ),
    Verb(
        "train-classifier", "train_classifier", "Train", "d_emo.config:ClassifierSettings",
        "Train an EMOv1 or EMOv2 classifier on an image folder or a built-in data set.",
    ),
    Verb(
        "train-detector", "train_detector", "Train", "d_emo.config:DetectorSettings",
        "Train a detector (SSDLite, RetinaNet, Mask R-CNN on an EMO) on files in COCO's format or built-in scenes.",
    ),
    Verb(
        "train-segmenter", "train_segmenter", "Train", "d_emo.config:SegmenterSettings",
        "Train a segmenter (DeepLabV3, PSPNet, Semantic FPN, SegFormer on an EMO) on PNG masks or built-in scenes.",
    ),
    Verb(
        "train-video", "train_video", "Train", "d_emo.config:VideoSettings",
        "Train V-EMO, or an image classifier on the mean of frames, on videos or built-in moving digits.",
    ),
    Verb(
        "train-vae", "train_vae", "Train", "d_emo.config:VAESettings",
        """Train a codec: an AutoencoderKL, or an AutoencoderDC of deep compression, of your images or built-in ones.

`--vae RUN_FOLDER` of the other verbs takes it. With no data named it is such a VAE as ships, of Shapes-1000 and
digits.""",
    ),
    Verb(
        "demo", "demo", "Train", "d_emo.config:DemoSettings",
        """Train something small from nothing, in minutes on two cores, and show how good it is: figures and a picture.

Everything goes to the folder demo/. It needs no network and no data. Re-run the same command to resume; what is
trained already is not trained again.""",
    ),
    Verb(
        "encode", "encode_latents", "Train", "d_emo.config:EncodeSettings",
        """Encode a data set into latents, once, so that training need not: `--latents DIR` of train reads them.

By itself it is one process; `accelerate launch -m d_emo encode` runs it in several, one on each GPU. The
latents depend on the images, their size and the VAE, not on the model that is trained on them.""",
    ),
    Verb(
        "doctor", "doctor", "Train", "d_emo.config:DoctorSettings",
        """Read a data set before anything is trained on it: what it holds, what looks wrong, what training would do.

Prints a table (lines that begin with LOOK want a look) and writes a contact sheet of 64 images as training sees them.
With --validate-dir it also looks for held-out images that are trained on, with --vae at the latents.""",
    ),
    Verb(
        "sample", "sample", "Sample", "d_emo.config:SampleSettings",
        "Sample images of classes from a trained denoiser; prints where they are and how they were made.",
    ),
    Verb(
        "app", "app", "Sample", "d_emo.config:AppSettings",
        "Open a page in the browser to sample images of classes from a trained denoiser; prints its address.",
    ),
    Verb(
        "segment", "segment", "Deploy", "d_emo.config:SegmentSettings",
        "Segment images by a trained segmenter: for each a picture, a mask of class ids and a JSON file.",
    ),
    Verb(
        "fid", "fid", "Evaluate", "d_emo.config:FidSettings",
        """Measure images against real ones: FID, sFID, Inception Score, precision and recall, KID.

The images exist (--samples), or are drawn here from a snapshot (--checkpoint), by as many processes as
`accelerate launch` starts. Features of drawn images are kept as they are made; re-run the same command to resume.""",
    ),
    Verb(
        "reference", "make_reference", "Evaluate", "d_emo.config:ReferenceSettings",
        "Build the reference that fid compares with: one .npz in ADM's layout, of images cropped as in training.",
    ),
    Verb(
        "class-accuracy", "judge", "Evaluate", "d_emo.config:JudgeSettings",
        "Sample from a denoiser and measure by a classifier of the same classes: FID in its features, class accuracy.",
    ),
    Verb(
        "evaluate", "evaluate_classifier", "Evaluate", "d_emo.config:EvaluateClassifierSettings",
        "Measure top-1 and top-5 accuracy of a trained or released classifier on a folder of images or built-in data.",
    ),
    Verb(
        "detect", "detect", "Deploy", "d_emo.config:DetectSettings",
        "Find objects in images with a trained detector: pictures with boxes (and masks), and detections.json.",
    ),
    Verb(
        "convert", "convert_weights", "Deploy", "d_emo.config:ConvertSettings",
        "Convert a released EMOv1 or EMOv2 file, or a snapshot trained here, to safetensors and a timm config.",
    ),
    Verb(
        "export", "export", "Deploy", "d_emo.config:ExportSettings",
        "Export a classifier or denoiser (ONNX, torch.export, Core ML) and compare it with PyTorch.",
    ),
    Verb(
        "models", "models_table", "Study", "d_emo.config:ModelsSettings",
        "Print every model's parameters and MACs beside the published ones, as a markdown table.",
    ),
    Verb(
        "explain", "explain", "Study", "d_emo.config:ExplainSettings",
        "Show what a classifier looks at: Grad-CAM, effective receptive field, similarity along the diagonal.",
    ),
    Verb(
        "plot-loss", "plot_loss", "Study", "d_emo.config:PlotSettings",
        "Plot training losses of runs from their TensorBoard logs, with the published curve of the same model.",
    ),
    Verb(
        "compare", "compare", "Study", "d_emo.config:StudySettings",
        """Compare models: train each with several seeds, alike, measure them alike, and write a report.

Re-run the same command to resume. Several processes of one machine can share a study: each takes the next run that
nobody works on.""",
    ),
    Verb(
        "benchmark", "benchmark", "Study",
        {
            "denoisers": "d_emo.config:DenoiserBenchmarkSettings",
            "classifiers": "d_emo.config:ClassifierBenchmarkSettings",
            "forms": "d_emo.config:FormsSettings",
            "kernels": "d_emo.config:KernelsSettings",
            "step": "d_emo.config:StepSettings",
            "dense": "d_emo.config:DenseBenchmarkSettings",
        },
        "Measure speed beside DiT (`denoisers`), peers of timm (`classifiers`) or of torchvision (`dense`: detectors "
        "and segmenters); `forms`: which kernels run; "
        "`kernels`: their times on a GPU; `step`: what a run adds to a bare training step.",
    ),
])  # fmt: skip
