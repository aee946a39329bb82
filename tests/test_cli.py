"""The command as a user meets it: exit codes, one to three lines of message, results alone on stdout, and foreign text that cannot lie."""

import io
import json
import re
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import tiny
from PIL import Image

from pipeline.store import Store

VERBS = [["demo"], ["extract"], ["index"], ["query"], ["neighbors"], ["status"], ["statistics"], ["statistics", "import"]]
NEW = ["--dataset", "val", "--model", "m"]
HEAVY = ("torch", "ray", "pyarrow", "faiss", "numpy", "matplotlib", "PIL")


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_loads_nothing_heavy():
    """One process asks for them all, and for a verb that is not there."""
    code = f"""
import os, sys
from jobs.cli import main
mine = os.fdopen(os.dup(1), "w")  # stdout is for results alone from the first verb on
for words in {[[*v, "--help"] for v in VERBS] + [["--help"], ["nothing"]]}:
    sys.argv = ["faultline", *words]
    try: main()
    except SystemExit as end: print("ended", end.code, file=mine)
print("loaded", [m for m in {HEAVY} if m in sys.modules], file=mine)
"""
    out = tiny.python(code)
    assert out.count("ended 0") == len(VERBS) + 1 and out.count("ended 2") == 1 and out.strip().endswith("loaded []")
    assert all(f"Usage: faultline {' '.join(verb)}" in out for verb in VERBS)


def test_help_is_a_result_and_a_missing_verb_a_mistake():
    helped, bare = tiny.process("query", "--help"), tiny.process()
    assert helped.code == 0 and "--layers" in helped.out and not helped.err
    assert bare.code == 2 and not bare.raw and "extract" in bare.err and "Traceback" not in bare.err


# ---- wrong requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["query", "--run", "RUN", "val:0003"], "there is no sample 'val:0003' in this run; close to it: val:0003"),
        (["query", "--run", "RUN", "val:00003", "-k", "0"], "-k: 0 neighbours cannot be given"),
        (["query", "--run", "RUN", "val:00003", "-k", "ten"], "'-k'"),
        (["query", "--run", "RUN", "val:00003", "--layers", "conv3..conv1"], "'conv3' comes after 'conv1'"),
        (["query", "--run", "RUN", "val:00003", "--layers", "conv11"], "no layer 'conv11'; close to it: conv1"),
        (["query", "--run", "RUN", "val:00003", "--in", "v3"], "--in: the index errors does not hold 'v3'; it holds val, v2"),
        (["query", "--run", "RUN", "val:00003", "--name", "error"], "--name: there is no index 'error'; there is errors"),
        (["query", "--run", "RUN", "val:00003", "--format", "xml"], "--format: 'xml' is not one of table, json, parquet"),
        (["query", "--run", "RUN", "val:00003", "--gallery", "a.txt"], "--gallery: a.txt does not end in .png"),
        (["query", "--run", "RUN", "val:00003", "--gallery", "/proc/absent/a.png"], "--gallery: /proc/absent/a.png cannot be written"),
        (["query", "--run", "RUN"], "ID"),
        (["query", "--run", "RUN", "val:00003", "--depth", "3"], "--depth"),
        (["query", "--run", "RUN/absent", "val:00003"], "there is no run at"),
        (["query", "--run", "RUN/run.json", "val:00003"], "there is no run at"),
        (["status", "--run", "RUN/absent"], "there is no run at"),
        (["status", "--run", "RUN", "--format", "parquet"], "--format: 'parquet' is not one of table, json"),
        (["query", "--run", "RUN", "caf\udce9"], "there is no sample 'caf\\xe9' in this run"),
        (["index", "--run", "RUN", "--datasets", ""], "--datasets: names nothing"),
        (["index", "--run", "RUN", "--datasets", ","], "--datasets: names nothing"),
        (["index", "--run", "RUN", "--reference", ""], "--reference: names nothing"),
        (["index", "--run", "RUN/absent"], "there is no run at"),
        (["neighbors", "--run", "RUN", "--from", "v3", "--out", "RUN/o.parquet"], "there is no data set 'v3'"),
        (["neighbors", "--run", "RUN", "--from", "val", "--in", "v3", "--out", "RUN/o.parquet"], "--in: the index errors does not hold 'v3'"),
        (["neighbors", "--run", "RUN", "--from", "val", "--out", "RUN/o.csv"], "o.csv must end in .parquet"),
        (["neighbors", "--run", "RUN", "--from", "val", "--out", "RUN/absent/o.parquet"], "lie in a folder that exists"),
        (["neighbors", "--run", "RUN", "--from", "val", "--out", "RUN/o.parquet", "-k", "0"], "-k: 0"),
        *[(["extract", "--run", "RUN", *NEW, "--source", "S", "--actors", a], f"--actors: '{a}' is neither") for a in ("3-1", "0", "x", "1-", "-2")],
        (["extract", "--run", "RUN", *NEW, "--source", "/absent/{00..03}.tar"], "there is no /absent/00.tar (and 3 more)"),
        (["extract", "--run", "RUN", *NEW, "--source", "S", "--address", ""], "--address: names nothing"),
        (["extract", "--run", "", *NEW, "--source", "S"], "--run: names nothing"),
        (["extract", "--run", "RUN/\udcff", *NEW, "--source", "S"], "is not UTF-8, and the formats of a run take no other; name another folder"),
        (["extract", "--run", "RUN/" + "n" * 300, *NEW, "--source", "S"], "cannot be used (File name too long)"),
        (["query", "--run", "RUN", "val:00003", "--gallery", "n" * 300 + ".png"], "File name too long"),
        (["extract", "--run", "RUN"], "--dataset"),
        (["nothing"], "nothing"),
    ],
    ids=lambda v: " ".join(v[:1] + v[3:]) if isinstance(v, list) else "",
)
def test_a_wrong_request_is_told_in_three_lines(small, words, says):
    assert says in tiny.call(*[w.replace("RUN", str(small.run)) for w in words]).refused()


def test_a_wrong_request_as_a_process(small):
    """The same through the installed script: code 2, nothing on stdout, no traceback."""
    assert "close to it: val:00003" in tiny.process("query", "--run", small.run, "val:00003x").refused()


def test_a_damaged_run_json_names_the_file(copied):
    (copied.run / "run.json").write_text("{}")
    assert "run.json is not a run that this version reads" in tiny.call("status", "--run", copied.run).refused()
    (copied.run / "run.json").write_text("{")
    assert "run.json cannot be read" in tiny.call("status", "--run", copied.run).refused()


def test_a_defect_is_code_1_without_a_traceback(small, monkeypatch):
    """Foreign text in it stays one line; with FAULTLINE_DEBUG the traceback is there."""
    from index import Run

    def broken(*_):
        raise ZeroDivisionError("a \x1b[31mfault\nin two lines")

    monkeypatch.setattr(Run, "status", broken)
    ended = tiny.call("status", "--run", small.run)
    assert ended.code == 1 and not ended.raw and "Traceback" not in ended.err and len(ended.err.splitlines()) == 2
    assert "a defect of faultline: ZeroDivisionError: a \\x1b[31mfault" in ended.err and "FAULTLINE_DEBUG=1" in ended.err
    monkeypatch.setenv("FAULTLINE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        tiny.call("status", "--run", small.run)


FAULTS = [(KeyboardInterrupt(), 4), (OSError(28, "No space left on device", "/run/x"), 4), (PermissionError(13, "Permission denied", "/run/x"), 2)]


@pytest.mark.parametrize("fault, code", FAULTS)
def test_what_is_not_our_fault_is_no_defect(small, monkeypatch, fault, code):
    from index import Run

    monkeypatch.setattr(Run, "status", lambda *_: (_ for _ in ()).throw(fault))
    ended = tiny.call("status", "--run", small.run)
    assert ended.code == code and "defect" not in ended.err and "same command" in ended.err and not ended.raw


# ---- results -------------------------------------------------------------------------------------------------------


def test_one_answer_in_three_formats(small):
    """JSON has exactly the keys of the interface; Parquet and the table say the same."""
    words = ["query", "--run", small.run, "val:00003", "-k", 7]
    rows = tiny.call(*words, "--format", "json").json
    assert [list(row) for row in rows] == [["rank", "sample_id", "dataset", "similarity", "label", "prediction", "label_name", "prediction_name", "confidence", "pair"]] * 7
    ended = tiny.process(*words, "--format", "parquet")
    assert ended.code == 0 and pq.read_table(io.BytesIO(ended.raw)).to_pylist() == rows
    lines = tiny.call(*words).out.splitlines()
    assert lines[0].split() == ["rank", "image", "similarity", "true", "predicted", "confidence", "pair"]
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.split()[:3] == [str(row["rank"]), f"{row['dataset']}:{row['sample_id']}", f"{row['similarity']:.4f}"] and line.rstrip().endswith(row["pair"])


def test_fewer_than_k_is_said_beside_the_answer(small):
    ended = tiny.call("query", "--run", small.run, "val:00003", "-k", 500, "--format", "json")
    assert ended.code == 0 and f"only {len(ended.json)} neighbours exist" in ended.err


def test_status_counts(small):
    datasets = tiny.call("status", "--run", small.run, "--format", "json").json["datasets"]
    assert {name: [p[key] for key in ("samples", "done", "pending", "rejected")] for name, p in datasets.items()} == {"val": [60, 60, 0, 0], "v2": [30, 30, 0, 0]}
    assert all(set(p) == {"samples", "done", "pending", "rejected", "images_per_s"} for p in datasets.values())
    assert re.search(r"^val +60 +60 +0 +0", tiny.call("status", "--run", small.run).out, re.M)


def test_progress_is_on_stderr_alone(small, tmp_path):
    ended = tiny.process("extract", "--run", tmp_path / "run", "--dataset", "val", "--source", small.sources / "val", "--model", tiny.MODEL, "--max-samples", 30)
    assert ended.code == 0 and not ended.raw and "val: 30 of 30 images" in ended.err and "\x1b" not in ended.err
    ended = tiny.call("index", "--run", tmp_path / "run")
    assert ended.code == 0 and not ended.raw and "vectors" in ended.err


def test_a_gallery_is_a_picture(small, tmp_path):
    ended = tiny.call("query", "--run", small.run, "val:00003", "--gallery", tmp_path / "g.png", "--format", "json")
    assert ended.code == 0 and len(ended.json) == 10 and "gallery:" in ended.err
    with Image.open(tmp_path / "g.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 800 and len(set(picture.convert("L").tobytes())) > 50


@pytest.mark.parametrize("words", [["query", "val:00003", "-k", "80"], ["query", "val:00003", "--format", "json"], ["status"], ["query", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_fault(small, words):
    """As `| head -1`, at its hardest: nobody ever reads."""
    run = [] if "--help" in words else ["--run", str(small.run)]
    with subprocess.Popen([tiny.COMMAND, *words, *run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=tiny.surroundings()) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 0 and "Traceback" not in err and "Broken" not in err


def test_a_job_goes_on_when_nobody_reads_its_progress(small, tmp_path):
    run = tmp_path / "run"
    words = ["extract", "--run", run, "--dataset", "val", "--source", small.sources / "val", "--model", tiny.MODEL]
    with subprocess.Popen([tiny.COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=tiny.surroundings()) as process:
        process.stderr.close()
        assert process.wait(60) == 0
    assert tiny.call("status", "--run", run, "--format", "json").json["datasets"]["val"]["done"] == 60


# ---- foreign text --------------------------------------------------------------------------------------------------

HOSTILE = ["\x1b[2J\x1b[31mred", "[red]markup[/red]", "two\nlines", "right\u202eleft", "tab\there", "back\rreturn", ":smile:", "kanji \u6f22\u5b57"]
SHOWN = ["\\x1b[2J\\x1b[31mred", "[red]markup[/red]", "two\\nlines", "right\\u202eleft", "tab\\there", "back\\rreturn", ":smile:", "kanji \u6f22\u5b57"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose IDs and class names come from somebody who means ill."""
    folder = tmp_path_factory.mktemp("hostile")
    members = []
    for i, name in enumerate(HOSTILE * 2):
        members += [(f"{i // 8}{name}.jpg", shards.photo(i)), (f"{i // 8}{name}.cls", str(i % 5).encode())]
    shards.write_tar(folder / "a.tar", members)
    ended = tiny.call("extract", "--run", folder / "run", "--dataset", "val", "--source", folder / "a.tar", "--model", "tiny:hostile_names")
    assert ended.code == 0, ended.err
    assert tiny.call("index", "--run", folder / "run", "--subset", "all").code == 0
    return folder / "run"


def harmless(text):
    return not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_foreign_text_is_escaped_in_tables_and_raw_in_json(hostile):
    words = ["query", "--run", hostile, f"val:0{HOSTILE[0]}", "-k", 15]
    table, rows = tiny.call(*words), tiny.call(*words, "--format", "json")
    assert harmless(table.out) and len(table.out.splitlines()) == 16
    assert {row["sample_id"] for row in rows.json} == {f"{turn}{name}" for turn in "01" for name in HOSTILE} - {f"0{HOSTILE[0]}"}
    assert all(f"val:1{name}" in table.out for name in SHOWN) and harmless(rows.out)
    assert set(row["label_name"] for row in rows.json) == set(tiny.hostile_names().class_names)
    assert "0 \\x1b[31mant\\x1b[0m" in table.out and "1 [red]bee[/red]" in table.out and "2 cat\\nfaultline: all is well" in table.out


def test_foreign_text_is_escaped_in_messages_and_pictures(hostile, tmp_path):
    message = tiny.call("query", "--run", hostile, f"val:0{HOSTILE[0]}x").refused()
    assert harmless(message) and f"val:0{SHOWN[0]}" in message
    for word in ("--in", "--name", "--layers", "--format"):
        message = tiny.call("query", "--run", hostile, f"val:0{HOSTILE[0]}", word, HOSTILE[0] + HOSTILE[2]).refused()
        assert harmless(message) and SHOWN[0] in message
    assert tiny.call("query", "--run", hostile, f"val:0{HOSTILE[1]}", "--gallery", tmp_path / "g.png").code == 0
    message = tiny.call("query", "--run", tmp_path / HOSTILE[2], "x").refused()
    assert harmless(message) and "two\\nlines" in message


def test_a_foreign_id_that_stands_twice_is_escaped(hostile, tmp_path):
    import shutil

    shutil.copytree(hostile, tmp_path / "run")
    file = Store(tmp_path / "run").files("val")[0]
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, table.schema.field("sample_id"), pa.array([HOSTILE[0]] * table.num_rows)), file)
    message = tiny.call("index", "--run", tmp_path / "run").refused()
    assert harmless(message) and f"'{SHOWN[0]}' stands twice in val" in message
    assert json.loads((tmp_path / "run/run.json").read_text())["class_names"][0].startswith("\x1b")
