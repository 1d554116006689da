"""Writes classifiers as timm keeps them: a folder of safetensors and a config, to be opened as ``local-dir:FOLDER``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from d_emo.errors import InputError
from d_emo.files import is_free, replacing, write_json
from d_emo.models.backbone import EMO
from d_emo.models.registry import create_model, resolve_name
from d_emo.models.released import load_released, read_checkpoint, unwrap, variant_of
from d_emo.weights import shapes_of

HEADS = ("head.weight", "head.bias")


def read_released_classifier(path: Path, name: str | None = None) -> EMO:
    """The classifier that a released EMOv1 or EMOv2 file holds, its variant and number of classes read from the file.

    Args:
        path: the file.
        name: the variant that it should be. Default: whatever it is.

    Raises:
        InputError: for an unreadable file, one that holds no EMO, or another variant than asked for.
    """
    weights = unwrap(read_checkpoint(path), str(path))
    found = shapes_of(weights)
    variant = resolve_name(name) if name else variant_of(found, r"emov\d")
    if variant is None:
        raise InputError(
            f"{path} holds none of the released EMOv1 and EMOv2 variants; converted weights and snapshots are opened "
            "by the name of their folder."
        )
    if not re.match(r"emov\d", variant):
        raise InputError(f"{variant} is no EMO classifier; `model` takes names such as emov2_5m.")
    check_variant(variant_of(found, r"emov\d"), name, path)
    rows = weights[HEADS[0]].shape[0] if HEADS[0] in weights else 0
    return load_released(create_model(variant, num_classes=rows), path)


def check_variant(found: str | None, wanted: str | None, path: Path) -> None:
    """Raise InputError if ``path`` holds a known variant, but not the one that is wanted."""
    if wanted is not None and found not in (None, resolve_name(wanted)):
        raise InputError(f"{path} holds the weights of {found}, not of {wanted}; leave `model` out, or name {found}.")


def write_timm_folder(
    model: EMO, folder: Path, *, input_size: int = 224, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, class_names: Sequence[str] | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write ``model.safetensors`` and ``config.json`` in timm's layout.

    Args:
        model: a classifier made by `create_model`.
        folder: a new or empty folder.
        input_size: side of the images in pixels.
        mean, std: normalisation of images in [0, 1]. Default: ImageNet's, that of the released weights.
        class_names: one name per class.
        overwrite: write into the folder whatever it holds.

    Raises:
        InputError: if the folder already holds something.
    """
    if not is_free(folder) and not overwrite:
        raise InputError(f"{folder} already exists and is not an empty folder; name another place to write to.")
    from d_emo.models.timm_registry import default_cfgs

    settings = dict(model.config)
    name = settings.pop("name")
    default = default_cfgs[name].default
    cfg: dict[str, Any] = {
        "tag": "d_emo", "input_size": [3, input_size, input_size], "interpolation": default.interpolation,
        "crop_pct": default.crop_pct, "mean": list(mean or default.mean), "std": list(std or default.std),
        "num_classes": model.num_classes, "pool_size": [-(-input_size // 32)] * 2, "first_conv": default.first_conv,
        "classifier": default.classifier,
    }  # fmt: skip
    config: dict[str, Any] = {
        "architecture": name, "num_classes": model.num_classes, "num_features": model.num_features,
        "global_pool": model.global_pool, "pretrained_cfg": cfg,
    }  # fmt: skip
    options = {key: value for key, value in settings.items() if key not in ("num_classes", "global_pool")}
    if "in_channels" in options:
        options["in_chans"] = options.pop("in_channels")
        cfg["input_size"][0] = options["in_chans"]
    if options:
        config["model_args"] = options
    if class_names:
        cfg["label_names"] = list(class_names)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    write_json(folder / "config.json", config)
