"""A model's rows of classes as sums of vectors of the words in the classes' names, at the start or all along."""

import copy
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from d_emo.errors import InputError


@torch.no_grad()
def start_from_words(table: torch.Tensor, class_names: Sequence[str], *, std: float, seed: int) -> None:
    """Write sums of random vectors, one for each word of a class's name, into its row: what shares words starts alike.

    The sums are divided by the square root of their number of words. Names without words, and rows behind those of
    the classes, stay as they are; of classes of the same name, all but the first have a vector of their own beside
    the words'. A word's vector depends on itself and the seed alone.

    Args:
        table: Changed in place.
        class_names: One for each row, from the first.
        std: Standard deviation of the rows' values.
        seed: Of the vectors.

    Shape: table (classes or more, C).
    """
    alike: Counter[tuple[str, ...]] = Counter()
    for row, name in zip(table, class_names, strict=False):
        words = words_of(name)
        apart = (f"no. {alike[words]}",) if alike[words] else ()  # a crane is a bird, and another class a machine
        alike[words] += 1
        seeds = [zlib.crc32(f"{seed} {word}".encode()) for word in words + apart]
        if words:
            parts = [torch.randn(len(row), generator=torch.Generator().manual_seed(each)) for each in seeds]
            row.copy_(sum(parts) * std / len(parts) ** 0.5)


def words_of(name: str) -> tuple[str, ...]:
    """The words of a class's name, in small letters."""
    return tuple(re.findall(r"\w+", name.lower()))


class WordHead(nn.Module):
    """A classifier's last layer whose row of a class is the sum of one row for each word of the class's name.

    Where every combination of some parts is a class, such as shape, colour and ground, the softmax over classes is then
    the product of one softmax for each part: an image teaches one of ten shapes rather than one of a thousand classes.

    Args:
        layer: What it takes the place of; the rows of words are those whose sums are nearest to its rows.
        class_names: Of the rows.

    Raises:
        InputError: Two names have the same words, one has none, or no word is in two.

    Shape: (..., C) -> (..., classes).
    """

    def __init__(self, layer: nn.Linear, class_names: Sequence[str]):
        super().__init__()
        counts = _counts(class_names)
        self.register_buffer("counts", counts)  # in states: a resumed run keeps the order of classes that it began with
        self.words = nn.Linear(layer.in_features, counts.shape[1], bias=layer.bias is not None)
        to_words = torch.linalg.pinv(counts.double())
        for name, parameter in self.words.named_parameters():
            parameter.data = (to_words @ getattr(layer, name).detach().double()).to(parameter)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.words(features) @ self.counts.mT

    def plain(self) -> nn.Linear:
        """The same as an ordinary layer with a row for each class."""
        layer = nn.Linear(self.words.in_features, len(self.counts), bias=self.words.bias is not None)
        for name, parameter in layer.named_parameters():
            parameter.data = self.counts @ getattr(self.words, name).detach().float()
        return layer


def _counts(class_names: Sequence[str]) -> torch.Tensor:
    """How often each word of them all is in each name; `_` parts words. Shape: -> (classes, words)."""
    counted = [Counter(words_of(name.replace("_", " "))) for name in class_names]
    seen: dict[frozenset, str] = {}
    for name, words in zip(class_names, counted, strict=True):
        if not words or (other := seen.setdefault(frozenset(words.items()), name)) is not name:
            why = f"has the same ones as {other!r}" if words else "has none"
            raise InputError(f"`head` words tells classes apart by the words of their names, and {name!r} {why}")
    places = sorted(set().union(*counted))
    if len(places) >= sum(map(len, counted)):
        raise InputError("`head` words has no use here: no word is in the names of two classes")
    return torch.tensor([[float(words[word]) for word in places] for words in counted])


def head_of_words(model: nn.Module, class_names: Sequence[str]) -> str:
    """Put a `WordHead` in the place of a classifier's last layer.

    Args:
        model: Changed in place.
        class_names: Of its classes.

    Returns:
        How many words there are, in a sentence.

    Raises:
        InputError: Its last layer is not one linear layer, or see `WordHead`.
    """
    last = model.get_classifier()
    if not isinstance(last, nn.Linear):
        raise InputError(f"`head` words needs one linear layer as the last, and {type(model).__name__} has another")
    name = next(name for name, module in model.named_modules() if module is last)
    head = WordHead(last, class_names)
    model.set_submodule(name, head)
    return f"A head of {head.words.out_features:,} words for {len(class_names):,} classes."


def with_plain_head(model: nn.Module) -> nn.Module:
    """The same classifier with an ordinary last layer: a copy, where it has a `WordHead`."""
    name = next((name for name, module in model.named_modules() if isinstance(module, WordHead)), None)
    if name is None:
        return model
    model = copy.deepcopy(model)
    model.set_submodule(name, model.get_submodule(name).plain().train(model.training))
    return model
