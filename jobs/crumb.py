"""What a job in one process is at, in a small file while it is at it: if the file is there when the same job begins, that is what the last one died of.

Twice the same, and the work is given to processes of its own, which may die alone; so a sample that kills its process, or a machine too small for it,
does not stop the same command from completing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.atomic import unwaiting
from pipeline.errors import BadRequest, Broken
from pipeline.manifest import read_json

DEATHS = 2  # at the same thing, after which it is not done in this process


class Crumb:
    """A file that is there while something is done. Never raises: what cannot be written is not remembered."""

    def __init__(self, path: Path):
        self.path = path
        try:
            last = read_json(path, "") if path.exists() else {}
        except BadRequest:
            last = {}
        self.last, self.deaths = last.get("at"), last.get("deaths", 0)

    @property
    def deadly(self) -> bool:
        """Whether the same thing has killed this job often enough."""
        return self.deaths >= DEATHS

    def forget(self) -> None:
        """What killed is done, or set aside."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Removed again however the block ends, except by death, of this process or of its GPU."""
        deaths = 1 + (self.deaths if what == self.last else 0)
        made = [folder for folder in (self.path.parent, self.path.parent.parent) if not folder.exists()]
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", encoding="utf-8", opener=unwaiting) as file:
                file.write(json.dumps({"at": what, "deaths": deaths}))
        died = False
        try:
            yield
        except Broken:
            died = True
            raise
        finally:
            with suppress(OSError):
                if not died:
                    self.path.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()  # of a run that was refused nothing stays; any other is not empty
