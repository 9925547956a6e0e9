"""`megatron-vlm generate`: answer one prompt."""

import argparse
from pathlib import Path

from megatron_vlm.cli.model_options import add_model_options, open_from_options
from megatron_vlm.cli.values import positive, seed, whole_number
from megatron_vlm.config import ExitCode

_EXAMPLE = """\
examples:
  megatron-vlm generate runs/sft --image photo.jpg --prompt "What is unusual about this picture?"
  megatron-vlm generate runs/pretrain --template none --image a.jpg b.jpg --prompt "<image> is a cat. <image> is"
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a prompt about pictures with a checkpoint",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, bare_template=True)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="may hold <image> where a picture stands")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="pictures, in order; put first without <image>",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=whole_number(0), default=0, metavar="K", help="draw from the K most likely; 0: from all"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely that sum to P")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; returns the exit code."""
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    with open_from_options(args) as opened:
        from megatron_vlm.evaluation.answer import Prompt
        from megatron_vlm.evaluation.prompts import Exchange
        from megatron_vlm.evaluation.sampling import SamplingOptions

        options = SamplingOptions(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        ids = opened.prompt_format.encode([Exchange(args.prompt, len(args.image))])
        features = opened.generator.encode_images(opened.reader.read(args.image))
        prompt = Prompt(ids, tuple(range(len(args.image))))
        answer = next(opened.generator.generate([prompt], features, options))
        print(opened.prompt_format.tokenizer.decode(answer.ids).strip())
    return ExitCode.DONE
