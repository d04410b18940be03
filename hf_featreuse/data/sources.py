"""Open what `dataset_name` names: a data set on the Hub, one that was saved, or a local folder of images or tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import yaml
from datasets.config import DOWNLOADED_DATASETS_PATH, HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from hf_featreuse.data.columns import capitalized
from hf_featreuse.data.folders import has_class_folders, load_folder, load_split_folders
from hf_featreuse.data.scanning import Found, LeftOut, scan
from hf_featreuse.errors import DataError, FeatureReuseError
from hf_featreuse.text import printable

logger = logging.getLogger(__name__)

_CARDS = ("README.md", ".huggingface.yaml")
_SAVED = ("dataset_dict.json", "state.json")
# What `datasets` takes for something other than a character of a path.
_PATTERNS = ("*", "?", "[", "]", "::", "://")
_TABLES = frozenset((".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar"))
_ARCHIVES = frozenset((".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"))


def load_source(
    dataset_name: str | None,
    config_name: str | None,
    train_dir: str | None,
    validation_dir: str | None,
    wanted: Sequence[str],
    **options: Any,
) -> tuple[dict[str, datasets.Dataset], str, list[str] | None]:
    """Load every split of a named data set or of image folders.

    Returns:
        `tuple[dict[str, Dataset], str, list[str] | None]`: the splits, a name for messages, and the folders in which
            files must lie that rows name by their path, or `None` if the paths are ours.
    """
    folders = {"train": train_dir, "validation": validation_dir}
    folders = {split: folder for split, folder in folders.items() if folder is not None}
    if dataset_name is None:
        return load_split_folders(folders, wanted, f"folders {folders}"), f"folders {folders}", None
    source = f"data set '{printable(dataset_name)}'"
    if not os.path.isdir(dataset_name):
        loaded = load_with_datasets(lambda: datasets.load_dataset(dataset_name, config_name, **options), source)
        cache = options.get("cache_dir") or HF_DATASETS_CACHE
        return loaded, source, [str(cache), str(DOWNLOADED_DATASETS_PATH), huggingface_hub.constants.HF_HUB_CACHE]
    if any(os.path.isfile(os.path.join(dataset_name, file)) for file in _SAVED):
        return load_with_datasets(lambda: datasets.load_from_disk(dataset_name), source), source, [dataset_name]
    found = scan(dataset_name)
    tables = [path for path in found.others if path.endswith((".parquet", ".arrow"))]
    if has_class_folders(found) or (found.images and not tables):
        if config_name is not None:
            raise DataError(
                f"dataset_config_name={config_name!r} (--dataset_config_name) chooses a configuration, and {source} "
                "is a folder of images, which has none. Leave it out, or name the folder of that configuration."
            )
        return load_folder(found, wanted, source), source, None
    return _load_tables(dataset_name, config_name, found, source, options), source, [dataset_name]


def load_with_datasets(load: Any, source: str) -> dict[str, datasets.Dataset]:
    """Call a function that loads a data set, and turn its errors into `DataError`."""
    try:
        loaded = load()
    except FeatureReuseError:
        raise
    except Exception as error:  # readers raise almost anything on broken files
        said = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = next(iter(str(said).splitlines()), "") or type(said).__name__
        # What datasets says of a split without rows, from files and from `save_to_disk`.
        empty = " Is a split empty?" if "no data" in reason or isinstance(error, IndexError) else ""
        raise DataError(f"Cannot load {source}: {printable(reason)}{empty}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    return {str(split): dataset for split, dataset in loaded.items()}


def _load_tables(
    folder: str, config_name: str | None, found: Found, source: str, options: dict[str, Any]
) -> dict[str, datasets.Dataset]:
    """Load a folder of Parquet, Arrow or other tables that `datasets` reads, and warn of unused files."""
    root = os.path.realpath(folder)
    if any(mark in root or mark in folder for mark in _PATTERNS):
        raise DataError(
            f"{capitalized(source)} has one of {' '.join(_PATTERNS)} in its path, which `datasets` takes for a "
            "pattern or a URL. Rename the folder or its parents."
        )
    endings = {path: os.path.splitext(path)[1].lower() for path in found.others}
    if not _TABLES & set(endings.values()):
        archives = sorted(path for path, ending in endings.items() if ending in _ARCHIVES)
        packed = f" Unpack its archives, such as {printable(archives[0])}." if archives else ""
        left_out = f" Left out were {found.left_out}." if str(found.left_out) else ""
        raise DataError(
            f"{capitalized(source)} holds no images and no Parquet or Arrow files.{packed} Put one folder of images "
            f"for each class into it.{left_out}"
        )
    _check_card(folder, source)

    def load() -> Any:
        builder = datasets.load_dataset_builder(folder, config_name, **options)
        used = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
        check_inside(used, [root], source)
        kinds = {os.path.splitext(file)[1] for file in used}
        relative = {os.path.relpath(file, root) for file in used}
        left = [path for path in found.others if os.path.splitext(path)[1] in kinds and path not in relative]
        builder.download_and_prepare()
        loaded = builder.as_dataset()
        left_out = LeftOut(dict(found.left_out.by_reason))
        left_out.add("that `datasets` assigns to no split", *left)
        left_out.add("next to the tables", *(path for paths in found.images.values() for path in paths))
        left_out.warn(folder)
        return loaded

    return load_with_datasets(load, source)


def _check_card(folder: str, source: str) -> None:
    """Refuse a data card whose configurations name files outside the folder, before any of them is looked up."""
    for name in _CARDS:
        path = Path(folder, name)
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if name.endswith(".md"):
            text = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
        try:
            card = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DataError(
                f"`{printable(str(path))}` begins with a header that is not valid YAML. Repair or remove it."
            ) from error
        configs = card.get("configs") if isinstance(card, dict) else None
        for value in _strings(configs):
            if "://" in value or "::" in value or os.path.isabs(value) or os.pardir in Path(value).parts:
                raise DataError(
                    f"`{printable(str(path))}` of {source} names {printable(repr(value))} under `configs`, which is "
                    "not inside the folder. Only files of the folder itself are read: remove the entry."
                )


def _strings(value: Any) -> list[str]:
    """All strings in a value of YAML, which may hold itself."""
    texts, seen, left = [], set(), [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (dict, list)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return texts


def check_stored_paths(images: datasets.Dataset, folders: Sequence[str] | None, source: str) -> None:
    """Refuse rows that hold the path of a file outside some folders instead of an image: it may be any file here.

    Raises:
        DataError: a row names such a file.
    """
    if folders is None:
        return
    column: Any = images.data.column(0)
    for chunk in column.chunks:
        paths = chunk.field("path").filter(chunk.field("bytes").is_null()).drop_null().unique()
        check_inside(paths.to_pylist(), [os.path.realpath(folder) for folder in folders], source)


def check_inside(paths: Iterable[str], roots: Sequence[str], source: str) -> None:
    """Refuse the first path that is not a file below one of the roots."""
    known: dict[str, bool] = {}
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in known:
            real = os.path.realpath(folder)
            known[folder] = any(os.path.commonpath([real, root]) == root for root in roots)
        if "://" in path or not known[folder]:
            raise DataError(
                f"{capitalized(source)} names the file {printable(repr(path))}, which is outside it. "
                "Only files inside the data set are read. Store the images in its rows, or copy them into its folder."
            )
