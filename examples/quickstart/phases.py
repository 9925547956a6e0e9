"""Phases that are done once: each leaves a stamp with a hash of all that it depended on."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class PhaseRunner:
    """Runs phases in order and skips those that are done.

    Args:
        folder: where the stamps are kept.
        num_phases: how many there will be; for the progress lines only.
        say: prints a line for the user.
    """

    folder: Path
    num_phases: int
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each phase took when it was last done."""
    _digests: dict[str, str] = field(default_factory=dict)

    def run(
        self,
        name: str,
        action: Callable[[], Mapping[str, Any]],
        *,
        inputs: Sequence[Any],
        after: Sequence[str] = (),
        outputs: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """Do a phase, unless it was done with the same inputs and its outputs are still there.

        Outputs of other inputs are removed first; those that an interrupted run with the same inputs left are kept, so
        that an action that can resume does.

        Args:
            name: of the phase.
            action: does it; returns what later phases and the report need, as JSON values.
            inputs: what it depends on: JSON values, and paths whose content counts.
            after: earlier phases it depends on.
            outputs: files and folders it writes.
        """
        digest = _hash_inputs([*inputs, *(self._digests[phase] for phase in after)])
        self._digests[name] = digest
        number = f"[{len(self._digests)}/{self.num_phases}]"
        stamp_path = self.folder / f"{name}.json"
        stamp = _read_json(stamp_path)
        if stamp.get("digest") == digest and all(output.exists() for output in outputs):
            self.seconds[name] = stamp["seconds"]
            self.say(f"{number} {name}: done before ({stamp['seconds']:.0f} s)")
            return stamp["result"]
        self.say(f"{number} {name}")
        self._clear(name, digest, outputs)
        start = time.monotonic()
        result = json.loads(json.dumps(action()))
        self.seconds[name] = time.monotonic() - start
        _write_json(stamp_path, {"digest": digest, "seconds": self.seconds[name], "result": result})
        self.say(f"{number} {name}: {self.seconds[name]:.0f} s")
        return result

    def _clear(self, name: str, digest: str, outputs: Sequence[Path]) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        started = self.folder / f"{name}.started"
        if _read_json(started).get("digest") == digest:
            return
        for output in outputs:
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
        _write_json(started, {"digest": digest})


def _hash_inputs(inputs: Sequence[Any]) -> str:
    known = hashlib.sha256()
    for value in inputs:
        content = value.read_bytes() if isinstance(value, Path) else json.dumps(value, sort_keys=True).encode()
        known.update(len(content).to_bytes(8, "little") + content)
    return known.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}  # a stamp that a kill cut short is no stamp: the phase is done again


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
