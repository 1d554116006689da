"""Train an EMOv1 or EMOv2 classifier on an image folder or a built-in data set."""

from d_emo.config import ClassifierSettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(ClassifierSettings, __doc__)
    from d_emo.training import fit
    from d_emo.training.classifier import ClassifierTask

    snapshot = fit(ClassifierTask(settings), settings)
    if snapshot is not None:
        print(f"snapshot  {snapshot}\n{(snapshot / 'README.md').read_text()}")


if __name__ == "__main__":
    run_cli(main)
