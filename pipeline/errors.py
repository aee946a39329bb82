"""What goes wrong, as the user is told it: one exception a kind of ending, and the making of foreign text safe to show."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class Fault(Exception):
    """An ending that is explained in one to three lines, never by a traceback. `exit_code` is the command's."""

    exit_code = 1


class BadRequest(Fault):
    """The request is wrong and nothing was done. The message names the argument or file, and the remedy."""

    exit_code = 2


class Stopped(Fault):
    """The job ended before its end; what is committed stays, and the same command resumes."""

    exit_code = 4


class Broken(Stopped):
    """The GPU failed under this process, which cannot use it again; another process may."""

    @classmethod
    def by(cls, fault: Exception) -> Broken:
        return cls(f"the GPU failed ({printable(str(fault).strip().splitlines()[0])[:200]})\nthe same command goes on, by another process")


def is_device(fault: BaseException) -> bool:
    """Whether it says that a GPU failed under its process: after that every call fails, whatever it is given. torch has no exception of its own for all of these."""
    return isinstance(fault, RuntimeError) and any(text in str(fault) for text in ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR"))


def printable(text: object) -> str:
    """`text` with every character that could move the cursor, reorder the line or hide itself written as its escape.

    File names, sample IDs and class names come from strangers. A tab, a newline, an ANSI escape or a right-to-left
    mark in one of them must not change what the rest of the line seems to say.
    """
    return "".join(
        c if c == " " or unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )


def said(fault: BaseException) -> str:
    """One line of what a stranger's code raised, at most 200 characters: its message, after its name where that is no ordinary exception's, or its name alone."""
    first = (str(fault).strip().splitlines() or [""])[0]
    return printable(": ".join(filter(None, ["" if first and isinstance(fault, Exception) else type(fault).__name__, first])))[:200]


def closest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The `count` most similar of `known`, as text for the end of an error message; all of them where they are few."""
    known = list(known)
    near = difflib.get_close_matches(word, known, count, 0.4) or (known if len(known) <= 8 else known[:count])
    return ", ".join(map(printable, near)) if near else "none"
