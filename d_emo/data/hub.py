"""Data sets of the Hugging Face library ``datasets``: local or from the hub, on disk or as a stream."""

import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from d_emo.data.listing import find_splits, list_files, list_folders
from d_emo.data.names import number_classes, read_class_names
from d_emo.data.reading import AS_VIEWED, Reading, is_image
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError, RunError, imported, said
from d_emo.files import expand_home

_IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "category", "target")
"""What columns are called whose kind does not tell what they are."""
_LABEL_TYPES = ("bool", "string", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))


class HubImages(StoredImages):
    """An image column and a label column of a ``datasets`` data set, which lies memory-mapped on the disk.

    Args:
        source: Name on the hub, a local folder of data files, or a folder that ``save_to_disk`` wrote.
        image_size: Side in pixels of the centre crop.
        config, split: As ``load_dataset`` takes them. Default of split: "train", or the only one that was saved.
        image, label: Names of the columns. Default: the only image and the only class label column there are, else
            the only ones of the usual names.
        class_names: File of class names, see `read_class_names`. Default: those of the column.
        first_class: The number that becomes class 0.
        skip_corrupt, reading: See `StoredImages`.

    Raises:
        InputError: ``datasets`` is not installed; the data set, split or column cannot be had.
    """

    name = "hf"

    def __init__(
        self, source: str, image_size: int = 256, *, config: str | None = None, split: str | None = None,
        image: str | None = None, label: str | None = None, class_names: str | None = None, first_class: int = 0,
        skip_corrupt: bool = False, reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        names = self._open(source, config, split, image, label, streaming=False)
        labels = self.rows.select_columns([self.label_column])[:][self.label_column]
        if not len(labels):
            raise InputError(f"{source} has no rows in its split {self.split}; choose another split")
        kinds = {type(value) for value in labels}
        if type(None) in kinds or (kinds == {int} and min(labels) < 0):
            raise InputError(f"{source} has images without a class in its split {self.split}; choose another split")
        if kinds not in ({int}, {bool}, {str}):
            raise InputError(f"the column {self.label_column} of {source} holds no classes; add label=COLUMN after ?")
        self.sorted_names = kinds == {str} and class_names is None
        labels, names = number_classes(labels, source, names=names, class_names=class_names, first_class=first_class)
        super().__init__(labels, names, image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path | BytesIO:
        return self._file(self.rows[index], index)

    def origin(self, index: int) -> str:
        return f"row {index} of {self.data_set}"

    def _open(
        self, source: str, config: str | None, split: str | None, image: str | None, label: str | None, *,
        streaming: bool,
    ) -> list[str] | None:
        """Open the two columns, the images as the bytes of their files; the names of the classes, if it has some."""
        rows = _load(source, config, split, streaming=streaming)
        import datasets

        if rows.features is None:
            raise InputError(f"{source} does not tell its columns as a stream; leave streaming=true away")
        self.data_set, self.split = source, split or str(rows.split or "train")
        self.image, self.label_column = _columns(rows.features, source, image, label)
        two = rows.select_columns([self.image, self.label_column])
        try:
            self.rows = two.cast_column(self.image, datasets.Image(decode=False))
        except Exception:  # pyarrow's, of many kinds
            raise InputError(f"the column {self.image} of {source} holds no images; add image=COLUMN after ?") from None
        return getattr(rows.features[self.label_column], "names", None)

    def _file(self, row: dict[str, Any], index: int) -> Path | BytesIO:
        cell = row[self.image] or {}
        if not cell.get("bytes") and not cell.get("path"):
            raise InputError(f"{self.origin(index)} holds no image")
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])


class HubStream(HubImages):
    """The same as a stream, for going through it once and in order; an earlier image starts the stream anew.

    Args:
        length: Number of images, where the data set does not tell.

    The others as for `HubImages`; the label column must carry its class names, unless ``class_names`` does.

    Raises:
        InputError: The data set does not say what a stream needs: columns, class names, its length.
    """

    sequential = True

    def __init__(
        self, source: str, image_size: int = 256, *, config: str | None = None, split: str | None = None,
        image: str | None = None, label: str | None = None, length: int | None = None, class_names: str | None = None,
        first_class: int = 0, skip_corrupt: bool = False, reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        names = self._open(source, config, split, image, label, streaming=True)
        names, self.first_class = read_class_names(class_names, first_class) if class_names else names, first_class
        if names is None:
            raise InputError(
                f"the column {self.label_column} of {source} has no class names, which a stream needs; add "
                "class_names=FILE after ?"
            )
        length = length or getattr((self.rows.info.splits or {}).get(self.split), "num_examples", None)
        if not length:
            raise InputError(
                f"{source} does not tell how many images its split {self.split} has; add length=NUMBER after ?"
            )
        self._next, self._row, self._iterator = 0, {}, iter(self.rows)
        StoredImages.__init__(self, range(length), list(names), image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path | BytesIO:
        return self._file(self._at(index), index)

    def label(self, index: int) -> int:
        value = self._at(index)[self.label_column]
        label = value - self.first_class if isinstance(value, int) else -1
        if not 0 <= label < len(self.class_names):
            raise InputError(f"{self.origin(index)} has the class {value}, which is none of {len(self.class_names)}")
        return label

    def _at(self, index: int) -> dict[str, Any]:
        if index < self._next - 1:
            self._next, self._iterator = 0, iter(self.rows)
        while self._next <= index:
            try:
                self._row = next(self._iterator)
            except StopIteration:
                raise RunError(
                    f"the stream {self.data_set} ended after {self._next} of {len(self)} images; say so by "
                    f"length={self._next} after ?"
                ) from None
            except OSError as error:
                raise RunError(
                    f"the stream {self.data_set} broke off ({error}); re-run the same command to resume"
                ) from None
            self._next += 1
        return self._row


def _load(source: str, config: str | None, split: str | None, *, streaming: bool) -> Any:
    """One split, by whatever way the source asks for."""
    datasets = imported("datasets", "hf: data need the library datasets", "d-emo[datasets]")
    folder = expand_home(source)
    if folder.suffix == ".py" or (folder / f"{folder.resolve().name}.py").is_file():
        raise InputError(
            f"{source} is read by a loading script, and code that lies beside data is not run here; store it with "
            "save_to_disk, where you trust the script, and name that folder"
        )
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 would ask, or run what is on the hub
    source = str(folder) if folder.is_dir() else source
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(source)
            if not isinstance(saved, datasets.DatasetDict):
                saved = {str(saved.split or split or "train"): saved} if split in (None, "train") or saved.split else {}
            if split is None and len(saved) == 1:
                split = next(iter(saved))
            if (split or "train") not in saved:
                there = ", ".join(saved) or "no named splits"
                raise InputError(f"{source} has no split {split or 'train'}: it has {there}")
            rows = saved[split or "train"]
            return rows.to_iterable_dataset() if streaming else rows
        builder = datasets.load_dataset_builder(source, config)
        if folder.is_dir() and builder.name == "imagefolder":
            _check_all_are_read(folder, builder)
        elif builder.name == "imagefolder":
            _say_left_out(source, builder)
        if streaming:
            return builder.as_streaming_dataset(split=split or "train")
        builder.download_and_prepare()
        return builder.as_dataset(split=split or "train")
    except InputError:
        raise
    except Exception as error:  # of the library, of pyarrow, of the hub: many kinds
        if isinstance(error, IndexError):  # what the library says of a saved data set without rows
            raise InputError(f"{source} has no rows") from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"cannot open the data set {source}, split {split or 'train'}: {reason}") from None


def _check_all_are_read(folder: Path, builder: Any) -> None:
    """Refuse a folder of images of which the library reads a part.

    It takes names with the words train, test, ... in them for splits (``train_station``, ``cat/test_1.jpg``), then
    leaves out all others without a word, and does not follow links. Beside folders that are splits, others may lie.
    """
    folder, read = folder.resolve(), {path for paths in builder.config.data_files.values() for path in paths}
    images = [path for path in list_files(folder) if is_image(path)]
    left_out = [path for path in images if path.as_posix() not in read]
    if left_out and find_splits(list_folders(folder)) is None:
        raise InputError(
            f"of the {len(images)} images in {folder} the library datasets leaves out {len(left_out)}, such as "
            f"{left_out[0].relative_to(folder)}: it takes names with train, test, ... in them for splits, and follows "
            f"no links; write `data_dir` {folder} without hf: to have all"
        )


def _say_left_out(source: str, builder: Any) -> None:
    """Say the same of a repository on the hub, where its author may have meant it; its list of files is at hand."""
    with suppress(Exception):  # only a note
        from datasets.data_files import resolve_pattern

        read = {path for paths in builder.config.data_files.values() for path in paths}
        images = [path for path in resolve_pattern("**", builder.base_path) if is_image(path)]
        if left_out := [path for path in images if path not in read]:
            print(said(
                f"note: of the {len(images)} images in {source} the library datasets leaves out {len(left_out)}, such "
                f"as {left_out[0]}: it takes names with train, test, ... in them for splits; to have all, run "
                f"hf download {source} --repo-type dataset --local-dir FOLDER and write `data_dir` FOLDER"
            ), file=sys.stderr, flush=True)


def _columns(features: Any, source: str, image: str | None, label: str | None) -> tuple[str, str]:
    """The two columns that are asked for, or the only ones that can be meant: by their kinds, else by their names."""
    import datasets

    found = []
    for name, option, kind, types, usual in (
        (image, "image", datasets.Image, ("binary", "large_binary"), _IMAGE_NAMES),
        (label, "label", datasets.ClassLabel, _LABEL_TYPES, _LABEL_NAMES),
    ):
        candidates = [column for column, feature in features.items() if isinstance(feature, kind)]
        named = [column for column, feature in features.items()
                 if column.lower() in usual and getattr(feature, "dtype", None) in types]
        only = candidates or named
        name = name or (only[0] if len(only) == 1 else None)
        if name not in features:
            asked = f"no column {name}" if name else f"{len(candidates) or 'no'} columns of kind {kind.__name__}"
            raise InputError(f"{source} has {asked}; choose one by {option}=NAME after ?: {', '.join(features)}")
        found.append(name)
    return found[0], found[1]
