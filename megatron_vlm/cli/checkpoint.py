"""`megatron-vlm checkpoint {list,verify,hash}`."""

import argparse
from pathlib import Path

from megatron_vlm.cli.options import add_command
from megatron_vlm.cli.values import local_path
from megatron_vlm.config import ExitCode

_ACTIONS = {
    "list": ("one line for each checkpoint of a run", "checkpoint list runs/pretrain"),
    "verify": (
        "compare every byte with the manifest",
        "checkpoint verify runs/pretrain/checkpoints/iter_0001000",
    ),
    "hash": ("sha256 of the gathered weights, the same for every parallel layout", "checkpoint hash runs/pretrain"),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    text = "list and verify checkpoints; hash their weights"
    parser = add_command(subparsers, "checkpoint", text, *(example for _, example in _ACTIONS.values()))
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (text, example) in _ACTIONS.items():
        action = add_command(actions, name, text, example)
        action.add_argument("folder", type=local_path, metavar="RUN", help="run folder, or one checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    if args.action == "hash":
        return _hash(args.folder)
    from megatron_vlm.checkpoint.verify import bases_of, checkpoint_folders, inspect_checkpoint

    all_valid, folders = True, checkpoint_folders(args.folder)
    for path in [*folders, *(bases_of(folders) if args.action == "verify" else ())]:
        facts = inspect_checkpoint(path, read_files=args.action == "verify")
        all_valid &= facts.is_valid
        state = "; ".join(facts.faults) or ("valid" if args.action == "verify" else "has a manifest")
        print(f"{facts.path}  iteration {facts.iteration}  {facts.num_files} files  {facts.size / 1e6:.1f} MB  {state}")
    return ExitCode.DONE if all_valid else ExitCode.BAD_DATA


def _hash(folder: Path) -> int:
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    from megatron_vlm.checkpoint.folder import find_checkpoint
    from megatron_vlm.checkpoint.tensors import hash_weights
    from megatron_vlm.checkpoint.verify import check_whole

    checkpoint = find_checkpoint(folder)
    check_whole(checkpoint)
    print(f"{hash_weights(checkpoint)}  {checkpoint}")
    return ExitCode.DONE
