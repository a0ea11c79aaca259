"""The results files: JSON lines, one record a variant, with what it was measured on.

They are only ever appended to; a reader takes the latest record of a variant.
"""

import json
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sda_fast

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a results file, oldest first.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a line of it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}: run `python -m bench {path.stem}` first")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(records[-1], dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {line[:40]!r}")
    return records


def append_record(path: Path, record: Record) -> None:
    """Add one line; the folder is made if it is not there.

    Raises:
        ValueError: the record holds a NaN or an infinity, which JSON has not.
    """
    line = json.dumps(record, allow_nan=False, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


DEPENDS_ON = ("torch", "diffusers", "transformers")


def versions(names: Iterable[str] = DEPENDS_ON) -> dict[str, str]:
    """Versions of what a result depends on, by the name of the distribution.

    What is not installed is left out; this project may be on the path alone.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"sda-fast": sda_fast.__version__}


def run_id() -> str:
    """The time, UTC: the same in every record of one call of a suite."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def commit() -> str:
    """The checked-out commit, with "-dirty" where tracked files differ; "unknown" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
