"""Settings of speed measurements."""

from dataclasses import dataclass
from typing import Any, Literal

from d_emo.config.base import Settings, overwrite_setting, setting
from d_emo.config.ranges import ClassifierSide, Count, Depth, ImageSide, Threads
from d_emo.errors import InputError
from d_emo.tables.models import SIZES


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Settings):
    """What both benchmarks share."""

    batch_size: Count = setting(8, "images or latents per step", group="Measurement")
    rounds: Count = setting(7, "measured rounds, each of every case once, after a warm-up round")
    clock: Literal["wall", "cpu"] = setting("wall", "cpu: CPU time of this process, for a machine shared with others")
    threads: Threads | None = setting(None, "CPU threads. Default: PyTorch's choice", group="Machine")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    profile: bool = setting(False, "also profile by operator, in as many further rounds", group="Measurement")
    output: str | None = setting(
        None, "folder for table.md, results.json and plot.png. Default: print the table only", group="Output",
        output="folder",
    )
    overwrite: bool = overwrite_setting()



@dataclass(frozen=True, kw_only=True)
class DenoiserBenchmarkSettings(BenchmarkSettings):
    """Settings of ``scripts/benchmark.py denoisers``."""

    sizes: list[str] = setting(["S"], "of Ti, S, B, L and XL", group="Networks")
    pixels: list[ImageSide] = setting([256], "image sizes; the latents are an eighth of them")
    work: Literal["both", "training", "inference"] = setting("both", "what is measured")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast")
    compile: bool = setting(False, "also measure each network compiled")
    depth: Depth | None = setting(None, "blocks of every network, for quick trials. Default: the size's own")

    def check(self) -> None:
        known = SIZES
        for size in self.sizes:
            if size not in known:
                raise InputError(f"`sizes` {size!r} is none of {', '.join(known)}")
        for pixels in self.pixels:
            if pixels < 64 or pixels % 16:
                raise InputError(f"`pixels` {pixels} must be at least 64 and a multiple of 16, for whole patches")


PEERS = [
    "edgenext_small", "mobilenetv4_conv_medium", "repvit_m1_0", "efficientformerv2_s1", "mobilevitv2_100",
    "fastvit_t12",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassifierBenchmarkSettings(BenchmarkSettings):
    """Settings of ``scripts/benchmark.py classifiers``."""

    models: list[str] = setting(
        ["emov2_1m", "emov2_2m", "emov2_5m"], "models to measure, each beside a plain PyTorch version", group="Networks"
    )
    peers: list[str] = setting(PEERS, "timm models to compare with, fused where they can be")
    image_size: ClassifierSide = setting(224, "side of the square images in pixels")
    batch_size: Count = setting(16, "images per step", group="Measurement")
    compile: bool = setting(False, "also measure each network compiled")


@dataclass(frozen=True, kw_only=True)
class FormsSettings(Settings):
    """Settings of ``d-emo benchmark forms``: which form every operator of a network takes here, and why not others."""

    model: str = setting("D-EMOv2-S-2", "name of a denoiser or a classifier", group="Network")
    image_size: ClassifierSide = setting(256, "side of the square images in pixels; a denoiser's latents are an eighth")
    batch_size: Count = setting(2, "images or latents")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast", group="Machine")
    compile: bool = setting(True, "also of the compiled network")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: a GPU if there is one")


@dataclass(frozen=True, kw_only=True)
class KernelsSettings(Settings):
    """Settings of ``d-emo benchmark kernels``: times of the GPU's kernels beside the bytes that they have to move."""

    batch_size: Count = setting(256, "latents of 256 px, of D-EMOv2-S", group="Measurement")


@dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """Settings of ``d-emo benchmark step``: what a run adds to forward, backward and the optimizer's step."""

    model: str = setting("D-EMOv2-S-2", "name of a denoiser", group="Network")
    depth: Depth | None = setting(None, "blocks, for quick trials. Default: the model's own")
    image_size: ImageSide = setting(256, "side of the square images in pixels; the latents are an eighth of them")
    compile: bool = setting(False, "compile the network")
    batch_size: Count = setting(8, "latents per step", group="Measurement")
    steps: Count = setting(10, "steps in a row, of the run and bare in turns")
    rounds: Count = setting(5, "measured rounds, after one to warm up")
    clock: Literal["wall", "cpu"] = setting("wall", "cpu: CPU time of this process, for a machine shared with others")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast", group="Machine")


@dataclass(frozen=True, kw_only=True)
class DenseBenchmarkSettings(Settings):
    """Settings of ``d-emo benchmark dense``: detectors and segmenters, beside torchvision's."""

    models: list[str] = setting(
        ["ssdlite-emov2_1m", "ssdlite-emov2_2m", "deeplabv3-emov2_1m", "segformer-emov2_1m"],
        "detectors of a single stage, and segmenters", group="Networks"
    )
    peers: list[str] = setting(
        ["ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"], "such networks of torchvision"
    )
    image_size: ClassifierSide = setting(320, "side of the one square image in pixels", group="Measurement")
    rounds: Count = setting(15, "measured rounds, each of every network once, after one to warm up")
    clock: Literal["wall", "cpu"] = setting("wall", "cpu: CPU time of this process, for a machine shared with others")
    threads: list[Threads] = setting([1, 2], "numbers of CPU threads to measure with", group="Machine")


BENCHMARKS: dict[str, type[Any]] = {
    "denoisers": DenoiserBenchmarkSettings, "classifiers": ClassifierBenchmarkSettings, "forms": FormsSettings,
    "kernels": KernelsSettings, "step": StepSettings, "dense": DenseBenchmarkSettings,
}  # fmt: skip
