"""``d-emo compare``."""

from d_emo.config import StudySettings
from d_emo.lab.study import Study


def run(settings: StudySettings) -> None:
    """Do it."""
    study = Study(settings)
    if settings.plan:
        return print(study.plan())
    study.conclude([] if settings.report_only else study.work())
