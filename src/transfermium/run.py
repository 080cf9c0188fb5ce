"""A run folder: what was asked for, so that the same command goes on and another one is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np

from .errors import InputError
from .model import write_whole

WITHOUT_EFFECT = ("device", "workers", "accumulate")  # options that change where a run happens, not what it finds


def claim(out: str | Path | None, config: Mapping[str, Any]) -> Path | None:
    """Make `out` the folder of this configuration, or raise `InputError` if it belongs to another one.

    A run that has saved nothing yet, because its command failed, holds no folder.
    """
    if out is None:
        return None
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose a folder for the run")
    config = json.loads(json.dumps(config))
    file = out / "config.json"
    begun = any((out / name).exists() for name in ("state.safetensors", "model.safetensors"))
    if file.exists() and begun:
        try:
            found = json.loads(file.read_text())
        except ValueError:
            raise InputError(f"{file} is damaged: delete the folder or choose another one") from None
        changed = [name for name, old, new in _differences(found, config) if old != new]
        if changed:
            name, old, new = next(d for d in _differences(found, config) if d[1] != d[2])
            raise InputError(
                f"{out} holds another run: {name} was {_short(old)} there and is {_short(new)} now"
                f"{f' (and {len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose another folder"
            )
    elif not file.exists() and out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not a run of transfermium: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not begun:
        write_json(file, config)
    return out


def write_json(path: Path, content: Any) -> None:
    """Write JSON at once or not at all."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def fingerprint(structures: Sequence[ase.Atoms], most: int = 20_000) -> str:
    """A short hash of geometries and labels; of evenly spaced structures where there are more than `most`."""
    digest = hashlib.sha256(str(len(structures)).encode())
    for index in np.unique(np.linspace(0, len(structures) - 1, min(len(structures), most)).astype(int)):
        atoms = structures[int(index)]
        for array in (atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc):
            digest.update(np.ascontiguousarray(array).tobytes())
        named = {**atoms.arrays, **atoms.info}
        for name in sorted(named):
            digest.update(f"{name}={np.asarray(named[name]).tolist()}".encode())
    return digest.hexdigest()[:16]


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two nested mappings side by side, but for options without effect."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key not in WITHOUT_EFFECT:
                yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    else:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
