"""``d-emo demo``."""

from importlib.util import find_spec

from d_emo.cli import run_verb
from d_emo.config import DemoSettings
from d_emo.errors import InputError
from d_emo.tables import DEMOS, load


def run(settings: DemoSettings) -> None:
    """Train what the demo needs, one after the other, and conclude.

    Raises:
        InputError: Something has to be installed first.
    """
    demo = DEMOS[settings.name]
    for extra, module in (demo.needs or {}).items():
        if find_spec(module) is None:
            raise InputError(f"the demo {demo.name} needs {module}: pip install 'd-emo[{extra}]'")
    for verb, arguments in demo.arguments():
        run_verb(verb, arguments)
    load(demo.conclude)()
