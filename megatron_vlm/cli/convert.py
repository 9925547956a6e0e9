"""`megatron-vlm convert {to-hf,from-hf}`."""

import argparse
from typing import get_args

from megatron_vlm.cli.values import local_path, new_folder, seed
from megatron_vlm.config import ExitCode, ModelConfig, UsageError, load_section
from megatron_vlm.config.modules import module_names
from megatron_vlm.config.prepare import ConversationRules, TemplateName

_EXAMPLE = """\
example:
  megatron-vlm convert to-hf runs/sft --output exported --dtype bfloat16
  megatron-vlm convert from-hf --language Llama-2-7b-hf --vision clip-vit-large-patch14-336 --output runs/start
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face weights in and out, on a CPU, for any parallel layout",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _add_to_hf(actions)
    _add_from_hf(actions)
    parser.set_defaults(run=run)


def _add_to_hf(actions: argparse._SubParsersAction) -> None:
    action = actions.add_parser(
        "to-hf",
        help="write a folder that transformers, vLLM and others load",
        epilog="example:\n  megatron-vlm convert to-hf runs/sft --format llava --output exported\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help="a run's newest checkpoint, or this one")
    action.add_argument(
        "--format",
        default="llava",
        metavar="FAMILY",
        help="llava: LlavaForConditionalGeneration (default: %(default)s)",
    )
    action.add_argument("--output", type=new_folder, required=True, metavar="DIR", help="folder to write")
    action.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of the weights; default: that of the checkpoint"
    )
    action.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model; default: that of the run")
    action.add_argument(
        "--template",
        choices=get_args(TemplateName),
        default=ConversationRules().template,
        help="conversation template used in training (default: %(default)s)",
    )
    action.add_argument(
        "--system",
        default="default",
        metavar="TEXT",
        help="its system prompt: default (the template's), none, or a text",
    )
    action.add_argument("--image-aspect", choices=("pad", "square", "resize"), help="default: that of the run")
    action.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def _add_from_hf(actions: argparse._SubParsersAction) -> None:
    action = actions.add_parser(
        "from-hf",
        help="make a starting checkpoint from a language model and a tower, or from a whole model",
        epilog=(
            "example:\n  megatron-vlm convert from-hf --language Llama-2-7b-hf --vision clip-vit-large-patch14-336 "
            "--output runs/start\n\nTrain from it with checkpoint.load_weights=runs/start.\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument(
        "--language", type=local_path, metavar="DIR", help="folder of a language model: LlamaForCausalLM"
    )
    action.add_argument(
        "--vision", type=local_path, metavar="DIR", help="folder of a tower: CLIPVisionModel or CLIPModel"
    )
    action.add_argument(
        "--model",
        "--llava",
        type=local_path,
        metavar="DIR",
        help="in place of both, folder of a whole model: LlavaForConditionalGeneration",
    )
    action.add_argument("--output", type=new_folder, required=True, metavar="RUN_DIR", help="run folder to write")
    action.add_argument("--config", metavar="CONFIG", help="training config whose model section must fit")
    action.add_argument(
        "--projection",
        choices=module_names("megatron_vlm.convert.projectors"),
        default="linear",
        help="type of the projection, whose weights are random (default: %(default)s)",
    )
    action.add_argument(
        "--feature-layer",
        type=int,
        metavar="N",
        help="hidden state of the tower that the projection gets (default: that of the tower, -2 for CLIP)",
    )
    action.add_argument("--seed", type=seed, default=1234, help="of the random projection (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from megatron_vlm.platform.device import prepare_process
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    prepare_process()
    if args.action == "to-hf":
        _to_hf(args)
    else:
        _from_hf(args)
    return ExitCode.DONE


def _to_hf(args: argparse.Namespace) -> None:
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.convert.to_hf import ExportOptions, export_model
    from megatron_vlm.data.text.templates import find_system

    settings = read_run_settings(args.checkpoint, tokenizer=args.tokenizer, image_aspect=args.image_aspect)
    options = ExportOptions(
        format=args.format,
        dtype=args.dtype,
        template=args.template,
        system=find_system(args.system),
        overwrite=args.overwrite,
    )
    architecture = export_model(settings, args.output, options)
    print(f"{args.output}: {settings.checkpoint} for {architecture}.from_pretrained")


def _from_hf(args: argparse.Namespace) -> None:
    if bool(args.model) == bool(args.language or args.vision) or bool(args.language) != bool(args.vision):
        raise UsageError("convert from-hf needs --language and --vision, or only --model", fix="see --help")
    import yaml

    from megatron_vlm.config import config_to_dict
    from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts

    model = load_section(ModelConfig, args.config, "model") if args.config else None
    if args.model:
        model = import_model(args.model, args.output, model)
    else:
        options = ImportOptions(projection=args.projection, feature_layer=args.feature_layer, seed=args.seed)
        model = import_parts(args.language, args.vision, args.output, options, model)
    print(f"# {args.output}: the model section for a training config; start with checkpoint.load_weights={args.output}")
    print(yaml.safe_dump({"model": config_to_dict(model)}, sort_keys=False), end="")
