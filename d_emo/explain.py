"""What a classifier looks at: Grad-CAM, the effective receptive field, and the similarity of the tokens on a diagonal.

Sources: EMOv2 and EMOv1 papers, figures 1, 7 and 8; Luo et al., 2016 (effective receptive field).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.models import EMO
from d_emo.models.attention import WindowAttention
from d_emo.models.layers import LocalConv

if TYPE_CHECKING:
    import numpy as np

DIAGONAL_STAGE = 3
"""The stage whose tokens are compared, as in the papers."""


def grad_cam(network: nn.Module, model: EMO, image: Tensor, label: int, *, stage: int = 4) -> Tensor:
    """Where a stage's map speaks for a class, by the library pytorch-grad-cam.

    Args:
        network: takes images in [-1, 1] to logits; ``model`` itself, or what normalises images for it.
        model: the classifier inside.
        image: Shape (3, H, W).
        label: class to explain.
        stage: from 1; the last stage's map is taken after the final norm.

    Shape: -> (H, W) in [0, 1].

    Raises:
        InputError: if the library is not installed.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise InputError('Grad-CAM needs the package grad-cam: pip install "d-emo[explain]"') from error

    layer = model.norm if stage == 4 else model.stages[stage - 1][-1]
    with GradCAM(network, [layer], reshape_transform=lambda x: x.permute(0, 3, 1, 2)) as cam:
        return torch.from_numpy(cam(image[None], [ClassifierOutputTarget(label)])[0])


def effective_receptive_field(network: nn.Module, model: EMO, images: Tensor, *, stage: int = 4) -> Tensor:
    """How strongly each pixel moves the centre of a stage's map: absolute gradients, summed over channels and images.

    Args:
        network, model: see `grad_cam`.
        images: Shape (B, 3, H, W), in [-1, 1].
        stage: from 1.

    Shape: -> (H, W), 1 at the strongest pixel.
    """
    images = images.clone().requires_grad_()
    with capture(model.stages[stage - 1][-1]) as captured:
        network(images)
    features = captured[0]  # (B, h, w, C)
    centre = features[:, features.shape[1] // 2, features.shape[2] // 2]
    (gradient,) = torch.autograd.grad(centre.clamp(min=0).sum(), images)  # (B, 3, H, W)
    field = gradient.abs().sum(dim=(0, 1))
    return field / field.max().clamp(min=torch.finfo(field.dtype).tiny)


def symmetries(image: Tensor) -> Tensor:
    """The turns and mirror images of a square image, for an average that leans to no side.

    Shape: (3, H, H) -> (8, 3, H, H).
    """
    turns = [image.rot90(quarter, (1, 2)) for quarter in range(4)]
    return torch.stack([*turns, *(turn.flip(2) for turn in turns)])


def half_side(field: Tensor) -> int:
    """Side in pixels of the smallest centred square that holds half of a field. Shape: field (H, W)."""
    height, width = field.shape
    for reach in range(1, max(height, width) // 2 + 1):
        rows, columns = (slice(max(0, n // 2 - reach), n // 2 + reach) for n in (height, width))
        if field[rows, columns].sum() >= field.sum() / 2:
            break
    return 2 * reach


def diagonal_similarity(network: nn.Module, model: EMO, image: Tensor, *, stage: int = DIAGONAL_STAGE) -> Tensor:
    """Cosine similarity of the tokens on the diagonal of a stage's map, each with each.

    Args:
        network, model: see `grad_cam`.
        image: square image. Shape (3, H, H), in [-1, 1].
        stage: from 1.

    Shape: -> (n, n) for a map of n x n tokens.
    """
    with torch.no_grad(), capture(model.stages[stage - 1][-1]) as captured:
        network(image[None])
    tokens = captured[0][0].diagonal(dim1=0, dim2=1).T  # (n, C)
    tokens = F.normalize(tokens - captured[0][0].mean(dim=(0, 1)), dim=1)  # what all tokens share says nothing
    return tokens @ tokens.T


@contextlib.contextmanager
def capture(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of a module. Shape: as the module's outputs."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextlib.contextmanager
def without(model: EMO, part: type[nn.Module], stages: Sequence[int] = (DIAGONAL_STAGE,)) -> Iterator[None]:
    """Within this context the blocks of some stages that keep the map lack their attention or their local convolution.

    The weights stay as they were trained, together; without attention the value passes on unmixed.
    """

    def bypass(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return module.value(inputs[0]) if part is WindowAttention else torch.zeros_like(output)

    blocks = [block for stage in stages for block in model.stages[stage - 1] if block.residual]
    handles = [m.register_forward_hook(bypass) for block in blocks for m in block.modules() if isinstance(m, part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explain(
    network: nn.Module, model: EMO, image: Tensor, label: int, title: str, folder: Path, *, stage: int = 4
) -> list[Path]:
    """Write the three pictures as PNGs; returns their paths.

    Shape: image (3, H, W).

    Args:
        network, model, image, label, stage: see `grad_cam`.
        title: name of the class, for the caption.
        folder: made where it is missing.
    """
    fields = {"whole network": effective_receptive_field(network, model, symmetries(image), stage=stage)}
    with without(model, WindowAttention, range(1, 5)):
        fields["attention bypassed"] = effective_receptive_field(network, model, symmetries(image), stage=stage)
    compared = {"attention and convolution": diagonal_similarity(network, model, image)}
    with without(model, WindowAttention):
        compared["convolution only"] = diagonal_similarity(network, model, image)
    with without(model, LocalConv):
        compared["attention only"] = diagonal_similarity(network, model, image)
    photo = (image * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("grad_cam.png", "receptive_field.png", "diagonal_similarity.png")]
    draw_heat(paths[0], photo, grad_cam(network, model, image, label, stage=stage), f"Grad-CAM, stage {stage}: {title}")
    draw_fields(paths[1], fields, stage)
    draw_similarities(paths[2], compared)
    return paths


def figure(columns: int) -> tuple:
    """A row of axes without ticks, and the function that writes and closes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(3.4 * columns, 3.7), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.set_xticks([])
        each.set_yticks([])
    save: Callable[[Path], None] = lambda path: drawing.savefig(path, dpi=110)  # noqa: E731
    return drawing, axes, save


def draw_heat(path: Path, photo: np.ndarray, heat: Tensor, title: str) -> None:
    """The photo beside the photo under a heat map. Shape: heat (H, W)."""
    _, axes, save = figure(2)
    for each in axes:
        each.imshow(photo)
    axes[1].imshow(heat.numpy(), cmap="jet", alpha=0.45, vmin=0, vmax=1)
    axes[0].set_title("image", fontsize=9)
    axes[1].set_title(title, fontsize=9)
    save(path)


def draw_fields(path: Path, fields: dict[str, Tensor], stage: int) -> None:
    """The fourth roots of receptive fields, so that their weak rims show."""
    drawing, axes, save = figure(len(fields))
    for each, (title, field) in zip(axes, fields.items(), strict=True):
        shown = each.imshow(field.numpy() ** 0.25, cmap="viridis", vmin=0, vmax=1)
        each.set_title(f"{title}: half within {half_side(field)} px", fontsize=9)
    drawing.colorbar(shown, ax=list(axes), shrink=0.8)
    drawing.suptitle(f"effective receptive field of stage {stage} (fourth root)", fontsize=10)
    save(path)


def draw_similarities(path: Path, compared: dict[str, Tensor]) -> None:
    """One matrix per entry, on one scale."""
    drawing, axes, save = figure(len(compared))
    for each, (title, matrix) in zip(axes, compared.items(), strict=True):
        shown = each.imshow(matrix.numpy(), cmap="coolwarm", vmin=-1, vmax=1)
        each.set_title(title)
    drawing.colorbar(shown, ax=list(axes), shrink=0.8)
    save(path)
