"""``d-emo models``."""

from d_emo.config import ModelsSettings
from d_emo.lab.models_table import ablations_table, models_table


def run(settings: ModelsSettings) -> None:
    """Print the table of models, or that of the ablations."""
    print(ablations_table() if settings.ablations else models_table(settings.match))
