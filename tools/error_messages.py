"""Every message of an error that the package raises, read from its source."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from error_advice import ADVICE, MADE

PACKAGE = Path(__file__).parents[1] / "hf_featreuse"
# What to do begins with one of these words: a sentence, or what follows a colon or semicolon.
WORDS = """add build call change check choose correct delete drop filter fix free give install keep leave load lower
make merge mend name override pass raise remove replace report resume return run save set start take train unfreeze use
wrap write""".split()
CAPITALISED = "|".join(word.capitalize() for word in WORDS)
IMPERATIVE = re.compile(rf"(?<=[.!?:,…)]) (?=(?:{CAPITALISED})\b)|(?<=[:;]) (?=(?:{'|'.join(WORDS)})\b)")


@dataclass(frozen=True)
class Message:
    """One place that raises an error.

    Args:
        module (`str`): of the package, such as `"data.loading"`.
        error (`str`): name of the class.
        text (`str`): the message, with `…` where a value stands; empty where a function makes it.
        maker (`str`): source of what makes the message, where it is no text.
    """

    module: str
    error: str
    text: str
    maker: str = ""

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong and what to do: as the message says, or as `error_advice` where it does not.

        Raises:
            KeyError: neither says what to do.
        """
        found, *rest = IMPERATIVE.split(self.text, maxsplit=1)
        if rest:
            return found.rstrip(" :;"), rest[0][0].upper() + rest[0][1:].strip()
        if self.maker:
            return MADE[self.maker.partition("(")[0]]
        if self.text not in ADVICE:
            raise KeyError(
                f"{self.module}: {self.text!r} does not say what to do. Say it there, or in error_advice.py."
            )
        return self.text, ADVICE[self.text]


def error_classes() -> set[str]:
    """Names of the error classes of the package."""
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def messages() -> list[Message]:
    """All messages, in order of module and line."""
    classes = error_classes()
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda node: node.lineno):
            if isinstance(call.func, ast.Name) and call.func.id in classes:
                text = _text(call.args[0])
                maker = "" if text.strip("… ") else ast.unparse(call.args[0])
                found.append(Message(module, call.func.id, "" if maker else text, maker))
    return found


def _text(node: ast.expr) -> str:
    """A string or f-string, with `…` or the name of a variable for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(_text, node.values)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"
