"""`megatron-vlm convert {to-hf,from-hf,verify}`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_vlm.cli.options import add_command
from megatron_vlm.cli.values import local_path, new_folder, seed, whole_number
from megatron_vlm.config import ExitCode, ModelConfig, UsageError, load_section
from megatron_vlm.config.inference import ModelOptions
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.prepare import TemplateName

if TYPE_CHECKING:
    from megatron_vlm.convert.quantize.export import QuantizeOptions

_TO_HF = "convert to-hf runs/sft --format llava --output exported"
_TO_PEFT = "convert to-hf runs/lora --format peft --output adapter"
_TO_AWQ = "convert to-hf runs/sft --quantize awq --calibration text.txt --output exported-awq"
_FROM_HF = (
    "convert from-hf --language Llama-2-7b-hf --vision clip-vit-large-patch14-336 --output runs/start",
    "convert from-hf --model llava-1.5-7b-hf --output runs/start",
    "convert from-hf --model VILA-7b --vision clip-vit-large-patch14-336 --output runs/start",
    "convert from-hf --peft adapter --base runs/start --output runs/adapted",
)
_VERIFY = "convert verify runs/sft exported"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    text = "convert weights from and to Hugging Face, on a CPU, for any parallel layout"
    parser = add_command(subparsers, "convert", text, _TO_HF, _FROM_HF[0])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_to_hf(actions)
    _add_from_hf(actions)
    _add_verify(actions)
    parser.set_defaults(run=run)


def _add_to_hf(actions: argparse._SubParsersAction) -> None:
    text = "write a folder that transformers, vLLM and other programs load"
    notes = "The weights of an adapter are merged into those of its base, except with --format peft."
    add = add_command(actions, "to-hf", text, _TO_HF, _TO_PEFT, _TO_AWQ, notes=notes).add_argument
    text = "a checkpoint, or a run folder for its newest checkpoint"
    add("checkpoint", metavar="CHECKPOINT_OR_RUN", help=text)
    kinds = (
        "llava: LlavaForConditionalGeneration; vila: three folders, as VILA-1.5; vila-flat: LlavaLlamaForCausalLM, as "
        "VILA-1.0 and LLaVA-1.5; peft: LoRA alone, for PeftModel; gguf: two files for llama.cpp"
    )
    text = f"{kinds} (default: %(default)s)"
    add("--format", default="llava", metavar="FAMILY", help=text)
    add("--output", type=new_folder, required=True, metavar="DIR", help="folder to write")
    text = "number format of the weights (default: as in the checkpoint)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    add("--tokenizer", metavar="T", help="tokenizer.model, tokenizer.json, or a folder (default: the run's own)")
    text = "conversation template used in training (default: %(default)s)"
    add("--template", choices=get_args(TemplateName), default=ModelOptions().template, help=text)
    text = "system prompt: default (the template's own), none, or a text (default: %(default)s)"
    add("--system", default=ModelOptions().system, metavar="TEXT", help=text)
    text = "how an image becomes a square (default: as in the run)"
    add("--image-aspect", choices=("pad", "square", "resize"), help=text)
    add("--overwrite", action="store_true", help="replace DIR if it is an earlier export")
    text = "compare the folder with the checkpoint afterwards, as `convert verify` does"
    add("--verify", action="store_true", help=text)
    _add_quantize(add)


def _add_quantize(add: Callable[..., object]) -> None:
    text = "store the decoder's matrices in 4 bits: awq, in float16, or compressed-tensors, symmetric"
    add("--quantize", metavar="METHOD", help=text)
    text = (
        "of awq: gemm for transformers and vLLM, tinychat for a language model in a folder of its own (default: gemm)"
    )
    add("--layout", metavar="NAME", help=text)
    text = "text like those that the model will see, in UTF-8; up to 65,000 tokens of it are used"
    add("--calibration", type=local_path, metavar="TEXT", help=text)
    text = "inputs that share a scale (default: 128)"
    add("--group-size", type=int, choices=(128, 64, 32), help=text)


def _add_from_hf(actions: argparse._SubParsersAction) -> None:
    text = "make a starting checkpoint from a language model and a vision tower, a whole model, or a LoRA of PEFT"
    notes = "Train from it with checkpoint.load_weights=runs/start."
    add = add_command(actions, "from-hf", text, *_FROM_HF, notes=notes).add_argument
    add("--language", type=local_path, metavar="DIR", help="folder of a language model: LlamaForCausalLM")
    add(
        "--vision",
        type=local_path,
        metavar="DIR",
        help="folder of a vision tower: CLIPVisionModel, SiglipVisionModel, ...",
    )
    text = "instead of both: folder of a whole model, LLaVA or VILA; add --vision if it only names its tower"
    add("--model", "--llava", type=local_path, metavar="DIR", help=text)
    add("--peft", type=local_path, metavar="DIR", help="or: folder of a LoRA that PEFT saved, with --base")
    text = "run folder or checkpoint that holds the model which the LoRA adapts"
    add("--base", type=local_path, metavar="CHECKPOINT_OR_RUN", help=text)
    add("--output", type=new_folder, required=True, metavar="RUN_DIR", help="run folder to write")
    add("--config", metavar="CONFIG", help="training config whose model section must match")
    text = "type of the projection, whose weights are random (default: %(default)s)"
    add("--projection", choices=module_names("megatron_vlm.convert.projectors"), default="linear", help=text)
    text = "hidden state of the tower that the projection receives (default: set by the tower, -2 for CLIP)"
    add("--feature-layer", type=int, metavar="N", help=text)
    text = "side of the images in pixels; position embeddings are interpolated to it (default: that of the folder)"
    add("--image-size", type=whole_number(1), metavar="N", help=text)
    add("--seed", type=seed, default=1234, help="seed of the random projection (default: %(default)s)")


def _add_verify(actions: argparse._SubParsersAction) -> None:
    text = "tell whether two models are the same: every tensor, the tokenizer, then logits over 1,000 positions"
    notes = (
        "Each model is a checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder of a whole model."
    )
    add = add_command(actions, "verify", text, _VERIFY, notes=notes).add_argument
    add("models", type=local_path, nargs=2, metavar="MODEL", help="the two models")
    text = "compare only tensors and tokenizers, which needs little memory"
    add("--no-logits", dest="with_logits", action="store_false", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from megatron_vlm.platform.device import prepare_process
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    prepare_process()
    {"to-hf": _to_hf, "from-hf": _from_hf, "verify": _verify}[args.action](args)
    return ExitCode.DONE


def _to_hf(args: argparse.Namespace) -> None:
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.convert.export import export, is_whole_model
    from megatron_vlm.convert.files.model_card import record_checks
    from megatron_vlm.convert.to_hf import ExportOptions
    from megatron_vlm.data.text.templates import find_system

    if args.verify and not is_whole_model(args.format):
        raise UsageError(
            f"--verify does not read the format {args.format}",
            fix="leave it out: every export is read back as it is written",
        )
    quantize = _quantize_options(args)
    settings = read_run_settings(args.checkpoint, tokenizer=args.tokenizer, image_aspect=args.image_aspect)
    options = ExportOptions(
        quantize=quantize,
        format=args.format,
        dtype=args.dtype,
        template=args.template,
        system=find_system(args.system),
        overwrite=args.overwrite,
    )
    loader = export(settings, args.output, options)
    print(f"{args.output}: {settings.checkpoint} for {loader}")
    if args.verify:
        record_checks(args.output, _compare(settings.checkpoint, args.output, tokenizer=args.tokenizer))


def _quantize_options(args: argparse.Namespace) -> "QuantizeOptions | None":
    from megatron_vlm.convert.export import is_whole_model
    from megatron_vlm.convert.quantize.export import QuantizeOptions
    from megatron_vlm.platform.device import prepare_process

    chosen = {"layout": args.layout, "calibration": args.calibration, "group_size": args.group_size}
    given = {name: value for name, value in chosen.items() if value is not None}
    if args.quantize is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise UsageError(f"--{option} says how to quantise", fix="add --quantize awq, or omit it")
        return None
    if args.calibration is None:
        raise UsageError(f"--quantize {args.quantize} needs a text", fix="name a file with --calibration")
    for name, is_given in ((f"--format {args.format}", not is_whole_model(args.format)), ("--verify", args.verify)):
        if is_given:
            raise UsageError(f"{name} is for weights that are not quantised", fix="omit it, or --quantize")
    return QuantizeOptions(method=args.quantize, device=prepare_process(), **given)


def _verify(args: argparse.Namespace) -> None:
    _compare(*args.models, with_logits=args.with_logits)


def _compare(first: Path, second: Path, *, with_logits: bool = True, tokenizer: str | None = None) -> list[str]:
    from megatron_vlm.convert.verify import verify_models

    found = verify_models(first, second, with_logits=with_logits, tokenizer=tokenizer)
    print("\n".join(found.lines))
    found.check(first, second)
    return found.lines


def _from_hf(args: argparse.Namespace) -> None:
    given = {name for name in ("language", "vision", "model", "peft", "base") if getattr(args, name)}
    if given not in ({"language", "vision"}, {"model"}, {"model", "vision"}, {"peft", "base"}):
        raise UsageError(
            "convert from-hf needs --language and --vision, or --model with or without --vision, or --peft and --base",
            fix="see --help",
        )
    import yaml

    from megatron_vlm.config import config_to_dict
    from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts
    from megatron_vlm.convert.from_peft import import_adapter

    if args.peft and args.image_size:
        raise UsageError("--image-size and --peft exclude each other", fix="omit --image-size")
    model = load_section(ModelConfig, args.config, "model") if args.config else None
    if args.peft:
        model = import_adapter(args.peft, args.base, args.output)
    elif args.model:
        model = import_model(args.model, args.output, model, tower=args.vision, image_size=args.image_size)
    else:
        options = ImportOptions(
            projection=args.projection, feature_layer=args.feature_layer, image_size=args.image_size, seed=args.seed
        )
        model = import_parts(args.language, args.vision, args.output, options, model)
    print(f"# {args.output}: the model section for a training config; start with checkpoint.load_weights={args.output}")
    print(yaml.safe_dump({"model": config_to_dict(model)}, sort_keys=False), end="")
