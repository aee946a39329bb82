"""What `--source` names: a file, a folder, or a pattern of files -> paths. What exists is taken as it is called, whatever characters are in its name."""

from __future__ import annotations

import os
import re
from glob import escape, glob, has_magic

from pipeline.errors import BadRequest, printable

ACCEPTED = (
    "tar shards (.tar, .tar.gz), Parquet files, CIFAR's python batches, or .npy and .npz arrays (a file, a folder, or a pattern such as 'val-{00..63}.tar'); "
    "a folder of class folders; ImageNet's flat validation folder with its devkit"
)


def paths_of(spec: str) -> tuple[list[str], str, str]:
    """(absolute paths that `spec` names, each once; the folder above them all; the pattern below that folder, "" if there is none).

    One path may be a folder. Raises BadRequest if nothing is there, or part of it is not.
    """
    if not spec.strip():
        raise BadRequest(f"--source is empty (a variable that is not set?); give {ACCEPTED}")
    whole = os.path.abspath(os.path.expanduser(spec))
    there = whole
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    pattern = whole[len(there) :].lstrip("/")
    if not pattern:
        return [whole], os.path.dirname(whole), ""
    paths, missing = [], []
    for one in expand_braces(pattern):
        path = os.path.join(there, one)
        found = sorted(glob(os.path.join(escape(there), one), recursive=True)) if has_magic(one) and not os.path.exists(path) else [path]
        files = [p for p in found if not os.path.isdir(p)] or found
        paths.extend(files)
        missing.extend([] if files and all(map(os.path.exists, files)) else [path])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadRequest(f"--source: there is no {printable(missing[0])}{more}; give {ACCEPTED}")
    paths = list(dict.fromkeys(map(os.path.abspath, paths)))
    if len(paths) > 1 and (folder := next(filter(os.path.isdir, paths), None)):
        raise BadRequest(f"--source: {printable(spec)} names {printable(folder)}, a folder, and more besides: name one folder, or the files in them, for example '{printable(spec.rstrip('/'))}/*.tar'")
    return paths, os.path.dirname(os.path.join(there, re.split(r"[*?\[{]", pattern, maxsplit=1)[0])), pattern


MOST_NAMES, MOST_BRACES = 1_000_000, 20  # that a pattern may stand for, and hold
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|-?\d+\.\.-?\d+)\}")


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{00..63}` as a shell expands them, leading zeros kept; other text as it is. Raises BadRequest for more than `MOST_NAMES` names."""
    shown, patterns = printable(pattern if len(pattern) <= 80 else pattern[:77] + "..."), [pattern]
    for _ in range(MOST_BRACES + 1):
        found = [_BRACES.search(p) for p in patterns]
        if not any(found):
            return patterns
        words = [_words(match.group(1)) if match else [None] for match in found]
        if sum(map(len, words)) > MOST_NAMES:
            raise BadRequest(f"--source: {shown} names more than {MOST_NAMES:,} files: is a number in its braces too long?")
        patterns = [p if word is None else p[: match.start()] + word + p[match.end() :] for p, match, some in zip(patterns, found, words) for word in some]
    raise BadRequest(f"--source: {shown} holds more than {MOST_BRACES} braces: name a folder, or use *")


def _words(body: str) -> list[str] | range:
    """What stands between two braces, as a list, or as a range where that is too long to be one."""
    if "," in body:
        return body.split(",")
    first, last = body.split("..")
    if max(len(first), len(last)) > 18:
        return range(MOST_NAMES + 1)
    low, high = int(first), int(last)
    if abs(high - low) >= MOST_NAMES:
        return range(MOST_NAMES + 1)
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if low <= high else -1
    return [str(n).zfill(width) for n in range(low, high + step, step)]
