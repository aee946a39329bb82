"""Archives, tables and folders that are whole, and hold what they should not: samples that are set aside or taken in one shard, then sources that are refused."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import shards

Member = tuple[str | tarfile.TarInfo, bytes]


@dataclass(frozen=True)
class Sample:
    """Consecutive members of a tar shard. reason: a part of why it is set aside; empty: it is profiled, under `sample_id`."""

    id: str
    members: list[Member]
    sample_id: str
    reason: str = ""


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def labelled(case: str, label: bytes, reason: str = "", end: str = "cls") -> Sample:
    name = f"label {case}"
    return Sample(name, [(f"{name}.jpg", shards.photo(len(case))), (f"{name}.{end}", label)], name, reason)


def named(case: str, name: str, sample_id: str | None = None) -> Sample:
    """A good sample under a strange name."""
    return Sample(f"name {case}", [(f"{name}.jpg", shards.photo(len(name) % 97)), (f"{name}.cls", b"1")], name if sample_id is None else sample_id)


def instead(case: str, kind: bytes, target: str = "") -> Sample:
    """Something else in the place of the image."""
    return Sample(f"{case} for an image", [(special(f"{case}.jpg", kind, target), b""), (f"{case}.cls", b"1")], case, "no image (.jpg, .jpeg or .png) under this key")


RANGE, WHOLE, LACKING = "is outside the network's classes 0..4", "not a whole number", 'its .json holds no "label"'
SAMPLES = [
    labelled("of spaces", b" 3\n"),
    labelled("with a plus", b"+3"),
    labelled("as JSON", b'{"label": 2, "url": "x"}', end="json"),
    labelled("too large by one", b"5", f"label 5 {RANGE}"),
    labelled("negative", b"-1", f"label -1 {RANGE}"),
    labelled("huge", b"9" * 40, RANGE),
    labelled("of many digits", b"1" * 100_000, f"its .cls holds 100,000 bytes, {WHOLE}"),
    labelled("right if its beginning alone were read", b"3" + b" " * 100 + b"5", f"its .cls holds 102 bytes, {WHOLE}"),
    labelled("out of range unless its beginning alone is read", b"0" * 63 + b"12", f"its .cls holds 65 bytes, {WHOLE}"),
    labelled("with 63 zeros before it", b"0" * 63 + b"3"),
    labelled("a word", b"cat", f"its .cls holds 'cat', {WHOLE}"),
    labelled("empty", b"", WHOLE),
    labelled("a float", b"1.0", f"its .cls holds '1.0', {WHOLE}"),
    labelled("exponential", b"1e0", WHOLE),
    labelled("hexadecimal", b"0x1", WHOLE),
    labelled("with an underscore", b"1_0", WHOLE),
    labelled("in Arabic digits", "\u0661".encode(), WHOLE),
    labelled("two numbers", b"1 2", WHOLE),
    labelled("of escapes", b"\x1b[2J", "its .cls holds '\\x1b[2J'"),
    labelled("no text", b"\xff\xfe\x00", WHOLE),
    labelled("JSON without it", b"{}", LACKING, "json"),
    labelled("JSON list", b"[1]", LACKING, "json"),
    labelled("JSON cut", b'{"label": ', LACKING, "json"),
    labelled("JSON empty", b"", LACKING, "json"),
    labelled("JSON nested deep", b"[" * 100_000, LACKING, "json"),
    labelled("JSON no text", b"\xff\xfe", LACKING, "json"),
    labelled("JSON number too long", b'{"label": ' + b"1" * 5000 + b"}", LACKING, "json"),
    labelled("JSON text", b'{"label": "1"}', WHOLE, "json"),
    labelled("JSON float", b'{"label": 1.0}', WHOLE, "json"),
    labelled("JSON NaN", b'{"label": NaN}', WHOLE, "json"),
    labelled("JSON null", b'{"label": null}', WHOLE, "json"),
    labelled("JSON true", b'{"label": true}', WHOLE, "json"),
    labelled("JSON huge", b'{"label": 1' + b"0" * 300 + b"}", RANGE, "json"),
    labelled("JSON negative", b'{"label": -1}', RANGE, "json"),
    Sample("labels that disagree", [("disagree.jpg", shards.photo(1)), ("disagree.cls", b"1"), ("disagree.json", b'{"label": 2}')], "disagree", "its .cls says 1, and its .json 2"),
    Sample("labels that agree", [("agree.jpg", shards.photo(1)), ("agree.cls", b"1"), ("agree.json", b'{"label": 1}')], "agree"),
    labelled("JSON twice", b'{"label": 3, "label": 1}', 'its .json says 3 and 1 for "label"', "json"),
    labelled("JSON twice the same", b'{"label": 3, "x": {"label": 4}, "label": 3}', end="json"),
    Sample("labels that disagree, one as text", [("quoted.jpg", shards.photo(1)), ("quoted.cls", b"1"), ("quoted.json", b'{"label": "2"}')], "quoted", "its .cls says 1, and its .json 2"),
    Sample("labels that disagree, one as a float", [("float.jpg", shards.photo(1)), ("float.cls", b"1"), ("float.json", b'{"label": 2.0}')], "float", "its .cls says 1, and its .json 2"),
    Sample("labels that disagree, one twice", [("torn.jpg", shards.photo(1)), ("torn.cls", b"1"), ("torn.json", b'{"label": 1, "label": 2}')], "torn", 'its .json says 1 and 2 for "label"'),
    Sample("label beside a class name", [("kind.jpg", shards.photo(1)), ("kind.cls", b"1"), ("kind.json", b'{"label": "tench"}')], "kind"),
    Sample("label beside captions", [("caption.jpg", shards.photo(1)), ("caption.cls", b"1"), ("caption.json", b'{"caption": "a dog"}')], "caption"),
    Sample("no label", [("unlabelled.jpg", shards.photo(1))], "unlabelled", "no label (.cls, or .json"),
    Sample("no image", [("pictureless.cls", b"1")], "pictureless", "no image (.jpg, .jpeg or .png) under this key"),
    Sample("two images of one kind", [("twice.jpg", shards.photo(1)), ("twice.jpg", shards.photo(2)), ("twice.cls", b"1")], "twice", "two members named .jpg under this key"),
    Sample("two images of two kinds", [("which.jpg", shards.photo(1)), ("which.png", shards.photo(2)), ("which.cls", b"1")], "which", "2 images under this key, .jpg and .png"),
    Sample("two images, one in capitals", [("loud.JPG", shards.photo(1)), ("loud.jpeg", shards.photo(1)), ("loud.cls", b"1")], "loud", "2 images under this key, .jpg and .jpeg"),
    Sample("an image of another kind beside it", [("beside.jpg", shards.photo(1)), ("beside.gif", b"GIF89a"), ("beside.mask.png", shards.photo(2)), ("beside.cls", b"1")], "beside"),
    Sample("two labels of one kind", [("both.jpg", shards.photo(1)), ("both.cls", b"1"), ("both.cls", b"2")], "both", "two members named .cls under this key"),
    named("absolute", "/etc/absolute"),
    named("climbing", "../../../../tmp/climbing"),
    named("of a folder", "a/b.c/deep"),
    named("with a newline", "new\nline"),
    named("with a carriage return", "carriage\rreturn"),
    named("with an escape", "\x1b[31mred\x1b[0m"),
    named("right to left", "abc\u202egpj"),
    named("with a zero-width space", "zero\u200bwidth"),
    named("very long", "long" * 1000),
    named("in no UTF-8", "caf\udce9", "caf\\xe9"),
    named("of an emoji", "\U0001f40d"),
    named("with a quote", "'; DROP TABLE samples; --"),
    named("with a colon", "val:00003"),
    named("of spaces", "  "),
    instead("symbolic link", tarfile.SYMTYPE, "/etc/passwd"),
    instead("hard link", tarfile.LNKTYPE, "good0.jpg"),
    instead("character device", tarfile.CHRTYPE),
    instead("block device", tarfile.BLKTYPE),
    instead("pipe", tarfile.FIFOTYPE),
    instead("folder", tarfile.DIRTYPE),
    Sample("a tar in a tar", [("inner.jpg", b"x" * 257 + b"ustar" + b"\0" * 762), ("inner.cls", b"1")], "inner", "not an image"),
]
GOOD = {f"good{i}": i % 5 for i in range(80)}


def one_shard(folder: Path) -> Path:
    """All of `SAMPLES` among good ones, which are the majority."""
    members: list[Member] = [("hidden/", b""), (".hidden.jpg", b"?"), ("._good0.jpg", b"?")]
    samples, good = iter(SAMPLES), iter(GOOD.items())
    for key, label in good:
        members += [(f"{key}.jpg", shards.photo(500 + int(key[4:]))), (f"{key}.cls", str(label).encode())]
        if sample := next(samples, None):
            members += sample.members
    return shards.write_tar(folder / "strange.tar", members[1:])


# ---- sources that are refused ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """make(folder) -> what --source names. says: a pattern of the place and the remedy."""

    id: str
    make: Callable[[Path], Path]
    says: str


def good_members(count: int = 6) -> list[Member]:
    return [(f"g{i}.{end}", content) for i in range(count) for end, content in (("jpg", shards.photo(i)), ("cls", b"%d" % (i % 5)))]


def tar(*more: Member, first: bool = False) -> Callable[[Path], Path]:
    return lambda folder: shards.write_tar(folder / "a.tar", [*more, *good_members()] if first else [*good_members(), *more])


def edited(offset: int, new: bytes, checked: bool = True) -> Callable[[Path], Path]:
    """A tar whose third header has other bytes at an offset, and the right checksum all the same."""

    def make(folder: Path) -> Path:
        path = tar()(folder)
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            at = archive.getmembers()[2].offset
        content[at + offset : at + offset + len(new)] = new
        if checked:
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        path.write_bytes(content)
        return path

    return make


def pax(records: bytes) -> Member:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info, records


def raw_tar(*blocks: bytes) -> Callable[[Path], Path]:
    """Good members, then these bytes, then the end."""

    def make(folder: Path) -> Path:
        path = tar()(folder)
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        content = path.read_bytes()[: last.offset_data + 512]
        path.write_bytes(content + b"".join(blocks) + bytes(1024))
        return path

    return make


def header(kind: bytes, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def record(name: str, value: str) -> bytes:
    """One of PAX: its length in front, which counts itself."""
    rest = len(f" {name}={value}\n")
    length = next(n for n in range(rest, rest + 9) if len(str(n)) + rest == n)
    return f"{length} {name}={value}\n".encode()


def attribute(name: str, value: str, others: bytes = b"", size: int = 2000) -> list[bytes]:
    """A PAX attribute, and others, of a member that follows, and the header of that member."""
    said = record(name, value) + others
    return [header(tarfile.XHDTYPE, "x", len(said)), block(said), header(tarfile.REGTYPE, "y.jpg", size)]


def said_of_all(name: str, value: str) -> bytes:
    said = record(name, value)
    return header(tarfile.XGLTYPE, "g", len(said)) + block(said)


def extended() -> bytes:
    """The header of an old sparse member of GNU's, whose map goes on in the next block."""
    content = bytearray(header(tarfile.GNUTYPE_SPARSE, "y.jpg", 0))
    content[482] = 1
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def cut_short(path: Path, by: int) -> Path:
    path.write_bytes(path.read_bytes()[:-by])
    return path


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = r"a\.tar cannot be read to its end \(.*\): fetch it again or repack it"
ENDLESS = r"a\.tar cannot be read to its end \(headers without end, or .* bytes of one, at byte \d+\): fetch it again or repack it"
SAID = r"a\.tar cannot be read to its end \(headers without end, which speak of all members, before byte \d+\): fetch it again or repack it"
TWICE = r"the ID '.*' stands twice, in .* and in .*: .*(rename|follow each other)"
TARS = [
    Refused("tar: a size that is negative", edited(124, b"\xff" * 12), END),
    *(
        Refused(f"tar: an attribute that gives a size of {size}", raw_tar(*attribute("size", str(size)), block(shards.photo(9))), END)
        for size in (-1, -512, -1024, -1536, -10240, -(1 << 50))  # back into this member, to its own header, to that of its attributes, and to those before
    ),
    *(
        Refused(f"tar.gz: an attribute that gives a size of {size}", lambda folder, size=size: packed(raw_tar(*attribute("size", str(size)), block(shards.photo(9)))(folder), "gzip").rename(folder / "a.tar.gz"), END.replace("tar", "tar.gz"))
        for size in (-1, -1536)
    ),
    Refused("tar: an attribute of a negative size", raw_tar(header(tarfile.XHDTYPE, "x", -512), header(tarfile.REGTYPE, "y.jpg", 0)), END),
    Refused("tar: a sparse map that goes on behind the end", lambda folder: cut_short(raw_tar(extended())(folder), 1024), END),
    Refused("tar: a sparse map that goes on for ever", raw_tar(extended() + (bytes(504) + b"\1" + bytes(7)) * 9000, block(b"x")), ENDLESS),
    Refused("tar: a sparse map of a million numbers", raw_tar(*attribute("GNU.sparse.major", "1", record("GNU.sparse.minor", "0"), 3 << 20), block(b"1000000\n" + b"0\n" * 1_500_000)), ENDLESS),
    *(
        Refused(f"tar: {what} said of all", raw_tar(*(said_of_all(f"{i}", "v" * length) + header(tarfile.REGTYPE, f"y{i}.jpg", 0) for i in range(times))), SAID)
        for what, length, times in (("100 kilobytes", 50_000, 2), ("100 attributes", 1, 100))
    ),
    Refused("tar: a name of two megabytes", raw_tar(header(tarfile.GNUTYPE_LONGNAME, "././@LongLink", 2 << 20) + block(b"n" * (2 << 20)), header(tarfile.REGTYPE, "y.jpg", 0)), ENDLESS),
    Refused("tar: 2,000 members of one sample", tar(*((f"same.{i}", b"") for i in range(2000))), r"a\.tar cannot be read to its end \(more than 1000 members of the sample 'same'\): fetch it again"),
    *(
        Refused(f"tar: a sparse map of {pieces[:20]}", raw_tar(*attribute("GNU.sparse.map", pieces, record("GNU.sparse.size", "512"), 512), block(b"x")), r"a\.tar cannot be read to its end \(a member of 512 bytes at byte \d+ whose map of holes is none\): fetch it again")
        for pieces in ("0,-512", "-512,512", "100,100,0,100", "0,1024", ",".join(f"{i // 3},0" for i in range(1500)))
    ),
    Refused("tar: a sparse map that holds no numbers", raw_tar(*attribute("GNU.sparse.map", "a,b", size=512), block(b"x")), END),
    Refused("tar: a size beyond all disks", edited(124, b"\x80" + b"\0" * 3 + b"\xff" * 8), END),
    Refused("tar: a size that is no number", edited(124, b"size?" + b"\0" * 7), END),
    Refused("tar: a size beyond the file", edited(124, b"00077777777\0"), END),
    Refused("tar: a header with a wrong checksum", edited(148, b"000000\0 ", checked=False), END),
    Refused("tar: an attribute without end", raw_tar(header(tarfile.XHDTYPE, "x", 512), block(b"0 path=a\n" * 20), header(tarfile.REGTYPE, "y.jpg", 0)), END),
    Refused("tar: an attribute of no length", raw_tar(header(tarfile.XHDTYPE, "x", 20), block(b"0 size=0\n00000000000"), header(tarfile.REGTYPE, "y.jpg", 0)), END),
    Refused("tar: attributes of nothing", raw_tar(header(tarfile.XHDTYPE, "x", 0)), END),
    Refused("tar: a long link of a terabyte", raw_tar(header(tarfile.GNUTYPE_LONGLINK, "././@LongLink", 1 << 40), header(tarfile.REGTYPE, "y.jpg", 0)), r"a\.tar cannot be read to its end \(headers without end, or 1099511627776 bytes of one, at byte \d+\): fetch it again"),
    Refused("tar: 3,000 attributes of attributes", raw_tar((header(tarfile.XHDTYPE, "x", 10) + block(b"10 a=bcde\n")) * 3000, header(tarfile.REGTYPE, "y.jpg", 0)), r"a\.tar cannot be read to its end \(headers of headers, without end\): fetch it again"),
    Refused("tar: a long name of nothing", raw_tar(header(tarfile.GNUTYPE_LONGNAME, "././@LongLink", 600)), END),
    Refused("tar: a key that comes again later", tar(("g1.jpg", shards.photo(9)), ("g1.cls", b"1")), TWICE),
    Refused("tar: a sample twice in a row", tar(("g5.jpg", shards.photo(9)), ("g5.cls", b"1")), TWICE),
    Refused("tar: images first, labels afterwards", lambda folder: shards.write_tar(folder / "a.tar", sorted(good_members(), key=lambda m: m[0][-3:])), TWICE),
    Refused("tar: two shards with one key", lambda folder: shards.write_tar(folder / "s/b.tar", good_members(2)) and shards.write_tar(folder / "s/a.tar", good_members()).parent, TWICE),
    Refused("tar: no member", lambda folder: shards.write_tar(folder / "a.tar", []), "a.tar holds no sample: give"),
    Refused("tar: folders alone", lambda folder: shards.write_tar(folder / "a.tar", [(special("d", tarfile.DIRTYPE), b"")]), "a.tar holds no sample: give"),
    Refused("tar: hidden files alone", lambda folder: shards.write_tar(folder / "a.tar", [("._a.jpg", b"x"), (".b.cls", b"1")]), "a.tar holds no sample: give"),
    Refused("tar: two archives in one file", lambda folder: overwritten(tar()(folder), None, shards.write_tar(folder / "z/z.tar", good_members()).read_bytes()), END),
    Refused("tar: gzip inside", lambda folder: packed(tar()(folder), "gzip"), r"a\.tar is packed by gzip, whatever its name says: rename it to .tar.gz"),
    Refused("tar: bzip2 inside", lambda folder: packed(tar()(folder), "bz2"), r"a\.tar is packed by bzip2, .*: unpack it"),
    Refused("tar: xz inside", lambda folder: packed(tar()(folder), "lzma"), r"a\.tar is packed by xz, .*: unpack it"),
    Refused("tar: no label in any", lambda folder: shards.write_tar(folder / "a.tar", [(f"g{i}.jpg", shards.photo(i)) for i in range(9)]), "none of the 9 samples that were tried can be used .*no label|9 of 9 samples would be set aside.*no label"),
    Refused("tar: all labels outside", lambda folder: shards.write_shard(folder / "a.tar", [7] * 9), "label of 9 of 9 samples is outside the network's classes 0..4.*\n--force"),
]


def overwritten(path: Path, at: int | None, new: bytes) -> Path:
    content = bytearray(path.read_bytes())
    at = len(content) if at is None else at
    content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def packed(path: Path, module: str) -> Path:
    path.write_bytes(__import__(module).compress(path.read_bytes()))
    return path
