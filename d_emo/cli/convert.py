"""``d-emo convert``."""

from pathlib import Path

from d_emo.config import ConvertSettings
from d_emo.io.snapshot import load_classifier
from d_emo.models.convert import check_variant, read_released_classifier, write_timm_folder
from d_emo.models.counting import count_parameters


def run(settings: ConvertSettings) -> None:
    """Do it."""
    source, output = Path(settings.source), Path(settings.output)
    if source.is_dir():
        snapshot = load_classifier(source)
        model, half = snapshot.model, (0.5, 0.5, 0.5)
        check_variant(model.config["name"], settings.model, source)
        write_timm_folder(model, output, input_size=snapshot.image_size, mean=half, std=half,
                          class_names=snapshot.class_names, overwrite=settings.overwrite)
    else:
        model = read_released_classifier(source, settings.model)
        write_timm_folder(model, output, overwrite=settings.overwrite)
    print(f"{source} holds {model.config['name']}: {count_parameters(model):,} parameters, {model.num_classes} classes")
    print(f"wrote    {output}/model.safetensors and {output}/config.json")
    print(f"load it  import d_emo, timm; timm.create_model('local-dir:{output}', pretrained=True)")

