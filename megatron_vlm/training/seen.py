"""What a run has seen of each dataset since its first step; checkpoints keep it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Seen:
    """Samples and tokens by dataset name."""

    samples: Counter[str] = field(default_factory=Counter)
    """A long sample that is cut into fragments counts with its first one."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Without padding."""

    def add(self, names: Sequence[str], samples: Sequence[int], tokens: Sequence[int]) -> None:
        """Count a step, which has these samples and tokens of each dataset."""
        for name, num_samples, num_tokens in zip(names, samples, tokens, strict=True):
            self.samples[name] += num_samples
            self.tokens[name] += num_tokens

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return plain values for a checkpoint."""
        return {"samples": dict(self.samples), "tokens": dict(self.tokens)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Seen":
        """Return what `to_dict` said."""
        return cls(Counter(values["samples"]), Counter(values["tokens"]))
