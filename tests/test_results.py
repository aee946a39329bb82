"""docs/results.md says what was measured: its tables are made from docs/data/results, its sentences quote its tables, and where it differs from independent scripts it says so."""

import re

import pytest
import results_data
import results_tables

EXPECTED_TO_DIFFER = {"errors among all"}  # and the page says so


def sections() -> dict[str, str]:
    """Title -> text of each section, without its commands."""
    text = re.sub(r"(?s)```.*?```", "", results_tables.PAGE.read_text(encoding="utf-8"))
    return {part.partition("\n")[0]: part for part in re.split(r"(?m)^#+ ", text) if part}


def decimals(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text))


def test_the_tables_are_what_the_experiments_wrote():
    assert results_tables.PAGE.read_text(encoding="utf-8") == results_tables.page(), "python tests/results_tables.py writes them anew"


@pytest.mark.parametrize("title", sections())
def test_a_sentence_quotes_a_table_of_its_section(title):
    tables = "\n".join(line for line in sections()[title].splitlines() if line.startswith("|"))
    words = "\n".join(line for line in sections()[title].splitlines() if not line.startswith(("|", "!", "#")))
    words = re.sub(r"SqueezeNet 1\.1|top-1 \d\.\d+|\]\([^)]*\)", "", words)
    assert decimals(words) <= decimals(tables)


def test_what_differs_from_the_scripts_is_known():
    """A figure that no chance enters must be the same to its last digit; of drawn ones the difference must lie within both 95% intervals together."""
    differs = set()
    for name, (ours, theirs, uncertain) in results_tables.comparisons().items():
        drawn = "random" in name or "step" in name
        if abs(ours["estimate"] - theirs) > (results_tables.allowed(ours, uncertain) if drawn else uncertain):
            differs.add(name)
    assert differs == EXPECTED_TO_DIFFER


def test_every_picture_that_is_shown_was_kept():
    shown = set(re.findall(r"images/results/([\w.-]+)\.png", results_tables.PAGE.read_text(encoding="utf-8")))
    kept = {path.stem for path in results_data.IMAGES.glob("*.png")}
    assert shown == kept == shown & {f"{name}-{figure}" for name, figures in results_data.SHOWN.items() for figure in figures}
