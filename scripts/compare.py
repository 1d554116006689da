"""Compare models: train each with several seeds, alike, measure them alike, and write a report of what came out.

The same command goes on where it was stopped. Several processes of one machine can share a study: each takes the next
run that nobody works on.
"""

from pathlib import Path

from d_emo.config import StudySettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(StudySettings, __doc__)
    from d_emo.lab.study import Study

    study = Study(settings, scripts=Path(__file__).parent)
    if settings.plan:
        return print(study.plan())
    study.conclude([] if settings.report_only else study.work())


if __name__ == "__main__":
    run_cli(main)
