"""Convert a released EMOv1 or EMOv2 file, or a snapshot trained here, to safetensors and a timm config."""

from pathlib import Path

from d_emo.config import ConvertSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(ConvertSettings, __doc__)
    from d_emo.io.snapshot import load_classifier
    from d_emo.models.convert import check_variant, read_released_classifier, write_timm_folder
    from d_emo.models.counting import count_parameters

    source, output = Path(settings.source), Path(settings.output)
    if source.is_dir():
        snapshot = load_classifier(source)
        model, half = snapshot.model, (0.5, 0.5, 0.5)
        check_variant(model.config["name"], settings.model, source)
        write_timm_folder(model, output, input_size=snapshot.image_size, mean=half, std=half,
                          class_names=snapshot.class_names)
    else:
        model = read_released_classifier(source, settings.model)
        write_timm_folder(model, output)
    print(f"{source} holds {model.config['name']}: {count_parameters(model):,} parameters, {model.num_classes} classes")
    print(f"wrote    {output}/model.safetensors and {output}/config.json")
    print(f"load it  import d_emo, timm; timm.create_model('local-dir:{output}', pretrained=True)")


if __name__ == "__main__":
    run_cli(main)
