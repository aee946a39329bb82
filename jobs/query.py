"""The gallery of `faultline query`: gathers a query's image and its neighbours' from the profiles, for `figures` to draw."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from index.run import Run
from jobs import figures
from jobs.neighbors import refuse_inside
from pipeline.errors import printable


def draw(run: Run, sample: str, found: pa.Table, path: Path, name: str | None = None) -> None:
    """Draw `sample` and its neighbours (a `NEIGHBOURS` table, of the index `name`) into `path`. Raises BadRequest for a file that cannot be drawn."""
    refuse_inside(run, path, "--gallery")
    place = run.find(sample)
    own = run.record(place, ["sample_id", "label", "prediction", "prediction_confidence", "thumbnail"])
    names = {f"{key}_name": run.manifest.name_of(own[key]) for key in ("label", "prediction")}
    query = own | names | {"dataset": place.dataset, "confidence": own["prediction_confidence"]}
    hits = [row | run.record(run.indexed(row["dataset"], row["sample_id"], name), ["thumbnail"]) for row in found.to_pylist()]
    figures.gallery(path, query, hits, f"Images that fail like {printable(place.dataset)}:{printable(place.sample_id)}")
