"""Which videos a data set has, and of which class each is: folders of classes, and Kinetics' lists."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from d_emo.config import folder_of
from d_emo.data.folder import class_files
from d_emo.data.listing import find_splits, list_files, list_folders
from d_emo.data.names import in_class_order, number_classes
from d_emo.data.reading import describe_left_out
from d_emo.data.videos import VIDEOS, is_video
from d_emo.errors import InputError

CLASSES = "classes.txt"
OFFICIAL = {"label", "youtube_id", "time_start", "time_end"}
"""Columns of the lists that Kinetics' authors publish."""


class VideoList(NamedTuple):
    """Videos, the class of each, and a sentence on what was left out."""

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    left_out: str = ""


def split_videos(data_dir: str) -> tuple[str, str | None]:
    """What ``data_dir`` holds to train on and to measure on, or itself and None.

    A folder may hold the lists train.csv and val.csv, or folders train and val of class folders.
    """
    root = folder_of(data_dir)
    if root.is_dir() and (root / "train.csv").is_file():
        return str(root / "train.csv"), str(root / "val.csv") if (root / "val.csv").is_file() else None
    if root.is_dir() and not data_dir.startswith("folder:"):
        train, held_out = find_splits(list_folders(root)) or ([], [])
        if len(train) == 1 and held_out and held_out[0].name.lower().startswith("val"):
            return str(train[0]), str(held_out[0])
    return data_dir, None


def list_videos(source: str, class_names: Sequence[str] | None = None) -> VideoList:
    """The videos of a folder with a sub-folder for each class, or of a list.

    A list is a CSV file of lines "path label" or "path,label", paths as seen from its folder, as pytorchvideo,
    SlowFast and MMAction2 read them; labels are numbers, which classes.txt beside it may name, or names. Or it is one
    that Kinetics' authors publish: videos are then looked for below its folder, called ID_START_END (seconds in six
    digits) or ID; those that are not there are left out.

    Args:
        source: The folder or list.
        class_names: Those that are known already. Default: as the data have them.

    Raises:
        InputError: There are no videos; a line that is not understood; a class that is not among ``class_names``.
    """
    if folder_of(source).suffix.lower() in (".csv", ".txt"):
        found = _read_list(folder_of(source))
    else:
        files, names, others = class_files(source, is_wanted=is_video, none_wanted=_no_videos)
        known = in_class_order(set(names))
        found = VideoList(files, [known.index(name) for name in names], known, describe_left_out(others))
    if class_names is None:
        return found
    ids = {name: label for label, name in enumerate(class_names)}
    names = [found.class_names[label] for label in found.labels]
    if odd := sorted(set(names) - ids.keys()):
        raise InputError(f"the class {odd[0]} of {source} is not one that is trained on")
    return found._replace(labels=[ids[name] for name in names], class_names=list(class_names))


def _read_list(path: Path) -> VideoList:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the list of videos {path} ({error})") from None
    if not lines:
        raise InputError(f"the list of videos {path} is empty")
    columns = [each.strip() for each in next(csv.reader(lines[:1]))]
    if set(columns) >= OFFICIAL:
        return _find_published(path, list(csv.DictReader(lines[1:], fieldnames=columns)))
    by_comma = all("," in line for line in lines)
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        name, label = (*(part.strip(' "') for part in line.rsplit("," if by_comma else None, 1)), "")[:2]
        if number == 1 and label.lower() == "label":
            continue
        if not name or not label:
            raise InputError(f"line {number} of {path} is {line[:80]!r}; it should be a video's path and its label")
        files.append(path.parent / name)
        labels.append(label)
    if not files:
        raise InputError(f"the list of videos {path} has only its first line, the names of columns")
    return VideoList(files, *_numbered(labels, path))


def _numbered(labels: list[str], path: Path) -> tuple[list[int], list[str]]:
    """Class ids of the labels of a list, and the names of the classes."""
    numbers = all(re.fullmatch("[0-9]+", label) for label in labels)
    names = path.parent / CLASSES
    ids, known = number_classes(
        [int(label) for label in labels] if numbers else labels, str(path),
        class_names=str(names) if names.is_file() else None,
    )  # fmt: skip
    return ids.tolist(), known


def _find_published(path: Path, rows: list[dict[str, str]]) -> VideoList:
    """The videos of a published list that are there."""
    there = {file.stem: file for file in list_files(path.parent) if is_video(file)}
    files, labels = [], []
    for number, row in enumerate(rows, 2):
        try:
            name, label = row["youtube_id"].strip(), row["label"].strip()
            whole = f"{name}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (AttributeError, ValueError, OverflowError, TypeError):
            raise InputError(f"line {number} of {path} lacks a label, an id or a time") from None
        if file := there.get(whole) or there.get(name):
            files.append(file)
            labels.append(label)
    missing = len(rows) - len(files)
    if not files:
        raise InputError(
            f"none of the {len(rows):,} videos of {path} is below its folder; they are called ID_START_END there, such "
            f"as {whole + '.mp4' if rows else 'abcdefghijk_000010_000020.mp4'}"
        )
    if not all(labels):
        raise InputError(f"{path} has videos without a label")
    left_out = f"{missing:,} of the {len(rows):,} videos of {path} are not there and left out" if missing else ""
    return VideoList(files, *_numbered(labels, path), left_out)


def _no_videos(where: str, files: list[Path]) -> InputError:
    wanted = f"{where} holds no videos ({', '.join(sorted(VIDEOS))})"
    return InputError("; ".join(filter(None, [wanted, describe_left_out(files)])))
