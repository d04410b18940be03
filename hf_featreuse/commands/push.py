"""The command `featreuse push`: push a finished run, or any saved model, to the Hub."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="the output folder of a run, one of its checkpoints, or a folder that `featreuse prune` or "
        "`save_pretrained` wrote",
    )
    parser.add_argument("repository", metavar="REPO", help="owner/name, or a name in your own namespace")
    visibility = parser.add_mutually_exclusive_group()
    for name, meaning in (("private", True), ("public", False)):
        visibility.add_argument(
            f"--{name}",
            dest="private",
            action="store_const",
            const=meaning,
            default=argparse.SUPPRESS,
            help=f"make a new repository {name}; by default the owner's settings apply",
        )
    parser.add_argument(
        "--revision", metavar="BRANCH", default=argparse.SUPPRESS, help="a branch, created if missing; default: main"
    )
    parser.add_argument(
        "--token", default=argparse.SUPPRESS, help="by default HF_TOKEN, or the token that `hf auth login` stored"
    )
    parser.add_argument("--checkpoints", action="store_true", help="push the folders checkpoint-<step> of a run too")
    parser.add_argument(
        "--new_card",
        action="store_true",
        help="if the folder holds no model card, push a short one without details of training",
    )
    parser.add_argument("--message", default="Upload model", help="message of the commit")


def run(options: argparse.Namespace) -> str:
    """Push, and return the address."""
    from pathlib import Path

    from hf_featreuse.hub.folders import processor_note, push_folder

    url = push_folder(
        options.folder,
        options.repository,
        private=getattr(options, "private", None),
        revision=getattr(options, "revision", None),
        token=getattr(options, "token", None),
        checkpoints=options.checkpoints,
        new_card=options.new_card,
        message=options.message,
    )
    note = processor_note(Path(options.folder))
    return f"pushed {options.folder} to {url}" + (f"\nNote: {note}" if note else "")
