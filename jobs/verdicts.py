"""How it stands with all claims of the paper together: how many have each verdict, and why none has one where nothing can be tested."""

from __future__ import annotations

from collections import Counter

from jobs.claims import NOT, REPRODUCED, UNDECIDED, UNTESTABLE, Claim, Finding


def tally(found: list[tuple[Claim, Finding]]) -> dict[str, int]:
    """How many of the paper's claims have each verdict, in the order of the four."""
    counted = [finding.verdict for claim, finding in found if not claim.own]
    return {verdict: counted.count(verdict) for verdict in (REPRODUCED, NOT, UNDECIDED, UNTESTABLE)}


def untestable(found: list[tuple[Claim, Finding]]) -> str | None:
    """The reason that most of the paper's claims share where none of them can be tested; None where one can."""
    paper = [finding for claim, finding in found if not claim.own]
    return Counter(finding.why for finding in paper).most_common(1)[0][0] if all(finding.verdict == UNTESTABLE for finding in paper) else None


def headline(found: list[tuple[Claim, Finding]]) -> str:
    """How it stands with the paper's claims, without an end."""
    counts, why = tally(found), untestable(found)
    total = sum(counts.values())
    if why is not None:
        return f"none of the {total} claims can be tested here ({why})"
    return f"{counts.pop(REPRODUCED)} of {total} claims reproduced, {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}"
