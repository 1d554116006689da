"""Settings of the demos."""

from dataclasses import dataclass

from d_emo.config.base import Settings, setting
from d_emo.tables import DEMOS


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Settings of ``scripts/demo.py``."""

    name: str = setting(help="which one", flag="NAME", group="Demo", choices=DEMOS)
