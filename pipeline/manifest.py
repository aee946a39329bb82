"""run.json: what a run is, so that it can be resumed, reproduced, and never mixed with another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.atomic import checksum, regular, write_json
from pipeline.errors import BadRequest, printable
from pipeline.filters import FilterLayout
from pipeline.samples import Preprocessing


@dataclass(frozen=True)
class Manifest:
    """Everything that decides the bits of a run's vectors, then who made it. `batch_size` and `threads` (of one engine) belong
    to the run, not to the machine that resumes it; `import_root` is where a `module:factory` was found; `promised_top1` what the weights
    are published with (0..1), None where nobody says; `saved_sha256` the digest of the run's own weights.safetensors."""

    model: str
    weights_sha256: str
    layers: FilterLayout
    preprocessing: Preprocessing
    aggregation: str
    precision: str
    engine: str
    batch_size: int
    threads: int
    unit_samples: int
    classes: int
    class_names: tuple[str, ...] | None
    import_root: str | None
    versions: dict[str, str]
    created: str
    promised_top1: float | None = None
    saved_sha256: str | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of what must be equal for two vectors to be comparable."""
        identity = [self.model, self.weights_sha256, self.layers.to_json(), self.preprocessing.to_json(), self.aggregation, self.precision]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def name_of(self, label: int) -> str | None:
        """The class's name, where the run knows names."""
        return self.class_names[label] if self.class_names and 0 <= label < len(self.class_names) else None

    def must_match(self, asked: dict[str, object], run: Path) -> None:
        """Raises BadRequest naming every setting of `asked` (None: not asked) in which this run differs."""
        own = vars(self)
        faults = [f"{key} {_short(own[key])}, not {_short(value)}" for key, value in asked.items() if value is not None and own[key] != value]
        if faults:
            raise BadRequest(f"{printable(run)} was made with {'; '.join(faults)}: vectors of different settings are never mixed. Ask for the run's own settings, or give another --run")

    def write(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        fields = asdict(self) | {"layers": self.layers.to_json(), "preprocessing": self.preprocessing.to_json()}
        write_json(run / "run.json", fields, "manifest")

    @classmethod
    def read(cls, run: Path) -> Manifest:
        """Raises BadRequest if `run` holds no run, or one that cannot be read."""
        if not (run / "run.json").exists():
            if holds_profiles(run):
                raise BadRequest(f"{printable(run / 'run.json')} is gone, which says what the profiles there are: restore it from a copy, or begin another run")
            raise BadRequest(f"--run: there is no run at {printable(run)} (no run.json); faultline extract begins one")
        fields = read_json(run / "run.json", "restore it from a copy, or begin another run")
        try:
            names = fields["class_names"]
            fields |= {"layers": FilterLayout.from_json(fields["layers"]), "preprocessing": Preprocessing.from_json(fields["preprocessing"])}
            return cls(**fields | {"class_names": tuple(names) if names else None})
        except (KeyError, TypeError, ValueError) as fault:
            raise BadRequest(f"{printable(run / 'run.json')} is not a run that this version reads ({type(fault).__name__}: {printable(fault)}): restore it from a copy, or begin another run") from None


def holds_profiles(run: Path) -> bool:
    """Whether a folder is a run's by what lies in it, whatever became of its run.json."""
    return any((run / "profiles").glob("*/*.parquet"))


def read_json(path: Path, remedy: str, free: tuple[str, ...] = ()) -> dict:
    """What `write_json` wrote, or somebody without a checksum. Raises BadRequest naming the file if it is damaged, and the remedy."""
    try:
        value = json.loads(regular(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        if value.pop("checksum", None) not in (None, checksum(value, free)):
            raise ValueError("it is damaged, or was changed by hand and its checksum left in")
        return value
    except RecursionError:
        raise BadRequest(f"{printable(path)} cannot be read (nested without end): {remedy}") from None
    except (OSError, ValueError) as fault:
        raise BadRequest(f"{printable(path)} cannot be read ({printable(fault)[:200]}): {remedy}") from None


def _short(value: object) -> str:
    if isinstance(value, Preprocessing):
        value = json.dumps(value.to_json())
    if isinstance(value, FilterLayout):
        value = f"of {len(value.layers)} layers with {value.total} filters"
    text = printable(value)
    return text[:12] + "..." if len(text) == 64 else text
