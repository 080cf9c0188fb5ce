"""Damage files in thousands of ways and read them: what comes of it, as a table.

    python benchmarks/reliability/fuzz.py [EXAMPLES OF EACH FILE, 2000]

Writes fuzz.json, and prints the rows for README.md. Exits with 1 where anything but structures or a sentence came.
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

import transfermium as tm  # noqa: E402
from tests.fuzz import Change, bounded_memory, changes, read_damaged, read_damaged_set, sound, sound_set  # noqa: E402


def main(examples: int) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    rows = []
    with bounded_memory():
        for name, content in sound().items():
            rows.append(fuzzed(name, content, read_damaged, examples))
            print(line(rows[-1]), flush=True)
        for name, content in sound_set().items():
            rows.append(fuzzed(f"packed set: {name}", content, of_set(name), examples // 3))
            print(line(rows[-1]), flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB
    about = {"date": date.today().isoformat(), "version": tm.__version__, "machine": platform.machine()}
    content = json.dumps({**about, "peak memory (MB)": memory, "rows": rows}, indent=1, ensure_ascii=False)
    (HERE / "fuzz.json").write_text(content + "\n")
    return int(any(row["defects"] for row in rows))


def of_set(name: str) -> Callable[[str, bytes, Path], str]:
    return lambda _, content, folder: read_damaged_set(name, content, folder)


def fuzzed(name: str, content: bytes, read: Callable[[str, bytes, Path], str], examples: int) -> dict[str, Any]:
    """Damage one file so often; says how often it was read, refused, or ended otherwise, and the longest time."""
    came: Counter[str] = Counter()
    defects: list[str] = []
    longest = 0.0

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(change=changes())
    def once(change: Change) -> None:
        nonlocal longest
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                came["read" if read(name, change(content), Path(folder)) == "read" else "refused"] += 1
            except Exception as error:
                came["defect"] += 1
                defects.append(f"{type(error).__name__}: {error}"[:300])
                kept = HERE / f"defect-{len(defects)}-{name.replace(' ', '-')}"
                if len(defects) <= 3:
                    kept.write_bytes(change(content))
        longest = max(longest, time.perf_counter() - began)

    once()
    return {"file": name, "bytes": len(content), **came, "defects": defects[:5], "longest (s)": round(longest, 2)}


def line(row: dict[str, Any]) -> str:
    numbers = [row["bytes"], row.get("read", 0), row.get("refused", 0), row.get("defect", 0), row["longest (s)"]]
    return f"| {row['file']} | {' | '.join(map(str, numbers))} |" + "".join(f"\n  {text}" for text in row["defects"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000))
