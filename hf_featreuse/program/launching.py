"""`featreuse train --launch N`: the same command in N processes, started by accelerate's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.program.arguments import Options
from hf_featreuse.program.output_dir import check_output_dir
from hf_featreuse.text import with_underscores
from hf_featreuse.trainer.arguments import FeatureReuseConfig

# Without these the launcher warns about defaults. Port 0 is any free port.
_LAUNCHER = (
    *("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)


def launch(options: Options, argv: Sequence[str]) -> int:
    """Run `featreuse train` in several processes and wait for them.

    Args:
        options (`Options`): the options of the run; `run.launch` is the number of processes.
        argv (`Sequence[str]`): the command line for the processes, without the name of the program.

    Returns:
        `int`: exit code; 0 if all processes succeeded. Each process prints its own messages.

    Raises:
        ConfigurationError: a launcher has started this process already, or there are fewer GPUs than processes.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    count = options.run.launch or 1
    _check(count, options.training.use_cpu)
    # Checked in this process, where an error is one line; in a launched process it is a traceback.
    check_output_dir(options)
    # The default of torchrun, which otherwise logs a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    words = [*_LAUNCHER, "--num_processes", str(count), "-m", "hf_featreuse", "train", *without_launch(argv)]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        code = next((failure.exitcode for failure in error.failures.values()), 1)
        print(f"featreuse: a process failed with exit code {code}; see above.", file=sys.stderr)
        return code if code > 0 else 1
    return 0


def check_one_gpu(args: FeatureReuseConfig) -> None:
    """Raise, before anything is loaded, if one process sees several GPUs: Trainer would use `DataParallel`.

    Args:
        args (`FeatureReuseConfig`): the options of training.

    Raises:
        ConfigurationError: the process sees several GPUs, and the run is not plain training.
    """
    if args.n_gpu > 1 and args.alternates:
        raise ConfigurationError(
            f"This process sees {args.n_gpu} GPUs, but feature reuse needs one process per GPU. Pass `--launch "
            f"{args.n_gpu}` to `featreuse train`, start other programs with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0 to train on one GPU."
        )


def without_launch(argv: Sequence[str]) -> list[str]:
    """Return the command line without `--launch N`."""
    words, left = iter(with_underscores(argv)), []
    for word in words:
        if word == "--launch":
            next(words, None)
        elif not word.startswith("--launch="):
            left.append(word)
    return left


def _check(count: int, use_cpu: bool) -> None:
    import torch

    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            f"`--launch {count}`: this process was already started by a launcher. Leave out `--launch` or the "
            "launcher."
        )
    gpus = torch.cuda.device_count()
    if not use_cpu and gpus < count:
        found = "there is no GPU" if not gpus else "there is 1" if gpus == 1 else f"there are {gpus}"
        fewer = f", `--launch {gpus}`" if gpus > 1 else ""
        raise ConfigurationError(
            f"`--launch {count}` needs {count} GPUs, but {found}. Pass `--use_cpu` to train on the CPU{fewer}, or "
            "leave out `--launch`."
        )
