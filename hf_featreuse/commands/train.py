"""The verb `featreuse train`; its flags are those of the training program."""

from __future__ import annotations

from collections.abc import Sequence


def run_program(argv: Sequence[str]) -> int:
    """Train in this process, or launch several, and return the exit code."""
    from hf_featreuse.program import parse_arguments, run

    if not any(word == "--launch" or word.startswith("--launch=") for word in argv):
        run(argv)
        return 0
    from hf_featreuse.program.launching import launch, without_launch

    options = parse_arguments(argv)
    if options.run.launch == 1:
        run(without_launch(argv))
        return 0
    return launch(options, argv)
