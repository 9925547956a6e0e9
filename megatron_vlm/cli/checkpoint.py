"""`megatron-vlm checkpoint {list,verify,hash,diff}`."""

import argparse
from pathlib import Path

from megatron_vlm.cli.options import add_command
from megatron_vlm.cli.values import local_path
from megatron_vlm.config import CheckpointError, ExitCode

_ACTIONS = {
    "list": ("one line for each checkpoint of a run", "checkpoint list runs/pretrain"),
    "verify": (
        "compare every byte with the manifest",
        "checkpoint verify runs/pretrain/checkpoints/iter_0001000",
    ),
    "hash": ("sha256 of the gathered weights, the same for every parallel layout", "checkpoint hash runs/pretrain"),
}
_DIFF = "checkpoint diff runs/a runs/b/checkpoints/iter_0001000"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    text = "list and verify checkpoints; hash and compare their tensors"
    parser = add_command(subparsers, "checkpoint", text, *(example for _, example in _ACTIONS.values()), _DIFF)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (text, example) in _ACTIONS.items():
        action = add_command(actions, name, text, example)
        action.add_argument("folder", type=local_path, metavar="RUN", help="run folder, or one checkpoint")
    _add_diff(actions)
    parser.set_defaults(run=run)


def _add_diff(actions: argparse._SubParsersAction) -> None:
    text = "which tensors of two checkpoints differ, and by how much"
    notes = f"Exit code 0: all bits are equal; {ExitCode.BAD_DATA}: a tensor differs, or a checkpoint is damaged."
    add = add_command(actions, "diff", text, _DIFF, notes=notes).add_argument
    add(
        "folders", type=local_path, nargs=2, metavar="RUN", help="run folder (its newest checkpoint), or one checkpoint"
    )
    add("--optimizer", action="store_true", help="compare the optimizer's state, too")


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    if args.action == "hash":
        return _hash(args.folder)
    if args.action == "diff":
        return _diff(*args.folders, with_optimizer=args.optimizer)
    from megatron_vlm.checkpoint.verify import bases_of, checkpoint_folders, inspect_checkpoint

    damaged, folders = 0, checkpoint_folders(args.folder)
    for path in [*folders, *(bases_of(folders) if args.action == "verify" else ())]:
        facts = inspect_checkpoint(path, read_files=args.action == "verify")
        damaged += not facts.is_valid
        state = "; ".join(facts.faults) or ("valid" if args.action == "verify" else "has a manifest")
        print(f"{facts.path}  iteration {facts.iteration}  {facts.num_files} files  {facts.size / 1e6:.1f} MB  {state}")
    if damaged:
        raise CheckpointError(
            f"damaged checkpoints, listed above with their faults: {damaged}",
            where=str(args.folder),
            fix="use another checkpoint, or copy it again from where it is whole",
        )
    return ExitCode.DONE


def _find_whole(folder: Path) -> Path:
    """Return the checkpoint that is meant; every byte of it was compared with its manifest."""
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    from megatron_vlm.checkpoint.folder import find_checkpoint
    from megatron_vlm.checkpoint.verify import check_whole

    checkpoint = find_checkpoint(folder)
    check_whole(checkpoint)
    return checkpoint


def _diff(first: Path, second: Path, *, with_optimizer: bool) -> int:
    whole = [_find_whole(folder) for folder in (first, second)]
    from megatron_vlm.checkpoint.differences import compare_checkpoints

    num_tensors = num_different = 0
    for found in compare_checkpoints(*whole, with_optimizer=with_optimizer):
        num_tensors += 1
        if found.difference is not None:
            num_different += 1
            print(f"{found.name} {found.difference}")
    print(f"{num_different} of {num_tensors} tensors differ: {whole[0]} and {whole[1]}")
    return ExitCode.BAD_DATA if num_different else ExitCode.DONE


def _hash(folder: Path) -> int:
    checkpoint = _find_whole(folder)
    from megatron_vlm.checkpoint.tensors import hash_weights

    print(f"{hash_weights(checkpoint)}  {checkpoint}")
    return ExitCode.DONE
