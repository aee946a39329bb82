"""The tables of bad input as a whole: how many cases there are, that each has a name of its own, and that the contract they are held to can fail."""

from __future__ import annotations

from collections import Counter

import bad_input
import bad_input_archives as archives
import bad_input_files as files
import bad_input_folders as folders
import bad_input_images as images
import bad_input_runs as runs
import bad_input_sources as sources
import bad_input_tables as tables
import pytest
import tiny

GROUPS = {
    "damaged sources": [f"{kind}: {damage}" for kind, damage in sources.DAMAGED],
    "what is no file, by name": [f"{kind}: {damage}" for kind, damage in sources.NAMED],
    "samples": [sample.id for sample in archives.SAMPLES],
    "archives, tables, folders": [case.id for table in (archives.TARS, tables.PARQUET, tables.ARRAYS, tables.PICKLES, folders.FOLDERS, folders.RELEASES) for case in table],
    "images": [picture.id for picture in images.PICTURES],
    "weights": [case.id for case in files.WEIGHTS],
    "statistics": [case.id for case in files.STATISTICS],
    "a run's files": [f"{part.id}: {damage}, {verb}" for part, damage, verb in runs.cases()],
    "a run's folders": [f"{folder}: {verb}" for folder, verbs in runs.FOLDERS for verb in verbs],
}


def test_there_are_300_cases_or_more():
    """As docs/reliability.md counts them; the matrix of a run's own files is beside them."""
    counts = {group: len(cases) for group, cases in GROUPS.items()}
    assert sum(count for group, count in counts.items() if not group.startswith("a run's")) >= 300 and counts["a run's files"] >= 300, counts
    assert {group: [case for case, times in Counter(cases).items() if times > 1] for group, cases in GROUPS.items()} == dict.fromkeys(GROUPS, [])


GOOD = "faultline: a.tar cannot be read to its end (empty file): fetch it again or repack it\n"


@pytest.mark.parametrize(
    "ended",
    [
        tiny.Ended(0, b"", GOOD),
        tiny.Ended(1, b"", GOOD),
        tiny.Ended(2, b"{}", GOOD),
        tiny.Ended(2, b"", "a.tar cannot be read: fetch it again\n"),
        tiny.Ended(2, b"", "faultline: a.tar cannot be read\n"),
        tiny.Ended(2, b"", GOOD + "and\nmore\nlines\n"),
        tiny.Ended(2, b"", "Traceback (most recent call last)\n" + GOOD),
        tiny.Ended(2, b"", "faultline: a defect of faultline: KeyError: 'a'; fetch it again\n"),
        tiny.Ended(2, b"", "faultline: \x1b[31ma.tar cannot be read; fetch it again\n"),
    ],
    ids=["no refusal", "a defect", "something on stdout", "not said by faultline", "no remedy", "too many lines", "a traceback", "a defect by its words", "an escape"],
)
def test_the_contract_can_fail(ended):
    assert bad_input.message(tiny.Ended(2, b"", GOOD), 2) == GOOD.strip()
    with pytest.raises(AssertionError):
        bad_input.message(ended, 2)
