"""Write the page of all options, docs/options.md.

python tools/generated_pages.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path

from option_advice import WHEN
from transformers import HfArgumentParser, TrainingArguments

from hf_featreuse import FeatureReuseConfig
from hf_featreuse.cli import VERBS
from hf_featreuse.program import DataArguments, ModelArguments, RunArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def cell(text: str) -> str:
    """Return text for a table: one line, with Markdown outside of code escaped."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    prose = [part.replace("<", "&lt;").replace("*", "\\*") if i % 2 == 0 else part for i, part in enumerate(parts)]
    return "`".join(prose)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Options


def shown(value: object) -> str:
    """Return a default in the form for the command line."""
    return "-" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def method_options() -> str:
    """Return the options that FeatureReuseConfig adds to TrainingArguments, with when to use each."""
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = [field for field in dataclasses.fields(FeatureReuseConfig) if field.name not in theirs]
    rows = [
        [f"`--{field.name}`", shown(field.default), cell(field.metadata["help"]), cell(WHEN[field.name])]
        for field in ours
    ]
    return table(["option", "default", "what it does", "when to use it"], rows)


def parser_options(parser: argparse.ArgumentParser, *, skip: frozenset[str] = frozenset()) -> str:
    """Return the arguments of a parser, with their help."""
    rows = []
    for action in parser._actions:
        if action.dest in skip or action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        names = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        name = f"`{names[0] if names else action.metavar or action.dest}`"
        choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
        given = None if action.default == argparse.SUPPRESS else action.default
        # argparse needs percent signs doubled.
        help_text = str(action.help).replace("%%", "%")
        text = f"{help_text}{'' if str(action.help).endswith('.') else '.'}{choices}"
        rows.append([name, shown(given), cell(text)])
    return table(["option", "default", "what it does"], rows) if rows else "It has no options.\n"


def program_options() -> str:
    """Return the other options of `featreuse train`, by topic: neither of the method nor of TrainingArguments."""
    topics = {"data": DataArguments, "model": ModelArguments, "run": RunArguments}
    return "\n".join(f"### The {topic}\n\n{parser_options(HfArgumentParser(kind))}" for topic, kind in topics.items())


def verb_options() -> str:
    """Return the arguments of each verb of the command `featreuse`."""
    texts = []
    for verb in VERBS:
        if verb.is_program:
            continue
        parser = argparse.ArgumentParser()
        importlib.import_module(f"hf_featreuse.commands.{verb.name}").add_arguments(parser)
        texts.append(f"### `featreuse {verb.name}`\n\n{verb.description}\n\n{parser_options(parser)}")
    return "\n".join(texts)


OPTIONS = """\
# Options

Every option of this package, generated from the help of its programs. Those of `transformers.TrainingArguments`, such
as learning rate, batch size and checkpoints, are unchanged and not listed.

## Options of the method

Fields of [`FeatureReuseConfig`](api/training.md), and flags of `featreuse train`, of the example without a Trainer and
of `finetune_lora.py`. [The method](method.md) explains what a step does with each, and
[which of them make a published method](method.md#published-methods-as-options).

{method}
**Where to begin.** From scratch and for long: the defaults. Fine-tuning: `--drop_rate 0.1`. Compare with
`--drop_rate 0`, plain training, and with `--masked_freeze_steps 0`, only stochastic depth, on your data; see
[results](results.md).

`--torch_compile`, of TrainingArguments, compiles block by block instead of the whole model.

## Options of the training program

[`featreuse train`](training.md) and `examples/run_image_classification.py` take these in addition. Dashes and
underscores are equivalent in flags.

{program}
## Options of the other commands

{verbs}"""


def options_page() -> str:
    """Return the whole page of options."""
    return OPTIONS.format(method=method_options(), program=program_options(), verbs=verb_options())


def pages() -> dict[Path, str]:
    """Return each generated file with its text."""
    return {DOCS / "options.md": options_page()}


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
