"""`faultline reproduce`: every experiment of the paper over a run, and one page that says which of its claims hold there.

Each verb is the job that its own command is: it says its cost, resumes, and is free where it is done. One that cannot be done with this network or these data sets leaves the
others alone, and its claims are not testable here. Nothing is computed, and nothing discarded, while a verb's earlier results with other settings stand in the way.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from index import Run
from index.build import build
from jobs import cluster, report
from jobs.claims import CLAIMS, UNTESTABLE, Claim, Finding
from jobs.experiment import OtherSettings, Rehearsal, Request
from jobs.progress import say, stages
from pipeline.errors import BadRequest, Stopped, printable
from pipeline.experiment import results_folder
from pipeline.locks import Busy, hold
from pipeline.store import Store

INDEX = "reproduce"  # what an index of ours is called where one of the usual name is there and does not suit


@dataclass(frozen=True)
class Sets:
    """dataset: of the verbs that look at one; source: whose errors ask and take the step; within: where neighbours are sought; alone: nobody named `within`, and the run has no second data set."""

    dataset: str
    source: str
    within: str
    alone: bool

    @classmethod
    def of(cls, store: Store, request: Request, source: str | None, within: str | None) -> Sets:
        """Raises BadRequest naming the option for a data set that is not there, that is unfinished, or that has to be said."""
        known = store.datasets()
        for option, name in (("--dataset", request.dataset), ("--from", source), ("--in", within)):
            if name is not None and name not in known:
                raise BadRequest(f"{option}: there is no data set '{printable(name)}' in this run; it has: {', '.join(map(printable, known)) or 'none yet (faultline extract makes one)'}")
        dataset = replace(request, dataset=request.dataset or (None if "val" in known else source)).dataset_of(store)
        source = source or dataset
        others = [name for name in known if name != source]
        if within is None and len(others) > 1:
            raise BadRequest(f"--in: say where the neighbours of {printable(source)} are sought: {', '.join(map(printable, known))}")
        found = cls(dataset, source, within or (others or [source])[0], within is None and not others)
        for name in (found.source, found.within):
            replace(request, dataset=name).dataset_of(store)
        return found


@dataclass(frozen=True)
class Step:
    """A verb with what it is asked here. run: (run, sets, index name, request) -> its summary, or of a rehearsed request its `Rehearsal`; searches: it needs the index; whole: it
    looks at all samples, whatever --max-samples says."""

    run: Callable[[Run, Sets, str | None, Request], dict | Rehearsal]
    searches: bool = False
    whole: bool = False


def _profile(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.profile import profile

    return profile(replace(request, max_samples=None), None)  # few samples, most of them correct, would leave hardly an error


def _prune(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.prune import prune

    return prune(request, None, "map", None)


def _neighbors(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.evaluation import evaluate
    from jobs.neighbors import refuse_empty

    refuse_empty(run, sets.source, sets.within, index)
    return evaluate(run, sets.source, sets.within, index, None, replace(request, dataset=sets.source))


def _finetune(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.finetune import finetune

    if sets.alone:
        raise BadRequest(f"a step is tried on a held-out data set, and {printable(sets.source)} is the only one of this run: extract a second (faultline extract --dataset v2), or say --in {printable(sets.source)} to try it on the other errors of the same")
    return finetune(replace(request, dataset=sets.source), sets.within, None, None, "global", None, index)


def _mask(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.mask import HOSTS, mask

    return mask(request, None, "mean", 10, 100.0, None, HOSTS, None)


def _sanity(run: Run, sets: Sets, index: str | None, request: Request) -> dict | Rehearsal:
    from jobs.sanity import sanity

    return sanity(replace(request, max_samples=request.max_samples or 100), 10, 100.0)


STEPS = {"profile": Step(_profile, whole=True), "prune": Step(_prune), "neighbors": Step(_neighbors, searches=True), "finetune": Step(_finetune, searches=True), "mask": Step(_mask), "sanity": Step(_sanity)}


def reproduce(request: Request, source: str | None, within: str | None) -> tuple[list[tuple[Claim, Finding]], Path]:
    """Do what is left to do, and write the page; what was found of each claim, and where the page is.

    `request.fresh`: earlier results are replaced where they were made with other settings, and kept elsewhere. Raises BadRequest before anything is done, Stopped
    where a verb was (the page is written without it, and the same command resumes).
    """
    request.check()
    run = Run.open(request.run.expanduser().absolute())
    sets = Sets.of(run.store, request, source, within)
    request = replace(request, run=run.store.run, dataset=sets.dataset, fresh=None if request.fresh else False)
    if request.device or request.address:
        cluster.device_for(request.device, request.address)  # a GPU or a cluster that is not there is told before anything is done
    folder = run.store.run / "experiments"
    with hold(folder / ".reproduce.lock", run.store.run, f"another reproduce is at work in {printable(run.store.run)}: wait for it"):
        missing, index = _plan(run, sets, request)
        summaries: dict[str, dict] = {}
        stopped: list[str] = []
        for verb, step in STEPS.items():
            if verb in missing:
                say(f"{verb} is left out: {missing[verb]}")
                continue
            try:
                summaries[verb] = step.run(run, sets, index, request)
                say(f"{verb}: {summaries[verb]['found']}")
            except Busy as fault:
                raise Stopped(f"{fault}\nwhat is done is kept; the same command resumes") from None
            except OtherSettings:
                raise  # made meanwhile, by somebody else
            except BadRequest as fault:
                missing[verb] = _line(fault)
                say(f"{verb} is left out: {missing[verb]}")
            except Stopped as fault:
                missing[verb] = f"it was stopped before its end: {str(fault).splitlines()[0]}"
                stopped.append(f"{verb}: {fault}")
                say(f"{verb} was stopped: {str(fault).splitlines()[0]}")
        found = judge(summaries, missing, facts_of(run, sets))
        path = folder / "report.html"
        report.write(path, report.About.of(run, request.max_samples, request.seed), _sections(run, sets, request, index, summaries, missing), found)
    if stopped:
        raise Stopped(f"{stopped[0]}\n{printable(path)} was written without it")
    return found, path


def judge(summaries: dict[str, dict], missing: dict[str, str], facts: dict) -> list[tuple[Claim, Finding]]:
    """Every claim with what was found of it. missing: verb -> why it has no summary. Of a run that has no error, that is the reason for all of them."""
    found = [(claim, claim.find(summaries[claim.verb] | {"facts": facts} if claim.verb in summaries else None, missing.get(claim.verb, "it was not done"))) for claim in CLAIMS]
    if facts["errors"]:
        return found
    why = f"no sample of {' or '.join(map(printable, facts['datasets']))} is misclassified, and the claims are about errors: extract images that the network errs on"
    return [(claim, replace(finding, why=why) if finding.verdict == UNTESTABLE else finding) for claim, finding in found]


# ---- what is to be done --------------------------------------------------------------------------------------------


def _plan(run: Run, sets: Sets, request: Request) -> tuple[dict[str, str], str | None]:
    """(verb -> why it cannot be done, the name of the index). Says the cost of every other verb; builds the index where none suits. Raises BadRequest for results in the way."""
    missing: dict[str, str] = {}
    costs: dict[str, str] = {}
    index = _suiting(run, sets)
    if index is None:
        costs |= _rehearse(run, sets, None, request, missing, [verb for verb, step in STEPS.items() if not step.searches])
        try:
            index = _build(run, sets)
        except BadRequest as fault:
            missing |= {verb: _line(fault) for verb, step in STEPS.items() if step.searches}
    costs |= _rehearse(run, sets, index, request, missing, [verb for verb in STEPS if verb not in costs and verb not in missing])
    for verb in STEPS:
        if verb in costs:
            say(f"{verb}: {costs[verb]}" + ("; all samples, and not --max-samples of them" if STEPS[verb].whole and request.max_samples else ""))
    return missing, index


def _rehearse(run: Run, sets: Sets, index: str | None, request: Request, missing: dict[str, str], verbs: list[str]) -> dict[str, str]:
    """verb -> what it costs, of those that can be done; why not goes into `missing`. Raises BadRequest naming every verb whose earlier results were made with other settings."""
    costs, others = {}, {}
    for verb in verbs:
        try:
            costs[verb] = _words(STEPS[verb].run(run, sets, index, replace(request, rehearsed=True)))
        except OtherSettings as fault:
            others[verb] = fault.differences
        except BadRequest as fault:
            missing[verb] = _line(fault)
    if others:
        listed = "; ".join(f"{verb}: {text}" for verb, text in others.items())
        raise BadRequest(f"this run has earlier results that were made with other settings ({listed}), and nothing was computed: add --fresh to discard those and make them anew, or keep them and reproduce a copy of the run")
    return costs


def _line(fault: BadRequest) -> str:
    """Its message in one line."""
    return "; ".join(str(fault).splitlines())


def _words(rehearsal: Rehearsal) -> str:
    if not rehearsal.left:
        return f"done ({rehearsal.cost})"
    done = rehearsal.units - rehearsal.left
    return rehearsal.cost + (f"; {done} of {rehearsal.units} units are done" if done else "")


def _suiting(run: Run, sets: Sets) -> str | None:
    """The name of an index of errors that holds both data sets, the usual one or ours; None where there is none that can be searched."""
    for name in (None, INDEX):
        try:
            index = run.index(name)
        except BadRequest:
            continue
        if index.about["subset"] == "errors" and {sets.source, sets.within} <= set(index.datasets):
            return index.folder.name
    return None


def _build(run: Run, sets: Sets) -> str:
    """Build one, and replace none that is there. Raises BadRequest where there is nothing to index."""
    store = run.store
    finished = [dataset for dataset in store.datasets() if not store.progress(dataset).pending]
    name = INDEX if (store.run / "index" / "errors").exists() else "errors"
    built = build(store, finished, "val" if "val" in finished else sets.source, "errors", name, stages())
    say(f"no index of errors held {' and '.join(map(printable, dict.fromkeys((sets.source, sets.within))))}: built {printable(built.folder)} of {sum(built.rows.values()):,} vectors")
    return name


# ---- what the page needs -------------------------------------------------------------------------------------------


def facts_of(run: Run, sets: Sets) -> dict[str, object]:
    """What claims need to know of the run beside the verbs' numbers: see `claims._fact`; and of `datasets` together, those that are looked at, the number of `errors`."""
    errors = {}
    names = list(dict.fromkeys((sets.dataset, sets.source, sets.within)))
    for dataset in names:
        label, prediction = classes_of(run.store, dataset)
        errors[dataset] = list(zip(label[label != prediction].tolist(), prediction[label != prediction].tolist()))
    sought, itself = errors[sets.within], int(sets.source == sets.within)
    pairs, labels = Counter(sought), Counter(label for label, _ in sought)
    asked = errors[sets.source]
    count = max(1, len(asked))
    layers = run.layers
    return {
        "datasets": names, "errors": sum(map(len, errors.values())),
        "pair": sum(pairs[a, b] + pairs[b, a] - itself for a, b in asked) / count,
        "class": sum(labels[a] - itself for a, _ in asked) / count,
        "before_logits": f"{layers[0][0]}..{layers[-2][0]}" if len(layers) > 1 and layers[-1][1] == run.manifest.classes else None,
    }  # fmt: skip


def classes_of(store: Store, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """(label, prediction) of all samples of a data set, int32 [N]."""
    parts = [(batch["label"].to_numpy(), batch["prediction"].to_numpy()) for _, _, batch in store.blocks(dataset, ["label", "prediction"], 65536)]
    label, prediction = (np.concatenate(column) for column in zip(*parts)) if parts else (np.zeros(0, np.int32),) * 2
    return label, prediction


def _sections(run: Run, sets: Sets, request: Request, index: str | None, summaries: dict[str, dict], missing: dict[str, str]) -> list[report.Section]:
    return [report.Section(verb, command_of(verb, run, sets, request, index), results_folder(run.store.run, verb), summaries.get(verb), missing.get(verb)) for verb in STEPS]


def command_of(verb: str, run: Run, sets: Sets, request: Request, index: str | None) -> str:
    """The command that makes one verb's results again; the run by its directory's name."""
    words = ["faultline", verb, "--run", run.store.run.name]
    if STEPS[verb].searches:
        words += ["--from", sets.source, "--in", sets.within]
        words += ["-k", "10", "--out", "neighbours.parquet", "--evaluate"] if verb == "neighbors" else []
        words += ["--name", index] if index not in (None, "errors") else []
    else:
        words += ["--dataset", sets.dataset]
    words += ["--max-samples", str(request.max_samples)] if request.max_samples and not STEPS[verb].whole else []
    words += ["--seed", str(request.seed)] if request.seed else []
    return shlex.join(words)
