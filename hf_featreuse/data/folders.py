"""Read local folders of images: find the splits and classes, and report what is left out.

A folder called train, validation or test (or a common synonym) that holds class folders is a split. The folder that
directly holds an image is its class. File names have no effect. Ambiguous folders are an error that names them.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from hf_featreuse.data.scanning import Found, below, scan
from hf_featreuse.errors import DataError
from hf_featreuse.text import did_you_mean, first_few, one_line, printable

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ENDINGS = ".jpg, .jpeg, .png, .webp, .bmp, .gif, .tif or .tiff"
_READERS = {
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".parquet": pyarrow.parquet.read_table,
}


def load_split_folders(folders: Mapping[str, str], wanted: Sequence[str], source: str) -> dict[str, datasets.Dataset]:
    """Load one folder of class folders for each split.

    Args:
        folders (`Mapping[str, str]`): the folder of each split.
        wanted (`Sequence[str]`): the splits that will be used; only these are required to fit the training classes.
        source (`str`): what messages call the folders.

    Raises:
        DataError: the classes cannot be read off the folders.
    """
    return _load({split: (scan(folder), "") for split, folder in folders.items()}, wanted, source)


def load_folder(found: Found, wanted: Sequence[str], source: str) -> dict[str, datasets.Dataset]:
    """Load a folder that holds class folders, or split folders that hold class folders. See `load_split_folders`."""
    return _load({split: (found, folder) for split, folder in _split_folders(found).items()}, wanted, source)


def has_class_folders(found: Found) -> bool:
    """Return whether images lie in two folders or more, or metadata says what they are."""
    return len(found.images.keys() - {""}) > 1 or bool(found.metadata)


def _split_folders(found: Found) -> dict[str, str]:
    """The folder of each split; the whole, as the training split, if no folder in it is a split."""
    holders = {*found.images, *found.metadata}
    base = ""
    while True:
        inner = sorted({_child(holder, base) for holder in holders if below(holder, base) and holder != base})
        parts: dict[str, list[str]] = {}
        for path in inner:
            split = _split_of(path)
            if split is not None and _is_split(found, path):
                parts.setdefault(split, []).append(path)
        rest = [path for path in inner if path not in set().union(*parts.values())]
        if parts and ("train" in parts or not rest):
            break
        if base in holders or len(inner) != 1 or inner[0] in holders:
            return {"train": base}
        base = inner[0]
    for split, paths in parts.items():
        if len(paths) > 1:
            raise DataError(
                f"The folders {_listed(found, paths)} could each be the split '{split}'. Move one of them away."
            )
    for path in _children(found.folders, base):
        split = _split_of(path)
        if split in ("train", "validation") and path not in parts.get(split, ()):
            raise DataError(
                f"The folder {_listed(found, [path])} holds no class folders with images. Give it one folder of "
                "images for each class, or move it away."
            )
        if split == "test" and path not in inner:
            rest.append(path)
    loose = [*found.images.get(base, ()), *filter(None, [found.metadata.get(base)])]
    found.left_out.add("next to the folders of the splits", *rest, *loose)
    return {split: paths[0] for split, paths in parts.items()}


def _split_of(path: str) -> str | None:
    """The split whose word the name of a folder is."""
    name = os.path.basename(path).lower()
    return next((split for split, words in SPLIT_WORDS.items() if name in words), None)


def _is_split(found: Found, path: str) -> bool:
    """Return whether a folder holds class folders or metadata; one that holds only images is a class."""
    return path in found.metadata or any(below(folder, path) for folder in found.images)


def _child(path: str, base: str) -> str:
    """The folder directly in `base` in which `path` lies, or that it is."""
    start = len(base) + len(os.sep) if base else 0
    return path[:start] + path[start:].split(os.sep, 1)[0]


def _children(folders: Iterable[str], base: str) -> list[str]:
    """The folders that lie directly in `base`."""
    return sorted(path for path in folders if path != base and below(path, base) and _child(path, base) == path)


def _listed(found: Found, paths: Sequence[str]) -> str:
    """Full names of some folders for a message."""
    return first_few([f"`{printable(os.path.join(found.root, path))}`" for path in paths])


def _load(parts: Mapping[str, tuple[Found, str]], wanted: Sequence[str], source: str) -> dict[str, datasets.Dataset]:
    """Load each split from its folder, with the class ids of the training split."""
    described = {split: _has_metadata(found, base) for split, (found, base) in parts.items()}
    classes = {split: _class_folders(found, base) for split, (found, base) in parts.items() if not described[split]}
    names = _class_names(classes, wanted, source)
    loaded = {
        split: _described(found, base) if described[split] else _labeled(found, classes[split], names)
        for split, (found, base) in parts.items()
    }
    for found in {id(found): found for found, _ in parts.values()}.values():
        found.left_out.warn(found.root)
    return loaded


def _class_folders(found: Found, base: str) -> dict[str, str]:
    """The folder of each class: those that directly hold images, all at the same depth."""
    where = _listed(found, [base]) if base else f"`{printable(found.root)}`"
    folders = sorted(folder for folder in found.images if below(folder, base) and folder != base)
    loose = found.images.get(base, [])
    if not folders:
        others = [path for path in found.others if below(path, base)]
        what = (
            f"The images of {where}, such as {printable(os.path.basename(min(loose)))}, lie in no class folder."
            if loose
            else f"{where} holds no images: no file below it ends in {_ENDINGS}"
            + (f" ({len(others)} other files, such as {printable(min(others))})." if others else ".")
        )
        raise DataError(
            f"{what} Put the images of each class into a folder named after the class. {_why(found)}".rstrip()
        )
    if all(map(_split_of, folders)):
        raise DataError(
            f"The images of {_listed(found, folders)} lie directly in folders of splits, so that they have no class. "
            "Put the images of each class into a folder named after the class, inside the folder of the split."
        )
    found.left_out.add("in no class folder", *loose)
    depths = {folder.count(os.sep): folder for folder in reversed(folders)}
    if len(depths) > 1:
        raise DataError(
            f"The folders {_listed(found, list(depths.values())[:2])} hold images at different depths, so that it is "
            "unclear which folders are classes. Put all images of a class directly into one folder."
        )
    classes: dict[str, str] = {}
    for folder in folders:
        # Systems write accents in two ways; to a reader these are one name.
        name = unicodedata.normalize("NFC", os.path.basename(folder))
        if name in classes:
            raise DataError(
                f"The folders {_listed(found, [classes[name], folder])} have the same name, so that it is unclear "
                "which folders are classes. Put all images of a class into one folder; if these are folders of "
                "splits, pass them by train_dir and validation_dir (--train_dir, --validation_dir)."
            )
        classes[name] = folder
    if _child(folders[0], base) != folders[0]:
        shown = first_few([printable(folder) for folder in folders])
        logger.warning("The classes of %s are its innermost folders: %s.", printable(found.root), shown)
    found.left_out.add("without images", *_without_images(found, base))
    inside = [path for path in found.others if below(path, base) and os.path.dirname(path) != base]
    found.left_out.add(f"that do not end in {_ENDINGS}", *inside)
    return classes


def _without_images(found: Found, base: str) -> list[str]:
    """The folders below `base` that hold no image at any depth, without the folders in them."""
    used = {base}
    for folder in found.images:
        while folder not in used and below(folder, base):
            used.add(folder)
            folder = os.path.dirname(folder)
    return [path for path in found.folders if below(path, base) and path not in used and os.path.dirname(path) in used]


def _why(found: Found) -> str:
    """Return what was left out, as a sentence for an error."""
    return f"Left out were {found.left_out}." if str(found.left_out) else ""


def _class_names(classes: Mapping[str, Mapping[str, str]], wanted: Sequence[str], source: str) -> list[str]:
    """Names of all classes, in the order of their ids: those of the training split if it is used."""
    if "train" not in classes or "train" not in wanted:
        return sorted({name for split in {"train", *wanted} for name in classes.get(split, ())})
    names = sorted(classes["train"])
    if len(names) == 1:
        raise DataError(
            f"All training images of {source} lie in one class folder, {printable(names[0])!r}. A classifier needs "
            "two classes or more: add a folder of images for each further class."
        )
    for split in wanted:
        extra = sorted(set(classes.get(split, ())) - set(names))
        if extra:
            close = printable(did_you_mean(extra[0], names))
            raise DataError(
                f"Split '{split}' of {source} has the class folder {printable(extra[0])!r}, and the training "
                f"split has none of this name, so the class would never be trained.{close} Rename it, move it "
                "away, or add training images of the class."
            )
    return names


def _labeled(found: Found, classes: Mapping[str, str], names: Sequence[str]) -> datasets.Dataset:
    """A data set of paths and class ids, in the order of the paths."""
    ids = {name: index for index, name in enumerate(names)}
    rows = sorted(
        (os.path.join(found.root, path), ids[name])
        for name, folder in classes.items()
        if name in ids
        for path in found.images[folder]
    )
    features = {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return table.cast_column("image", datasets.Image())  # faster than to encode each path


def _has_metadata(found: Found, base: str) -> bool:
    return any(folder == base or below(folder, base) for folder in found.metadata)


def _described(found: Found, base: str) -> datasets.Dataset:
    """A data set of the rows of metadata files, whose column `file_name` names the images."""
    tables, kinds, named = [], {}, set()
    for folder, path in sorted(found.metadata.items()):
        if folder == base or below(folder, base):
            table, more_kinds = _read_metadata(found, folder, path, named)
            tables.append(table)
            kinds |= more_kinds
    images = [
        path for folder, paths in found.images.items() if folder == base or below(folder, base) for path in paths
    ]
    found.left_out.add("not named in a metadata file", *(path for path in images if path not in named))
    try:
        joined = datasets.Dataset(pa.concat_tables(tables, promote_options="default"))
        for column, kind in kinds.items():
            joined = joined.cast_column(column, kind)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"The metadata files of `{printable(found.root)}` cannot be combined: {one_line(error)} Give all the "
            "same columns."
        ) from error
    return joined


def _read_metadata(
    found: Found, folder: str, path: str, named: set[str]
) -> tuple[pa.Table, dict[str, datasets.Image | datasets.ClassLabel]]:
    """Return the table of a metadata file, with full paths of images, and the types of its image and label columns."""
    where = printable(os.path.join(found.root, path))
    try:
        with open(os.path.join(found.root, path), "rb") as file:
            table = _READERS[os.path.splitext(path)[1]](file)
        features = datasets.Features.from_arrow_schema(table.schema)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`{where}` cannot be read: {one_line(error)} Repair it, or move it away to take class folders as classes."
        ) from error
    if not table.num_rows:
        raise DataError(
            f"`{where}` has no rows. Add one for each image, or move it away to take class folders as classes."
        )
    names = table.column_names
    images = {c: c[: -len("_file_name")] or "image" for c in names if c == "file_name" or c.endswith("_file_name")}
    columns = [images.get(column, column) for column in names]
    if not images or len(set(columns)) < len(columns):
        raise DataError(
            f"`{where}` has the columns {printable(str(names))}. One column, `file_name`, must give the path of each "
            "image, relative to the folder of this file, and no name may occur twice; `file_name` becomes `image`."
        )
    kinds: dict[str, datasets.Image | datasets.ClassLabel] = dict.fromkeys(images.values(), datasets.Image())
    kinds |= {column: kind for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for column in images:
        paths = [_inside(found, folder, name, where) for name in table.column(column).to_pylist()]
        named.update(filter(None, paths))
        full = pa.array([path and os.path.join(found.root, path) for path in paths], pa.string())
        table = table.set_column(names.index(column), column, full)
    return table.rename_columns(columns).replace_schema_metadata(None), kinds


def _inside(found: Found, folder: str, name: object, where: str) -> str | None:
    """Return the path, relative to the root, of an image that a metadata file names; it must be in the same folder."""
    if name is None:
        return None
    path = os.path.normpath(str(name))
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir or not isinstance(name, str):
        raise DataError(
            f"`{where}` names {printable(repr(name))}, which is not a path inside its folder. Write paths relative to "
            "the folder of this file, and keep the images in it."
        )
    return os.path.join(folder, path)
