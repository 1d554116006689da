"""Data sets of the Hugging Face library ``datasets``: local or from the hub, on disk or as a stream."""

from io import BytesIO
from pathlib import Path
from typing import Any

from d_emo.data.reading import AS_VIEWED, Reading
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError, RunError


class HubImages(StoredImages):
    """An image column and a label column of a ``datasets`` data set, which lies memory-mapped on the disk.

    Args:
        source: Name on the hub, a local folder of data files, or a folder that ``save_to_disk`` wrote.
        image_size: Side in pixels of the centre crop.
        config, split: As ``load_dataset`` takes them; split "train" by default.
        image, label: Names of the columns. Default: the only image and the only class label column there are.
        skip_corrupt, reading: See `StoredImages`.

    Raises:
        InputError: ``datasets`` is not installed; the data set, split or column cannot be had.
    """

    name = "hf"

    def __init__(
        self, source: str, image_size: int = 256, *, config: str | None = None, split: str = "train",
        image: str | None = None, label: str | None = None, skip_corrupt: bool = False, reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        names = self._open(source, config, split, image, label, streaming=False)
        labels = self.rows.select_columns([self.label_column])[:][self.label_column]
        if names is None and isinstance(labels[0], str):
            names = sorted(set(labels))
            number_of = {name: number for number, name in enumerate(names)}
            labels = [number_of[name] for name in labels]
        elif not all(isinstance(value, int) for value in labels):
            raise InputError(f"the column {self.label_column} of {source} holds no classes; add label=COLUMN after ?")
        if min(labels) < 0:
            raise InputError(f"{source} has images without a class in its split {split}; choose another split")
        names = names or [str(number) for number in range(max(labels) + 1)]
        super().__init__(labels, list(names), image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path | BytesIO:
        return self._file(self.rows[index])

    def origin(self, index: int) -> str:
        return f"row {index} of {self.source}"

    def _open(
        self, source: str, config: str | None, split: str, image: str | None, label: str | None, *, streaming: bool
    ) -> list[str] | None:
        """Open the two columns, the images as the bytes of their files; the names of the classes, if it has some."""
        rows = _load(source, config, split, streaming=streaming)
        import datasets

        if rows.features is None:
            raise InputError(f"{source} does not tell its columns as a stream; leave streaming=true away")
        self.source, (self.image, self.label_column) = source, _columns(rows.features, source, image, label)
        two = rows.select_columns([self.image, self.label_column])
        self.rows = two.cast_column(self.image, datasets.Image(decode=False))
        return getattr(rows.features[self.label_column], "names", None)

    def _file(self, row: dict[str, Any]) -> Path | BytesIO:
        cell = row[self.image]
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])


class HubStream(HubImages):
    """The same as a stream, for going through it once and in order; an earlier image starts the stream anew.

    Args:
        length: Number of images, where the data set does not tell.

    The others as for `HubImages`; the label column must carry its class names.

    Raises:
        InputError: The data set does not say what a stream needs: columns, class names, its length.
    """

    sequential = True

    def __init__(
        self, source: str, image_size: int = 256, *, config: str | None = None, split: str = "train",
        image: str | None = None, label: str | None = None, length: int | None = None, skip_corrupt: bool = False,
        reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        names = self._open(source, config, split, image, label, streaming=True)
        if names is None:
            raise InputError(f"the column {self.label_column} of {source} has no class names, which a stream needs")
        length = length or getattr((self.rows.info.splits or {}).get(split), "num_examples", None)
        if not length:
            raise InputError(f"{source} does not tell how many images its split {split} has; add length=NUMBER after ?")
        self._next, self._row, self._iterator = 0, {}, iter(self.rows)
        StoredImages.__init__(self, range(length), list(names), image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path | BytesIO:
        return self._file(self._at(index))

    def label(self, index: int) -> int:
        return int(self._at(index)[self.label_column])

    def _at(self, index: int) -> dict[str, Any]:
        if index < self._next - 1:
            self._next, self._iterator = 0, iter(self.rows)
        while self._next <= index:
            try:
                self._row = next(self._iterator)
            except StopIteration:
                raise RunError(
                    f"the stream {self.source} ended after {self._next} of {len(self)} images; say so by "
                    f"length={self._next} after ?"
                ) from None
            except OSError as error:
                raise RunError(
                    f"the stream {self.source} broke off ({error}); re-run the same command to resume"
                ) from None
            self._next += 1
        return self._row


def _load(source: str, config: str | None, split: str, *, streaming: bool) -> Any:
    """One split, by whatever way the source asks for."""
    try:
        import datasets
    except ImportError:
        raise InputError("hf: data need the library datasets; pip install 'd-emo[datasets]'") from None
    folder = Path(source).expanduser()
    source = str(folder) if folder.is_dir() else source
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(source)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return rows.to_iterable_dataset() if streaming else rows
        return datasets.load_dataset(source, config, split=split, streaming=streaming)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"cannot open the data set {source}, split {split}: {reason}") from None


def _columns(features: Any, source: str, image: str | None, label: str | None) -> tuple[str, str]:
    """The two columns that are asked for, or the only ones that can be meant."""
    import datasets

    found = []
    for name, option, kind in ((image, "image", datasets.Image), (label, "label", datasets.ClassLabel)):
        candidates = [column for column, feature in features.items() if isinstance(feature, kind)]
        name = name or (candidates[0] if len(candidates) == 1 else None)
        if name not in features:
            asked = f"no column {name}" if name else f"{len(candidates) or 'no'} columns of kind {kind.__name__}"
            raise InputError(f"{source} has {asked}; choose one by {option}=NAME after ?: {', '.join(features)}")
        found.append(name)
    return found[0], found[1]
