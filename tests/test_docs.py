"""What the documents say of the command is what the command says of itself. `python tests/test_docs.py` writes docs/commands.md, and the tables of
docs/models.md and docs/results.md from what was measured."""

import os
import re
from pathlib import Path
from unittest import mock

import model_table
import pytest
import results_tables
import tiny
import torch
import typer

from jobs.cli import app
from pipeline import models
from pipeline.filters import FilterLayout

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/commands.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

HEAD = """# Commands

What every command says with `--help`. Exit codes: 0 complete; 1 a defect of ours; 2 the request is wrong and nothing was done; 3 complete, but more samples were set
aside than `--max-rejects`; 4 stopped before the end, and the same command resumes. stdout carries results alone; progress and messages go to stderr.
"""


def verbs() -> dict[str, set[str]]:
    """`extract`, `statistics import`, ...: the flags that each takes."""
    found = {}

    def walk(command, words):
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, [*words, name])
        else:
            found[" ".join(words)] = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}

    walk(typer.main.get_command(app), [])
    return found


def reference() -> str:
    """docs/commands.md as it must be: the same at every width of the terminal."""
    parts = [HEAD]
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        for verb in verbs():
            ended = tiny.call(*verb.split(), "--help")
            assert ended.code == 0, ended.err
            parts.append(f"## faultline {verb}\n\n```\n{ended.out.strip()}\n```\n")
    return "\n".join(parts)


def test_the_reference_is_what_the_commands_say():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "python tests/test_docs.py writes it anew"


def test_the_tables_of_models_are_what_was_measured():
    """Every name has its row, F and engine among it; every number is in the data file."""
    page = model_table.PAGE.read_text(encoding="utf-8")
    assert page == model_table.page(), "python tests/test_docs.py writes it anew"
    measured = {row["model"]: row for row in model_table.rows()}
    assert {name for name in measured if ":" not in name} == set(model_table.names())
    for name in ("resnet20", "resnet50", "vgg19"):
        assert f"| {name} | {measured[name]['filters']:,} |" in page
    with torch.device("meta"):
        assert measured["resnet50"]["filters"] == FilterLayout.of(models.build("resnet50")).total


def test_no_engine_was_measured_to_be_wrong():
    """In float64 what is left of the difference is the rounding of the results; in float32 a kink may cost a few per cent."""
    for row in model_table.rows():
        assert row["in_float64"] < 1e-5 and row["loss"] < 1e-4 and row["largest"] < 0.1, row["model"]


def commands() -> list[str]:
    """The README's lines that set something up."""
    return [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("python3 ")]


def test_the_two_commands_of_the_readme_are_one_line_each():
    """Each alone in its block; the second is the one that CI takes out of the README and runs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = commands()
    assert all(f"```\n{line}\n```" in text for line in (first, second))
    assert first.endswith("faultline demo") and second.endswith("pytest")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 -E '([^']+)' README\.md", script)[1]
    assert [line for line in text.splitlines() if re.search(pattern, line)][:1] == [second] and 'eval "$command"' in script


def test_make_does_the_same_as_the_readme():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = dict(re.findall(r"^([A-Z]+) \??= (.*)$", lines, re.M))
    for target, command in zip(("demo", "test"), commands()):
        recipe = re.search(rf"^{target}:\n\t(.*)$", lines, re.M)[1]
        for _ in range(2):
            recipe = re.sub(r"\$\(([A-Z]+)\)", lambda m: variables[m[1]], recipe)
        assert recipe == command
    assert "tests/test_docs.py" in re.search(r"^docs:.*\n\t(.*)$", lines, re.M)[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not broken and (links or page.name != "README.md")


@pytest.mark.parametrize("page", [p for p in PAGES if p != REFERENCE], ids=lambda p: p.name)
def test_every_command_that_is_shown_exists(page):
    """`faultline VERB --flag` anywhere in the documents: the verb is there and takes the flag."""
    known, unknown = verbs(), []
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for words in re.findall(r"\bfaultline ((?:[a-z]+\b)[^`\n|&#]*)", text):
        verb = next((v for v in sorted(known, key=len, reverse=True) if words.startswith(v)), None)
        shown_as_command = re.search(rf"(?:`|^\s*|-- |'|/)faultline {re.escape(words[:20])}", text, re.M)
        if verb is None:
            unknown += [words] if shown_as_command else []
            continue
        unknown += [f"{verb} {flag}" for flag in re.findall(r"(?<!\S)-{1,2}[a-z][a-z-]*", words) if flag not in known[verb]]
    assert not unknown


def test_a_command_that_does_not_exist_is_found(tmp_path):
    """The check above can fail."""
    page = tmp_path / "page.md"
    page.write_text("```\nfaultline query --run r ID --depth 3\n```\nand `faultline conquer`\n")
    with pytest.raises(AssertionError, match="(?s)query --depth.*conquer"):
        test_every_command_that_is_shown_exists(page)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
    model_table.PAGE.write_text(model_table.page(), encoding="utf-8")
    results_tables.PAGE.write_text(results_tables.page(), encoding="utf-8")
