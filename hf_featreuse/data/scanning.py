"""List the content of a local folder, and record what is left out and why.

Folders are walked instead of matched by patterns, in which brackets and `::` have another meaning, and files that do
not match are dropped silently.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hf_featreuse.errors import DataError
from hf_featreuse.text import first_few, printable

logger = logging.getLogger(__name__)

# Endings of the formats that `decode_image` reads.
IMAGE_ENDINGS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Folders that systems and tools make; copies and thumbnails in them are not data.
_TOOL_FOLDERS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", ".git", ".cache", ".ipynb_checkpoints", ".Trash", ".thumbnails")
)
_TOOL_FILES = frozenset(("Thumbs.db", "desktop.ini", ".DS_Store"))
# How often a folder is read through links. Folders that all link to each other have more paths than can be walked.
_MOST_LINKS = 8


@dataclass
class LeftOut:
    """Files and folders that are not used, by reason."""

    by_reason: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, *paths: str) -> None:
        self.by_reason.setdefault(reason, []).extend(paths)

    def warn(self, root: str) -> None:
        """Log once what is left out of a folder, if anything is."""
        if text := str(self):
            logger.warning("Left out of %s: %s.", printable(root), text)

    def __str__(self) -> str:
        """One clause for each reason, with the first names."""
        return "; ".join(
            f"{len(paths)} {reason}: {first_few([printable(path) for path in sorted(paths)])}"
            for reason, paths in self.by_reason.items()
            if paths
        )


@dataclass
class Found:
    """What a folder holds. Every path is relative to the folder; `""` is the folder itself."""

    root: str
    images: dict[str, list[str]] = field(default_factory=dict)  # paths of images, by the folder they lie in
    metadata: dict[str, str] = field(default_factory=dict)  # path of the metadata file, by its folder
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that are neither
    left_out: LeftOut = field(default_factory=LeftOut)


def scan(root: str) -> Found:
    """Walk a folder recursively; follow links, except those to a folder above.

    Raises:
        DataError: a folder cannot be read, or its path is not UTF-8.
    """
    found = Found(os.path.join(os.getcwd(), root))
    if not _is_unicode(root):
        raise DataError(f"The path of the folder `{printable(root)}` is not UTF-8 and cannot be stored. Rename it.")
    folders: list[tuple[str, bool, tuple[tuple[int, int], ...]]] = [("", False, ())]
    linked = Counter()
    while folders:
        folder, is_linked, above = folders.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"The folder `{printable(os.path.join(root, folder))}` cannot be read: {error.strerror}. Make it "
                "readable, or move it out of the data."
            ) from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            found.left_out.add("linked to a folder above", folder)
        elif is_linked and linked[identity] == _MOST_LINKS:
            found.left_out.add(f"linked more than {_MOST_LINKS} times", folder)
        else:
            linked[identity] += is_linked
            found.folders.append(folder)
            inner = _sort_entries(found, folder, entries)
            folders += [(path, is_linked or is_link, (*above, identity)) for path, is_link in inner]
    return found


def _sort_entries(found: Found, folder: str, entries: list[os.DirEntry[str]]) -> Iterator[tuple[str, bool]]:
    """Sort the files of a folder by kind; yield its subfolders, and whether each is a link."""
    for entry in entries:
        name, path = entry.name, os.path.join(folder, entry.name)
        ending = os.path.splitext(name)[1].lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if name in (_TOOL_FOLDERS if is_folder else _TOOL_FILES):
            continue
        if name.startswith("."):
            if is_folder or ending in IMAGE_ENDINGS:
                found.left_out.add("hidden", path)
        elif not name.isascii() and not _is_unicode(name):
            found.left_out.add("with a name that is not UTF-8 (rename them)", path)
        elif is_folder:
            yield path, entry.is_symlink()
        elif not is_file:
            found.left_out.add("not a regular file, or a link to nothing", path)
        elif ending in IMAGE_ENDINGS:
            found.images.setdefault(folder, []).append(path)
        elif name in METADATA_FILES:
            if folder in found.metadata:
                first, second = sorted((found.metadata[folder], path))
                raise DataError(
                    f"The folder `{printable(os.path.join(found.root, folder))}` holds both {first} and {second}. "
                    "Keep one of them."
                )
            found.metadata[folder] = path
        else:
            found.others.append(path)


def _is_unicode(name: str) -> bool:
    """Return whether a name can be stored: names of other encodings come with surrogates from the system."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def below(path: str, folder: str) -> bool:
    """Return whether a relative path lies in a folder, at any depth."""
    return not folder or path.startswith(folder + os.sep)
