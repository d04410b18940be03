"""The code blocks of the README and the pages of docs/, and the command lines in them."""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    name = page.relative_to(ROOT).as_posix()
    return [Block(name, language, text) for language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[list[str]]:
    """Each program that a block calls, with its arguments; assignments of variables before it are left out."""
    joined = block.text.replace("\\\n", " ")
    if block.language == "console":
        joined = "\n".join(line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ "))
    commands = []
    for line in joined.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word and set(word) <= set("&|;"):
                commands.append(command)
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                command.append(word)
    return [command for command in commands if command]


COMMANDS = {
    (block.page, shlex.join(command)): command
    for block in BLOCKS
    if block.language in ("bash", "console")
    for command in commands_of(block)
}


class Parsed(BaseException):
    """Raised instead of going on, once a program has read its command line."""


def stop_after_parsing(monkeypatch) -> None:
    """Let every argparse parser raise `Parsed` where it would hand back what it read."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
