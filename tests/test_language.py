"""Code and docs use the words of PyTorch and TRL: phrases of a translation are found, with what to write instead."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("*.py", "*.md", "*.toml", "*.yml", "*.ipynb")
# Between two words: whitespace, or the end of a line of a comment, or of a part of a string.
GAP = r'(?:\s*"\s*\n\s*f?"|\s*\n\s*# |\s+)'
COMPARED = "better|deeper|different|earlier|faster|fewer|higher|larger|later|less|longer|lower|more|slower|smaller"
# Regular expressions without good uses; a blank in one is any gap. "There is no file" and "is no longer" are English.
PHRASES = {
    rf"(?<!there\s)(?<!There\s)(?:is|are) no (?!(?:{COMPARED})\b)[a-z]+": "is not a ..., has no ...",
    r"to the bit|by bits|test_\w*_to_the_bit\w*": "bit-identical, bitwise",
    r"[Mm]ends?|[Mm]ended|_?MEND": "fix, fixed",
    r"anew": "again",
    r"[Bb]esides|beside(?=\s(?:[a-z]+\s|`))": "next to, in addition to",
    r"goes on|test_\w*_goes_on\w*": "continues, resumes",
    r"at rest|(?:what|that|which) rests?": "is frozen, does not change",
    r"says? so|test_\w*_says_so\w*|(?<!\)\s)(?:is|are) said(?! to)|test_\w*_is_said\w*": "logs, warns, reports",
    r"goes with": "works with, is compatible with",
    r"in the mean": "on average",
    r"at hand": "available",
    r"ahead by more than": "significantly better (95 % CI)",
    # "The plans of your own schedule" is English: no noun follows here.
    r"of (?:your|one's|its|their|our) own(?=\W*$|[^\s\w]|\s(?:and|as|can|for|in|is|on|or|that|with)\b)": "your own",
    r"that trains? alone": "only the trained parameters",
    r"bytes a step(?=[.,;:)|]|\s(?:of|than|with|under)\s)|(?:sets?|once) a (?:step|sample|batch|run)": "per step",
    r"where (?:it has|they have|there is|there are) (?:one|none|some)|where (?:that|it) fails": "if it has one",
}
PATTERNS = [
    (re.compile(rf"(?<![\w-])(?:{phrase.replace(' ', GAP)})(?![\w-])"), instead) for phrase, instead in PHRASES.items()
]


def prose(path: Path) -> str:
    """Return the text of a file; of a notebook the sources of its cells; without quotations in Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return re.sub(r"^>.*$", "", text, flags=re.MULTILINE) if path.suffix == ".md" else text


def findings(text: str) -> list[tuple[int, str, str]]:
    """Return line, phrase and what to write instead, for each phrase in a text."""
    found = [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead)
        for pattern, instead in PATTERNS
        for match in pattern.finditer(text)
    ]
    return sorted(found)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("`runs` is no folder.", "is no folder"),
        ('raise ValueError(\n    f"`{x}` is no "\n    f"folder.")', 'is no " f"folder'),
        ("# Equal to\n    # the bit.", "to # the bit"),
        ("a loss of your own", "of your own"),
        ("def test_a_run_goes_on_exactly():", "test_a_run_goes_on_exactly"),
        ("There is no file, and it is no longer read. A subclass of its own class.", None),
    ],
)
def test_phrases_are_found_across_lines(text, phrase):
    assert [found for _, found, _ in findings(text)] == ([] if phrase is None else [phrase])


def test_no_phrase_of_a_translation_is_left():
    listed = subprocess.run(["git", "ls-files", *KINDS], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write instead: {instead}"
        for path in paths
        if path.name != Path(__file__).name
        for line, phrase, instead in findings(prose(path))
    ]
    assert not found, "\n".join([f"{len(found)} phrases are not plain English:", *found])
