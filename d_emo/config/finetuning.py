"""Settings of fine-tuning: the snapshot to start from, what is taken over from it, and which weights are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from d_emo.config.base import Settings, check_values, setting, type_hints
from d_emo.config.paths import check_config
from d_emo.config.ranges import Trained
from d_emo.errors import InputError

S = TypeVar("S", bound="FineTuningSettings")


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(Settings):
    """What a run that starts from a snapshot has in common, whatever it trains."""

    init_from: str | None = setting(
        None, "start from the weights of this snapshot (or the newest of a run folder). Where they are not given, "
        "--model, --model-options, --image-size and, of a denoiser, --vae, --objective and --timestep-sampling are "
        "those of the snapshot; classes, image size and a denoiser's patch size may be others. --model-options are "
        "added to the snapshot's; to undo one of those, give its default: '{window_size: 8}'",
        source=True, group="Fine-tuning", snapshot=True
    )
    train: Trained = setting(
        "all", "which weights: all; head, the last layer and, of a denoiser, the class embeddings; or lora:RANK, the "
        "head and adapters of this rank on all other linear layers (pip install 'd-emo[lora]'), merged into the "
        "weights of snapshots"
    )

    def check(self) -> None:
        if self.train != "all" and self.init_from is None:
            raise InputError(f"`train` {self.train} needs trained weights; name a snapshot with `init_from`")
        super().check()

    def taken(self, there: dict[str, Any]) -> list[str]:
        """Which settings follow those of the snapshot, ``there``, where they are left open."""
        return ["model", "image_size"]

    def same_model(self, there: dict[str, Any]) -> bool:
        """Whether the model is the snapshot's, or left open."""
        mine, theirs = (str(name).replace("/", "-").lower() for name in (self.model, there.get("model")))
        return self.model is None or mine == theirs

    def options_there(self, there: dict[str, Any]) -> dict[str, Any]:
        """The model options of the snapshot that hold for the model here."""
        return there.get("model_options") or {}

    def settled(self: S) -> S:
        """With what the snapshot decides. Options of the same model are added to those given, which win."""
        there = self._there()
        changes = {name: there.get(name) for name in self.taken(there) if getattr(self, name) is None}
        if there and self.same_model(there):
            changes["model_options"] = {**self.options_there(there), **(self.model_options or {})} or None
        return replace(self, **changes)

    def as_there(self) -> str:
        """Which of the settings are the snapshot's and which are not, in a sentence; "" where it says nothing."""
        there = self._there()
        names = {*self.taken(there), "model_options"}
        said = {name: value for name, value in there.items() if name in names and value is not None}
        mine = {name: getattr(self, name) for name in said}
        same = [f"`{name}` {value}" for name, value in said.items() if value == mine[name]]
        other = [f"`{name}` {mine[name]} (there {value})" for name, value in said.items() if value != mine[name]]
        parts = [f"{title} {', '.join(each)}" for title, each in (("as there:", same), ("other here:", other)) if each]
        return f"Settings {'; '.join(parts)}." if parts else ""

    def _there(self) -> dict[str, Any]:
        """The settings of the run that wrote the snapshot; none where its ``config.yaml`` is missing."""
        file = Path(self.init_from or "") / "config.yaml"
        if self.init_from is None or not file.is_file():
            return {}
        try:
            check_config(str(file))
            return check_values(yaml.safe_load(file.read_text(encoding="utf-8")), type_hints(type(self)))
        except InputError as error:
            raise InputError(f"`init_from`: {file} cannot be used ({error})") from None
