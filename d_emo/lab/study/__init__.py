"""Studies: models, objectives and seeds trained and measured alike, and a report of what came out.

Reading order: ``plan`` (which runs), ``execution`` (other verbs as children), ``measuring``, ``results`` (all
measurements, intervals), ``report`` and ``plots``, ``cost``, ``study`` (all of it wired together).
"""

from d_emo.errors import imported

for _needed in ("pandas", "matplotlib.figure"):  # before hours of training, not after them
    imported(_needed, f"a study needs {_needed.partition('.')[0]}", "d-emo[lab]")

from d_emo.lab.study.study import Study  # noqa: E402

__all__ = ["Study"]
