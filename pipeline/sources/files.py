"""Files that lie in folders: which there are, how large they are, and what they hold.

Links to folders are followed, no folder twice. What is hidden is passed over at every depth, and so is LITTER.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator

from pipeline.errors import BadRequest, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
DEVKIT = "ILSVRC2012_devkit_t12"
LITTER = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # folders that systems leave behind in others
MOST_BYTES = 256 << 20  # of one image
ALONE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}  # what is wrong with one file, and not with the disk


def is_image(name: str) -> bool:
    """Whether a file of this name, or path, holds an image; hidden ones (macOS adds `._x.jpg`) do not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith(".")


def is_litter(name: str) -> bool:
    """Whether a folder of this name belongs to no data set."""
    return name in LITTER or name.startswith(".") or DEVKIT in name


def folders_in(folder: str) -> list[str]:
    """Visible folders right below one, links to folders among them, sorted."""
    return sorted(e.name for e in _listed(folder) if not e.name.startswith(".") and _is_folder(e))


def images_in(folder: str) -> list[str]:
    """Names of the visible images right in a folder, sorted; a link that leads nowhere is one."""
    return sorted(e.name for e in _listed(folder) if is_image(e.name) and not _is_folder(e) and _is_file(e))


def files_below(folder: str, root: str) -> Iterator[str]:
    """Paths of the visible files at any depth of a folder of `root`, in a fixed order; a link that leads nowhere is one."""
    entered, waiting = set(), [folder]
    while waiting:
        at = waiting.pop()
        entries = _listed(at)
        found = os.stat(at)
        if (found.st_dev, found.st_ino) in entered or (at != root and os.path.islink(at) and _lies_in(root, at)):
            continue
        entered.add((found.st_dev, found.st_ino))
        inner = []
        for entry in sorted(entries, key=lambda e: e.name):
            if _is_folder(entry):
                if not is_litter(entry.name):
                    inner.append((entry.is_symlink(), entry.path))
            elif not entry.name.startswith(".") and _is_file(entry):
                yield entry.path
        waiting.extend(path for _, path in sorted(inner, reverse=True))  # links last


def holds_image(folder: str, root: str) -> bool:
    """Whether there is an image at any depth of a folder of `root`. No more is listed than it takes to find one."""
    try:
        with os.scandir(folder) as entries:
            found = any(is_image(e.name) and not _is_folder(e) and _is_file(e) for e in entries) and not (folder != root and os.path.islink(folder) and _lies_in(root, folder))
    except OSError as fault:
        raise _unlisted(folder, fault) from None
    return found or any(map(is_image, files_below(folder, root)))


def _lies_in(folder: str, link: str) -> bool:
    """Whether a link leads to a folder, or to one that it lies in: round in a circle."""
    return os.path.join(os.path.realpath(folder), "").startswith(os.path.join(os.path.realpath(link), ""))


def look(path: str) -> tuple[int, str | None]:
    """(bytes of a file, or -1; why it cannot be used, or None). Raises OSError for what is wrong with more than this file."""
    try:
        found = os.stat(path)
    except OSError as fault:
        if fault.errno not in ALONE:
            raise
        return -1, "a link that leads nowhere" if os.path.islink(path) else f"it cannot be read ({fault.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return -1, "not a regular file"
    return found.st_size, f"larger than {MOST_BYTES >> 20} MiB" if found.st_size > MOST_BYTES else None


def load(path: str) -> tuple[bytes, str | None]:
    """(what a file holds, why it cannot be read or None). Raises OSError for what is wrong with more than this file."""
    try:
        with open(path, "rb") as file:
            return file.read(), None
    except OSError as fault:
        if fault.errno not in ALONE:
            raise
        return b"", f"it cannot be read ({fault.strerror})"


def digest(parts: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _listed(folder: str) -> list[os.DirEntry]:
    """Raises BadRequest naming the folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as fault:
        raise _unlisted(folder, fault) from None


def _unlisted(folder: str, fault: OSError) -> BadRequest:
    return BadRequest(f"--source: {printable(folder)} cannot be listed ({printable(fault.strerror)}): make it readable, or move it elsewhere")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """A regular file, or a link that leads nowhere; no pipe or device, whose reading might never end."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
