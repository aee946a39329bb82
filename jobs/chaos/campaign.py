"""`faultline chaos`: rounds of faults, each of a kind that the seed decides; their figures; and where they stopped, for the next time."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

from jobs.chaos.ground import Ground
from jobs.chaos.kinds import KINDS
from jobs.chaos.rounds import Record, Round
from jobs.progress import say
from pipeline.atomic import write_json
from pipeline.errors import BadRequest, printable
from pipeline.locks import hold
from pipeline.manifest import read_json


def chaos(folder: Path, rounds: int, seed: int, kinds: list[str] | None = None) -> dict:
    """Rounds that `folder` lacks are done; returns the figures of its first `rounds`. Raises BadRequest for a folder of another seed or other kinds."""
    unknown = [kind for kind in kinds or () if kind not in KINDS]
    if unknown:
        raise BadRequest(f"--kinds: there is no '{printable(unknown[0])}'; there is: {', '.join(KINDS)}")
    if rounds < 1:
        raise BadRequest(f"--rounds: {rounds} is less than 1")
    folder = folder.expanduser().absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "chaos.json").exists():
        raise BadRequest(f"--run: {printable(folder)} holds something else; name a folder for these rounds alone")
    with hold(folder / ".lock", folder, f"other rounds are at work in {printable(folder)}: wait for them"):
        _same(folder, {"seed": seed, "kinds": kinds or list(KINDS)})
        records = read_records(folder)
        if len(records) < rounds:
            say(f"{len(records)} of {rounds} rounds are done; the others take about half a minute each")
            _go_on(folder, rounds, seed, kinds or list(KINDS), records)
    return figures(records[:rounds])


def figures(records: list[Record]) -> dict:
    """What the interface promises of `chaos`, and beside it what a user saw that should not be."""
    return {
        "rounds": len(records), "faults": dict(Counter(r.kind for r in records)), "lost": sum(r.lost for r in records), "doubled": sum(r.doubled for r in records),
        "wrong": sum(r.wrong for r in records), "repeated_units": sum(r.repeated for r in records), "beyond_the_bound": sum(r.repeated > r.bound for r in records),
        "foul": sum(bool(r.foul) for r in records),
    }  # fmt: skip


def read_records(folder: Path) -> list[Record]:
    """Rounds that were done, in order; a line that was cut off counts for nothing."""
    path, records = folder / "rounds.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(Record(**json.loads(line)))
        except ValueError:
            break
    return records


def kind_of(number: int, seed: int, kinds: list[str]) -> str:
    """Every kind once in as many rounds as there are kinds, in an order that the seed decides."""
    turn, place = divmod(number, len(kinds))
    return random.Random(f"{seed}:{turn}").sample(kinds, len(kinds))[place]


def _same(folder: Path, asked: dict) -> None:
    path = folder / "chaos.json"
    if not path.exists():
        write_json(path, asked)
    elif (known := read_json(path, "name another folder")) != asked:
        raise BadRequest(f"--run: {printable(folder)} holds rounds of seed {printable(known.get('seed'))} and its own kinds; ask for the same, or name another folder")


def _go_on(folder: Path, rounds: int, seed: int, kinds: list[str], records: list[Record]) -> None:
    ground = Ground(folder)
    try:
        ground.prepare()
        (folder / "rounds.jsonl").write_text("".join(f"{r.to_json()}\n" for r in records), encoding="utf-8")  # without a line that was cut off
        for number in range(len(records), rounds):
            record = one(ground, number, seed, kind_of(number, seed, kinds))
            with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
                file.write(f"{record.to_json()}\n")
            records.append(record)
            say(f"round {number + 1}/{rounds}: {record.kind} ({record.detail}): {record.lost} lost, {record.doubled} doubled, {record.wrong} wrong, {record.repeated} of at most {record.bound} units repeated, {record.seconds:.0f} s")
            for line in record.foul:
                say(f"  {printable(line)}")
    finally:
        ground.leave()


def one(ground: Ground, number: int, seed: int, kind: str) -> Record:
    """A round of that kind. Its folder stays where something was not as it should be."""
    start = time.monotonic()
    round_ = Round(ground, number, seed)
    try:
        try:
            KINDS[kind](round_)
        except AssertionError as fault:  # what was waited for did not happen: the job ends here, and must be whole afterwards like any other
            round_.foul.append(str(fault)[:300])
            round_.job.clear()
            round_.codes.append(round_.job.process.wait(10))
        round_.complete()
    finally:
        if round_.job is not None:
            round_.job.clear()
    record = round_.record(kind, time.monotonic() - start)
    if record.clean:
        round_.forget()
    elif kind.startswith("cluster"):
        ground.leave()  # it may be the cluster's own fault: the next round gets a new one
    return record
