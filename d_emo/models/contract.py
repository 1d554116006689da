"""What the rest of D-EMO asks of a denoiser, whatever its frame: DiT's, a U-shaped one, one of video.

Called as the denoisers of diffusers are (`DiTTransformer2DModel`).

Whoever trains, samples, saves, measures or exports a denoiser uses what is here and nothing else of it. A frame is a
subclass of `DenoiserFrame` and a row of ``d_emo.tables.FRAMES``.
"""

import os
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from d_emo.errors import InputError
from d_emo.weights import check_finite, some


class DenoiserFrame(ModelMixin, ConfigMixin, ABC):
    """Predicts, from noisy latents, their timestep and their class, what the objective asks for.

    A frame has ``forward(hidden_states, timestep, class_labels)``, which gives an object with ``sample``: the
    prediction and, with `predicts_variance`, behind it as many channels for its variance. Labels are not
    dropped in it. From diffusers it has ``config``, ``device``, ``dtype``, ``save_pretrained``, ``from_pretrained``
    and ``enable_gradient_checkpointing``.

    Its label table is one parameter: a row per class, then the null class, then rows that `append_label_rows` added.

    Shape: hidden_states (B, C, *sizes), timestep () or (B,), class_labels (B,) -> sample (B, C or 2 C, *sizes).

    Attributes:
        label_parameter: Name of the label table's parameter, the weight of a ``torch.nn.Embedding``.
        head: Beginnings of the names of the parameters that turn the last features into the prediction.
        fixed_tensors: State-dict names of what is computed for a latent size, not trained.
        free_settings: Arguments of the constructor in which a model may differ from the one that it is fine-tuned from.
    """

    label_parameter: ClassVar[str]
    head: ClassVar[tuple[str, ...]] = ()
    fixed_tensors: ClassVar[tuple[str, ...]] = ()
    free_settings: ClassVar[tuple[str, ...]] = ("num_classes",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)  # diffusers' pipelines look for it there

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, output_loading_info: bool = False, **options: Any) -> Any:
        """diffusers' own, which only warns of tensors that the files lack, or that it lacks; refused here.

        With ``ignore_mismatched_sizes`` those of another shape are initialised anew, as for other classes.

        Raises:
            InputError: The files lack tensors, have others, or hold NaN.
        """
        anew = options.get("ignore_mismatched_sizes", False)
        options |= {"low_cpu_mem_usage": False} if anew else {}
        model, info = super().from_pretrained(path, output_loading_info=True, **options)
        for title in ("missing", "unexpected", "mismatched"):
            names = sorted(map(str, info[f"{title}_keys"]))
            if names and not (anew and title == "mismatched"):
                raise InputError(f"{path} does not hold a whole {cls.__name__}; {title}: {some(names)}")
        if info["mismatched_keys"]:  # diffusers says that it initialises them, and does not
            fresh, state = cls.from_config(model.config).state_dict(), model.state_dict()
            for name, *_ in info["mismatched_keys"]:
                state[name].copy_(fresh[name])
        check_finite(model.state_dict(), str(path))
        return (model, info) if output_loading_info else model

    def weights_from(self, other: "DenoiserFrame") -> dict[str, Tensor]:
        """State of a model of this kind that differs at most in `free_settings`, for this one to load."""
        return other.state_dict()

    @classmethod
    @abstractmethod
    def settings_for(cls, latent_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
        """The constructor's arguments that fit a data set: latents of shape (channels, *sizes), and its classes."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, *sizes) of the latents that it takes."""

    @property
    @abstractmethod
    def predicts_variance(self) -> bool:
        """Whether the output has a second half, for the variance (learned sigma)."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Positions that its widest blocks work on, per image."""

    @property
    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        """(channels, *sizes) of the map after each block that the frame can show (see `project`)."""
        return ()

    def feature_shape(self, block: int) -> tuple[int, ...]:
        """(channels, *sizes) of the map after a block, counted from 0.

        Raises:
            InputError: There is no such block, or the frame shows no features.
        """
        shapes = self.feature_shapes
        if not shapes:
            raise InputError(f"{type(self).__name__} shows no features")
        if not 0 <= block < len(shapes):
            raise InputError(f"There is no block {block} in a denoiser of {len(shapes)}; the first is 0.")
        return shapes[block]

    def project(self, block: int, projector: nn.Module | None) -> None:
        """Show features while training: the output's ``features`` are then ``projector`` of the map after a block.

        The projector becomes a part of the model, trained and kept in training states with it; None takes it away, as
        snapshots have to. A frame with `feature_shapes` sees to it.

        Args:
            block: From 0.
            projector: Takes maps (B, *sizes, channels).

        Raises:
            InputError: There is no such block, or the frame shows no features.
        """
        raise InputError(f"{type(self).__name__} shows no features")

    def features(self, block: int, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The map after a block, without gradients; later blocks do not run.

        Hooks on the frame itself do not see it. Frames that show `feature_shapes` implement it.

        Shape: as ``forward`` -> (B, channels, *sizes).

        Raises:
            InputError: There is no such block, or the frame shows no features.
        """
        raise InputError(f"{type(self).__name__} shows no features")

    def block_matrices(self) -> dict[str, int]:
        """The parameters that are matrices between the features of hidden layers, as an optimizer for such wants them:
        by name how many matrices one holds, one below the other (q, k and v of one projection). None unless a frame
        names them.
        """
        return {}

    @property
    def num_classes(self) -> int:
        """Classes without the null class."""
        return self.config.num_classes

    @property
    def null_class(self) -> int:
        """The label that means "no class": the row behind the classes."""
        return self.num_classes

    def label_rows(self) -> nn.Parameter:
        """The label table itself, to be read or, without gradients, to be written to. Shape: (rows, C)."""
        return self.get_parameter(self.label_parameter)

    @torch.no_grad()
    def append_label_rows(self, rows: Tensor) -> list[int]:
        """Labels for more rows, such as mixtures of classes. A model that has them is not to be saved.

        Shape: rows (n, C).
        """
        table = self.get_submodule(self.label_parameter.rpartition(".")[0])
        before = table.num_embeddings
        table.weight = nn.Parameter(torch.cat([table.weight, rows.to(table.weight)]), requires_grad=False)
        table.num_embeddings = before + len(rows)
        return list(range(before, table.num_embeddings))
