"""Tell whether two models are the same: a checkpoint and its export, a folder and what was imported from it."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.compare_logits import LogitComparison, compare_logits, reason_without_logits
from megatron_vlm.convert.compare_tokenizers import TokenizerComparison, compare_tokenizers
from megatron_vlm.convert.compare_weights import WeightComparison, compare_weights
from megatron_vlm.convert.opened_weights import open_weights

MAX_KL = 1e-6
"""Largest mean KL divergence of two models with the same weights [nats]: float32 sums in another order."""
MAX_KL_ROUNDED = 1e-2
"""The same where one of them stores its weights in a coarser type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What two models have in common."""

    weights: WeightComparison
    tokenizers: TokenizerComparison
    logits: LogitComparison | None
    skipped: str | None
    """Why logits were not compared."""

    @property
    def max_kl(self) -> float:
        """Largest mean KL divergence that is accepted [nats]."""
        return MAX_KL_ROUNDED if self.weights.rounded else MAX_KL

    @property
    def lines(self) -> list[str]:
        """The figures, for people."""
        weights = self.weights
        how = "equal after rounding to the coarser type" if weights.rounded else "equal to the bit"
        lines = [f"tensors: {weights.num_equal} of {weights.num_tensors} {how}", *weights.faults]
        lines += [f"tokenizers: {self.tokenizers.summary}", *self.tokenizers.faults]
        if self.logits is None:
            return [*lines, f"logits: not compared, {self.skipped}"]
        found = self.logits
        what = f"logits: {found.num_positions} positions with {found.num_images} images"
        figures = f"KL {found.mean_kl:.1e} (largest {found.max_kl:.1e}), top-1 {100 * found.top_1:.2f} %"
        return [*lines, f"{what}: {figures}, largest difference {found.max_difference:.1e}"]

    def check(self, first: Path, second: Path) -> None:
        """Check that the models are the same.

        Raises:
            CheckpointError: tensors or tokenizers differ, or the logits do by more than rounding explains.
        """
        faults = [*self.weights.faults, *self.tokenizers.faults]
        if self.logits is not None and not self.logits.mean_kl <= self.max_kl:
            faults.append(f"logits differ: KL {self.logits.mean_kl:.1e}, at most {self.max_kl:.0e} is accepted")
        if faults:
            raise CheckpointError(
                "; ".join(faults), where=f"{first} and {second}", fix="convert again from the right source"
            )


def verify_models(first: Path, second: Path, *, with_logits: bool = True, tokenizer: str | None = None) -> Verification:
    """Compare tensors and tokenizers of two models, then their logits, if the tensors are the same.

    Args:
        first: a checkpoint, a run folder or a Hugging Face folder of a whole model.
        second: another one.
        with_logits: False to leave out logits, which needs the memory of a few.
        tokenizer: overrides that of the first model, if it is a checkpoint.

    Raises:
        CheckpointError: one of them cannot be read.
        ConfigError: the models have other vocabularies or image sizes, or a tokenizer is damaged.
    """
    opened = open_weights(first, tokenizer), open_weights(second)
    weights, tokenizers = compare_weights(*opened), compare_tokenizers(*opened)
    reasons = (reason for one in opened if (reason := reason_without_logits(one)))
    skipped = next(reasons, None) if with_logits else "as asked"
    if skipped is None and weights.faults:
        skipped = "the tensors differ"
    logits = None if skipped else compare_logits(*opened)
    return Verification(weights=weights, tokenizers=tokenizers, logits=logits, skipped=skipped)
