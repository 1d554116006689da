"""``d-emo demo``."""

from pathlib import Path

from d_emo.cli import run_verb
from d_emo.config import DemoSettings
from d_emo.errors import InputError, OtherRunError, imported
from d_emo.files import read_json
from d_emo.tables import DEMOS, load


def run(settings: DemoSettings) -> None:
    """Train what the demo needs, one after the other, and conclude.

    Raises:
        InputError: Something has to be installed first.
    """
    demo = DEMOS[settings.name]
    for extra, module in (demo.needs or {}).items():
        imported(module, f"the demo {demo.name} needs {module}", f"d-emo[{extra}]")
    for number, (verb, config) in enumerate(demo.configs(), 1):
        print(f"demo      {demo.name}, run {number} of {len(demo.runs)}")
        train(verb, config)
    load(demo.conclude)()


def train(verb: str, config: Path) -> None:
    """One run of a demo.

    Raises:
        InputError: It cannot be made, or what lies in its folder cannot be resumed.
    """
    folder = Path(read_json(config, lambda settings: settings["output_dir"]))
    try:
        run_verb(verb, ["--config", str(config)])
    except OtherRunError as error:
        raise InputError(f"{error}. If nothing in {folder} is needed, remove it, and the demo begins anew") from None
