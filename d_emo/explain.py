"""What a classifier looks at: Grad-CAM, the effective receptive field, and the similarity of the tokens on a diagonal.

Sources: EMOv2 and EMOv1 papers, figures 1, 7 and 8; Luo et al., 2016 (effective receptive field).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import imported
from d_emo.files import replacing
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
    cams = imported("pytorch_grad_cam", "Grad-CAM needs the package grad-cam", "d-emo[explain]")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = model.norm if stage == 4 else model.stages[stage - 1][-1]
    with cams.GradCAM(network, [layer], reshape_transform=lambda x: x.permute(0, 3, 1, 2)) as cam:
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
    for reach in range(1, max(field.shape) // 2 + 1):
        rows, columns = (slice(max(0, n // 2 - reach), n // 2 + reach) for n in field.shape)
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
    with module.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        yield outputs


@contextlib.contextmanager
def without(model: EMO, part: type[nn.Module], stages: Sequence[int] = (DIAGONAL_STAGE,)) -> Iterator[None]:
    """Within this context the blocks of some stages that keep the map lack their attention or their local convolution.

    The weights stay as they were trained, together; without attention the value passes on unmixed.
    """

    def bypass(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return module.value(inputs[0]) if part is WindowAttention else torch.zeros_like(output)

    blocks = [block for stage in stages for block in model.stages[stage - 1] if block.residual]
    with contextlib.ExitStack() as hooks:
        for module in (m for block in blocks for m in block.modules() if isinstance(m, part)):
            hooks.enter_context(module.register_forward_hook(bypass))
        yield


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
    colormaps = imported("matplotlib", "drawing needs matplotlib", "d-emo[explain]").colormaps
    fields = {"whole network": effective_receptive_field(network, model, symmetries(image), stage=stage)}
    with without(model, WindowAttention, range(1, 5)):
        fields["attention bypassed"] = effective_receptive_field(network, model, symmetries(image), stage=stage)
    compared = {"attention and convolution": diagonal_similarity(network, model, image)}
    with without(model, WindowAttention):
        compared["convolution only"] = diagonal_similarity(network, model, image)
    with without(model, LocalConv):
        compared["attention only"] = diagonal_similarity(network, model, image)
    photo = (image * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    paths = [folder / name for name in ("grad_cam.png", "receptive_field.png", "diagonal_similarity.png")]
    heat = colormaps["jet"](grad_cam(network, model, image, label, stage=stage).numpy())[..., :3]
    draw_maps(paths[0], {"image": photo, f"Grad-CAM, stage {stage}: {title}": 0.55 * photo + 0.45 * heat}, scale=False)
    roots = {f"{name}: half within {half_side(field)} px": field**0.25 for name, field in fields.items()}
    above = f"effective receptive field of stage {stage} (fourth root)"  # which shows their weak rims
    draw_maps(paths[1], roots, above, cmap="viridis", vmin=0, vmax=1)
    above = f"cosine similarity of the tokens on the diagonal, stage {DIAGONAL_STAGE}"
    draw_maps(paths[2], compared, above, cmap="coolwarm", vmin=-1, vmax=1)
    return paths


def draw_maps(
    path: Path, maps: dict[str, Tensor | np.ndarray], above: str = "", *, scale: bool = True, **style: Any
) -> None:
    """Maps or photos side by side, under their titles, with a scale of colours beside them."""
    figures = imported("matplotlib.figure", "drawing needs matplotlib", "d-emo[explain]")
    drawing = figures.Figure(figsize=(3.4 * len(maps), 3.7), layout="constrained")
    axes = drawing.subplots(1, len(maps), squeeze=False, subplot_kw={"xticks": [], "yticks": []})[0]
    for panel, (title, values) in zip(axes, maps.items(), strict=True):
        shown = panel.imshow(values, **style)
        panel.set_title(title, fontsize=9)
    if scale:
        drawing.colorbar(shown, ax=list(axes), shrink=0.8)
    if above:
        drawing.suptitle(above, fontsize=10)
    with replacing(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=110)
