"""Studies: models, objectives and seeds trained and measured alike, and a report of what came out.

Reading order: ``plan`` (which runs), ``execution`` (other verbs as children), ``measuring``, ``results`` (all
measurements, intervals), ``report`` and ``plots``, ``cost``, ``study`` (all of it wired together).
"""

from importlib.util import find_spec

from d_emo.errors import InputError

for _needed in ("pandas", "matplotlib"):  # before hours of training, not after them
    if find_spec(_needed) is None:
        raise InputError(f"a study needs {_needed}: pip install 'd-emo[lab]'")

from d_emo.lab.study.study import Study  # noqa: E402

__all__ = ["Study"]
