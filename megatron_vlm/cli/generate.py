"""`megatron-vlm generate`: answer one prompt."""

import argparse
from pathlib import Path

from megatron_vlm.cli.model_options import add_model_options, open_from_options
from megatron_vlm.cli.options import add_command, add_options, read_options
from megatron_vlm.config import ExitCode
from megatron_vlm.config.inference import SamplingOptions

_EXAMPLES = (
    'generate runs/sft --image photo.jpg --prompt "What is unusual about this picture?"',
    'generate runs/pretrain --template none --image a.jpg b.jpg --prompt "<image> is a cat. <image> is"',
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = add_command(subparsers, "generate", "answer a prompt, with or without images", *_EXAMPLES)
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="the prompt; <image> marks the place of an image")
    text = "images, in order; without <image> in the prompt they come first"
    add("--image", type=Path, nargs="*", default=[], metavar="FILE", help=text)
    add_options(parser, SamplingOptions)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; returns the exit code."""
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    options = read_options(args, SamplingOptions)
    with open_from_options(args) as opened:
        from megatron_vlm.evaluation.answer import Prompt
        from megatron_vlm.evaluation.prompts import Exchange

        ids = opened.prompt_format.encode([Exchange(args.prompt, len(args.image))])
        opened.prompt_format.check_room([len(ids)], options.max_new_tokens)
        features = opened.generator.encode_images(opened.reader.read(args.image))
        prompt = Prompt(ids, tuple(range(len(args.image))))
        answer = next(opened.generator.generate([prompt], features, options))
        print(opened.prompt_format.tokenizer.decode(answer.ids).strip())
    return ExitCode.DONE
