"""Distillation: a trained classifier whose soft logits a smaller one learns."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.io.classifier import Normalized, normalized, open_classifier
from d_emo.weights import check_finite


def load_teacher(name: str, weights: str | None, class_names: Sequence[str]) -> nn.Module:
    """A classifier of images in [-1, 1], in eval mode and without gradients.

    Args:
        name: the name of a timm model, or a path that `open_classifier` takes.
        weights: a file for a timm model; its pretrained weights are fetched otherwise.
        class_names: classes that it must know, as far as it names them.

    Raises:
        InputError: if there is no such teacher, its weights cannot be had, or it knows other classes.
    """
    if Path(name).exists() or Path(name).suffix in (".pth", ".pt", ".safetensors"):
        if weights is not None:
            raise InputError(f"the teacher {name} brings its weights along; `teacher_weights` is for names of timm")
        opened = open_classifier(name)
        teacher, known, names = opened.model, opened.num_classes, opened.class_names
    else:
        teacher = _timm_model(name, weights)
        known, names = teacher.model.num_classes, None
    check_finite(teacher.state_dict(), f"the teacher {name}" + (f" with {weights}" if weights else ""))
    if known != len(class_names):
        raise InputError(
            f"the teacher {name} knows {known} classes, but the data have {len(class_names)}; choose another"
        )
    if names is not None and names != list(class_names):
        theirs, ours = next(pair for pair in zip(names, class_names, strict=True) if pair[0] != pair[1])
        raise InputError(f"the teacher {name} knows other classes: {theirs} where the data have {ours}; choose another")
    return teacher.eval().requires_grad_(False)


def _timm_model(name: str, weights: str | None) -> Normalized:
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"`teacher_weights` {weights} does not exist")
    import timm
    from timm.models import load_state_dict

    try:
        if weights is None:
            return normalized(timm.create_model(name, pretrained=True))
        head = timm.get_pretrained_cfg_value(name, "classifier")
        head = head if isinstance(head, str) else head[0]
        rows = load_state_dict(weights, weights_only=True).get(f"{head}.weight", ())
        return normalized(timm.create_model(name, num_classes=len(rows), checkpoint_path=weights))
    except Exception as error:  # an unknown name, no network, no such weights: timm raises a dozen types
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the teacher {name}{'' if weights is None else f' with {weights}'} "
            f"({type(error).__name__}: {reason}); give a name that timm knows, with `teacher_weights` FILE where they "
            "cannot be fetched, or the path of a snapshot, of a converted folder or of a released EMO file"
        ) from error


def distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher's softened classes, times tau^2 (Hinton et al.).

    Shape: (B, num_classes) twice -> scalar.
    """
    log_student, log_teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * tau**2
