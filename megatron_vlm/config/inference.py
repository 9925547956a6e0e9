"""Options of the verbs that answer prompts; each default stands here and nowhere else."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.errors import UsageError
from megatron_vlm.config.options import Option
from megatron_vlm.config.prepare import MAX_SEED, TemplateName

BARE_TEXT = "none"
"""In place of a template: the model continues the prompt as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How prompts are written for a model, and how it computes."""

    template: Annotated[
        Literal[TemplateName, "none"],
        Option("conversation template used in training; none: continue the prompt as bare text"),
    ] = "vicuna_v1"
    system: Annotated[str, Option("system prompt: default (the template's own), none, or a text")] = "default"
    tokenizer: Annotated[
        str | None, Option("tokenizer.model, tokenizer.json, or a folder", metavar="T", default="the run's own")
    ] = None
    image_aspect: Annotated[
        Literal["pad", "square", "resize"] | None,
        Option(
            "how an image becomes a square: pad with the mean colour, crop the centre, or stretch",
            default="as in the run",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None, Option("number format of the model", default="bf16 on a GPU, else fp32")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the tokens of an answer are chosen."""

    max_new_tokens: Annotated[int, Option("longest answer [tokens]", least=1)] = 256
    temperature: Annotated[
        float,
        Option("0 takes the most likely token, 1 draws from the model's own distribution", least=0, metavar="T"),
    ] = 0.0
    top_k: Annotated[
        int, Option("draw only from the K most likely tokens; 0: from all tokens", least=0, metavar="K")
    ] = 0
    top_p: Annotated[
        float,
        Option("draw only from the most likely tokens that reach this probability together", most=1, metavar="P"),
    ] = 1.0
    seed: Annotated[int, Option("seed of the draws", least=0, most=MAX_SEED, metavar="S")] = 0
    """The draws of a prompt depend only on it and on the prompt's number, not on the other prompts of a batch."""

    def __post_init__(self) -> None:
        for name, is_good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
        ):
            if not is_good:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {getattr(self, name)} is out of range", fix=f"choose {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """How the questions of a benchmark are asked."""

    suffix: Annotated[str, Option(r"text after every question; \n is a line break", default="nothing")] = ""
    num_shots: Annotated[int, Option("worked examples before each question", least=0, flag="--shots", metavar="K")] = 0
    shot_seed: Annotated[int, Option("seed for choosing worked examples", least=0, most=MAX_SEED, metavar="SEED")] = 0
    max_new_tokens: Annotated[int, Option("longest answer [tokens]", least=1)] = 32
