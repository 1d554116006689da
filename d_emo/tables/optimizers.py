"""What moves the weights of a denoiser in training."""

from dataclasses import dataclass

from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """An optimizer.

    Attributes:
        name: The value of ``optimizer``.
        label: What model cards call it; its name where empty.
        make: Called with the model, the groups of parameters (each with ``params`` by name, ``weight_decay`` and
            ``lr_scale``), ``lr`` and ``fused``, whether the device has fused updates; gives a ``torch.optim.Optimizer``
            whose groups keep their ``lr_scale``.
    """

    name: str
    label: str = ""
    make: Reference


OPTIMIZERS: Table[OptimizerRow] = Table(
    "optimizer",
    [
        OptimizerRow(name="adamw", label="AdamW", make="d_emo.training.optimizer:adamw"),
        OptimizerRow(name="muon", label="Muon", make="d_emo.training.muon:muon"),
    ],
)
