"""Studies: models, objectives and seeds trained and measured alike, and a report of what came out.

Reading order: ``plan`` (which runs), ``execution`` (other scripts as children), ``measuring``, ``results`` (rows and
intervals), ``report`` and ``plots``, ``cost``, ``study`` (all of it wired together).
"""

from d_emo.lab.study.study import Study

__all__ = ["Study"]
