"""Tar archives read from front to back: `.tar` from any sample's first header, `.tar.gz` from its beginning alone.

gzip cannot be entered in the middle. So that the units of a `.tar.gz` need neither the whole archive in memory nor a new start
for each, a process keeps the stream where its last unit ended, and the next one goes on from there; a unit that lies further on
skips forward, one that lies before begins again. A process thus unpacks an archive about once, and so does every other process.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache

from pipeline.errors import BadRequest, printable
from pipeline.sources.files import MOST_BYTES  # a few kilobytes of gzip can stand for any number of them

MARK_EVERY = 128  # samples between two places from which reading can begin
EMPTY = 10240  # bytes of a tar without members, all of them zeros
PARKED = 4  # streams that a process keeps open
FAULTS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, IndexError, OverflowError, MemoryError, RecursionError)  # what damaged archives make their reader raise
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MOST_HEADER = 1 << 19  # bytes of headers between two members
MOST_SAID = 64  # attributes of all members that follow, of a kibibyte each: every member has a copy of them
MOST_MEMBERS = 1000  # of one sample
MOST_PIECES = 1000  # of a sparse member
MOST_LABEL = 1 << 20  # bytes of a label that is held against the census
Key = Callable[[tarfile.TarInfo], str]
Which = Callable[[str], bool]


def none(name: str) -> bool:
    """No member."""
    return False


def is_gzip(name: str) -> bool:
    return not name.lower().endswith(".tar")


@lru_cache(16)  # of one member it is asked several times
def key_of(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: `a/b.c/img.01.JPG` -> (`a/b.c/img`, `01.jpg`).

    Bytes that are no UTF-8 are written as their escapes, so that every key can be stored as text.
    """
    path = path.removeprefix("./")  # as `tar cf x.tar .` writes it
    path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, name = posixpath.split(path)
    key, _, extension = name.partition(".")
    return posixpath.join(folder, key) if key else "", extension.lower()


class Forward:
    """A binary file that tarfile reads, and that moves forward alone: headers may say otherwise, and would be read for ever. `last` is what the last read gave.

    left: bytes that may be read until it is set again. Raises ReadError where headers send back, or are longer than that.
    """

    left = MOST_HEADER

    def __init__(self, path: str, offset: int):
        self.seekable = not is_gzip(path)
        self.file = open(path, "rb") if self.seekable else gzip.open(path, "rb")
        self.position, self.last = 0, b""
        self.seek(offset)

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers without end, or {size} bytes of one, at byte {self.position}")
        self.last = self.file.read(size)
        self.position += len(self.last)
        self.left -= len(self.last)
        return self.last

    def seek(self, position: int) -> None:
        if position < self.position:
            raise tarfile.ReadError(f"a header before byte {self.position} sends back to byte {position}")
        if self.seekable:
            if position > os.fstat(self.file.fileno()).st_size:
                raise tarfile.ReadError("unexpected end of data")
            self.position = self.file.seek(position)
        while self.position < position and (skipped := self.file.read(min(1 << 20, position - self.position))):
            self.position += len(skipped)


@dataclass
class Group:
    """Consecutive members of one key, and what those of them hold that were asked for, by their offset. said: what the archive had said of all members until here (PAX's global headers)."""

    key: str
    said: dict[str, str] = field(default_factory=dict)
    members: list[tarfile.TarInfo] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)

    def extractfile(self, member: tarfile.TarInfo) -> io.BytesIO:
        return io.BytesIO(self.contents[member.offset])


class Walk:
    """Iterates the groups of a tar; `position` is the number of the next one. Contents are held from group `hold_from` on.

    `key(member)` -> the group that a member belongs to, or "" for one that is no part of any, as folders and devices are.
    `holds(member name)`: whether the content of a regular member is wanted; `labels(member name)`: whether it is wanted of every group, as far as it is small.
    At most one group is in memory, and the first member of the next.
    """

    def __init__(self, path: str, key: Key, holds: Which, labels: Which = none, offset: int = 0, position: int = 0, said: dict[str, str] | None = None):
        self.file = Forward(path, offset)
        self.position, self.hold_from = position, float("inf")
        self.key, self.holds, self.labels = key, holds, labels
        try:
            self.tar = tarfile.open(fileobj=self.file, mode="r:", pax_headers=said)
        except BaseException:
            self.file.file.close()
            raise
        self.groups = self._groups()

    def __iter__(self) -> Iterator[Group]:
        return self

    def __next__(self) -> Group:
        group = next(self.groups)
        self.position += 1
        return group

    def _groups(self) -> Iterator[Group]:
        group, number = Group(""), self.position - 1
        for member in self.tar:
            self.tar.members.clear()  # tarfile keeps every header it has seen
            self.file.left = MOST_HEADER
            if member.size < 0 or member.sparse and not _fits(member.sparse, member.size):
                raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}" + " whose map of holes is none" * bool(member.sparse))
            said = self.tar.pax_headers
            if len(said) > MOST_SAID or sum(map(len, (*said, *said.values()))) > MOST_SAID << 10:
                raise tarfile.ReadError(f"headers without end, which speak of all members, before byte {member.offset}")
            member.pax_headers = {}
            key = self.key(member)
            if not key:
                continue
            if key != group.key:
                if group.key:
                    yield group
                group, number = Group(key, {what: value for what, value in said.items() if what != "comment"}), number + 1
            group.members.append(member)
            if len(group.members) > MOST_MEMBERS:
                raise tarfile.ReadError(f"more than {MOST_MEMBERS} members of the sample '{key}'")
            wanted = number >= self.hold_from and member.size <= MOST_BYTES and self.holds(member.name) or member.size <= MOST_LABEL and self.labels(member.name)
            if member.isfile() and wanted:
                self.file.left = MOST_BYTES
                group.contents[member.offset] = self._content(member)
                self.file.left = MOST_HEADER
            member.sparse = None
        if group.key:
            yield group

    def _content(self, member: tarfile.TarInfo) -> bytes:
        """What a regular member holds. Raises ReadError where the archive ends before it does."""
        if member.sparse is not None:
            return self.tar.extractfile(member).read()
        self.file.seek(member.offset_data)
        content = self.file.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return content

    def check_end(self) -> None:
        """Raises ReadError unless the archive ended with tar's own end mark, a block of zeros (tarfile stops as quietly where a transfer was
        cut off, or at a damaged header), with nothing but zeros behind it, and gzip's checksum holds to the end of the file."""
        block = self.file.last
        if block != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"{'a damaged header' if block else 'no end mark'} at byte {self.tar.offset}")
        while rest := self.file.file.read(1 << 20):
            if rest.count(0) < len(rest):
                raise tarfile.ReadError(f"more follows its end mark at byte {self.tar.offset}: several archives in one file are to be separate ones")

    def close(self) -> None:
        self.file.file.close()


def _fits(pieces: list[tuple[int, int]], size: int) -> bool:
    """Whether pieces (offset, bytes) of a sparse member follow each other within it, and are no more than a file of images has."""
    held = [piece for piece in pieces if piece[1]]  # GNU's old header has room for four, and zeros for those that it lacks
    ends = [0, *(offset + length for offset, length in held)]
    return len(pieces) <= MOST_PIECES and ends[-1] <= size and all(length > 0 and offset >= end for (offset, length), end in zip(held, ends))


def fingerprint(path: str) -> str:
    """Of a .tar.gz, from its size and gzip's own checksum at its end: enough to know that it is another file now."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        return f"{size}-{file.read().hex()}"


class Headers:
    """Digests of what the headers of an archive say, one for every MARK_EVERY groups: their members' names, sizes, times and places, and what the labels among them hold."""

    def __init__(self, labels: Which):
        self.labels = labels
        self.digests: list[str] = []
        self.open = hashlib.sha256()

    def add(self, group: Group) -> None:
        said = [(m.name, m.size, m.mtime, m.offset, group.contents.get(m.offset) if m.size <= MOST_LABEL and self.labels(m.name) else None) for m in group.members]
        self.open.update(repr(said).encode("utf-8", "surrogateescape"))

    def close(self) -> str:
        """Of what was added since the last time."""
        self.digests.append(self.open.hexdigest()[:16])
        self.open = hashlib.sha256()
        return self.digests[-1]


def count(path: str, key: Key, each: Callable[[int, Group], None], labels: Which = none) -> tuple[int, str, list[str]]:
    """(groups, digest of all headers, that of every MARK_EVERY groups) of a tar, read to its end from its headers and `labels` alone; `each` is shown every group.

    Raises BadRequest naming the file if it cannot be read to its end.
    """
    headers, walk = Headers(labels), None
    try:
        _refuse_misnamed(path)
        whole = fingerprint(path) if is_gzip(path) else ""
        walk = Walk(path, key, none, labels)
        for group in walk:
            headers.add(group)
            each(walk.position - 1, group)
            if walk.position % MARK_EVERY == 0:
                headers.close()
        walk.check_end()
        if walk.position % MARK_EVERY:
            headers.close()
        return walk.position, hashlib.sha256("".join([whole, *headers.digests]).encode()).hexdigest()[:16], headers.digests
    except FAULTS as fault:
        raise BadRequest(f"{printable(path)} cannot be read to its end ({_why(fault)}): fetch it again or repack it, or leave it out of --source") from None
    finally:
        if walk is not None:
            walk.close()


def _why(fault: Exception) -> str:
    words = {MemoryError: "a header claims more than memory holds", RecursionError: "headers of headers, without end", ValueError: "a number in a header is none", IndexError: "a header is cut short"}
    return words.get(type(fault)) or printable(fault)[:200]


def handle_of(group: Group, digest: str) -> list:
    """Of the stretch of a .tar that begins with a group and has this digest: [offset, digest], and what had been said of all members, where anything had."""
    return [group.members[0].offset, digest, *([group.said] if group.said else [])]


def _refuse_misnamed(path: str) -> None:
    """Raises BadRequest for an archive that is packed otherwise than its name says: no other would find it. Raises ReadError for one that was never written."""
    with open(path, "rb") as file:
        start = file.read(512)
    packing = next((name for magic, name in MAGIC.items() if start.startswith(magic)), "plain" if start[257:262] == b"ustar" else None)
    if start and not start.strip(b"\0") and os.path.getsize(path) > EMPTY:
        raise tarfile.ReadError("it begins with zeros: space that was never filled?")
    if packing in ("bzip2", "xz", "zstd"):
        raise BadRequest(f"{printable(path)} is packed by {packing}, which is not read here: unpack it, or pack it by gzip")
    if packing and (packing == "gzip") != is_gzip(path):
        raise BadRequest(f"{printable(path)} is {'packed by gzip' if packing == 'gzip' else 'a plain tar'}, whatever its name says: rename it to {'.tar.gz' if packing == 'gzip' else '.tar'}")


def groups(path: str, key: Key, holds: Which, marks: Sequence[tuple[int, object]], start: int, stop: int, labels: Which = none) -> Iterator[Group]:
    """Groups [start, stop) with their contents. `marks`: the last at or before `start`, and those inside: the position of a group, and its handle (`handle_of`, the digest that of
    the headers and `labels` up to the next one), or of a .tar.gz its fingerprint.

    Raises BadRequest if there are fewer of them, or if it is not the file of the census: of a .tar.gz before any is given, of a .tar once the headers up to the mark behind them are read.
    """
    position, handle = marks[0]
    known, headers = dict(marks), Headers(labels)
    if is_gzip(path):
        if fingerprint(path) != handle:
            raise _changed(path)
        walk = _unpark(path, handle, start) or Walk(path, key, holds)
    else:
        walk = Walk(path, key, holds, labels, handle[0], position, *map(dict, handle[2:]))
    walk.hold_from = start

    def check(group: Group | None) -> None:
        """Where a stretch ends, it must say what it said to the census."""
        if group:
            headers.add(group)
        if not is_gzip(path) and (not group or walk.position % MARK_EVERY == 0) and headers.close() != known[(walk.position - 1) // MARK_EVERY * MARK_EVERY][1]:
            raise _changed(path)

    try:
        while walk.position < stop and (group := next(walk, None)):
            check(group)
            if walk.position > start:
                yield group
        if not is_gzip(path) and walk.position >= stop:
            walk.hold_from = float("inf")
            while walk.position % MARK_EVERY:
                check(group := next(walk, None))
                if group is None:
                    break
    except FAULTS as fault:
        raise BadRequest(f"{printable(path)} cannot be read on from sample {walk.position} ({_why(fault)}): fetch it again or repack it") from None
    finally:
        if is_gzip(path) and walk.position == stop:
            _park(path, handle, walk)
        else:
            walk.close()
    if walk.position < stop:
        raise BadRequest(f"{printable(path)} holds {walk.position} samples where it held {stop} or more when it was counted: put the old file back, or extract into another --dataset")


def _changed(path: str) -> BadRequest:
    return BadRequest(f"{printable(path)} is another file than when it was counted: put the old file back, or extract into another --dataset")


_streams: dict[tuple, Walk] = {}
_lock = threading.Lock()


def _unpark(path: str, handle: object, start: int) -> Walk | None:
    """The stream that this process left at or before `start`. The one who takes it has it alone."""
    with _lock:
        walk = _streams.get((os.getpid(), path, handle))
        return _streams.pop((os.getpid(), path, handle)) if walk and walk.position <= start else None


def _park(path: str, handle: object, walk: Walk) -> None:
    with _lock:
        for key in [(os.getpid(), path, handle), *list(_streams)[: len(_streams) + 1 - PARKED]]:
            if (old := _streams.pop(key, None)) is not None:
                old.close()
        _streams[os.getpid(), path, handle] = walk


def first_files(path: str, most: int = 32) -> list[str]:
    """Names of the first regular, visible files of a tar; fewer where it cannot be read on (the census will say so)."""
    found: list[str] = []
    with suppress(*FAULTS), closing(Walk(path, lambda member: member.name if member.isfile() and key_of(member.name)[0] else "", none)) as walk:
        found.extend(group.key for _, group in zip(range(most), walk))
    return found
