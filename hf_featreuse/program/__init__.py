"""The training program behind `featreuse train`, in parts that your own program can use.

`arguments` defines its options, `parsing` and `config_file` read them from flags and files, and `checks` and
`output_dir` validate them before anything is loaded. `setup` and `models` load data and model, `running` trains and
evaluates, `reports` writes what `featreuse evaluate` and `featreuse predict` would, and `launching` launches several
processes.
"""

from hf_featreuse.program.arguments import DataArguments, ModelArguments, Options, RunArguments
from hf_featreuse.program.config_file import saved_options
from hf_featreuse.program.parsing import UsageError, parse_arguments
from hf_featreuse.program.running import exit_on_error, make_trainer, run, train_and_report
from hf_featreuse.program.setup import Setup, prepare

__all__ = [
    "DataArguments",
    "ModelArguments",
    "Options",
    "RunArguments",
    "Setup",
    "UsageError",
    "exit_on_error",
    "make_trainer",
    "parse_arguments",
    "prepare",
    "run",
    "saved_options",
    "train_and_report",
]
