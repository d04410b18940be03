"""A card escapes what it quotes: Markdown, HTML, YAML, formulas and Python in names and values have no effect."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from hub_card_rules import card_problems
from tiny_checkpoints import save

from hf_featreuse.hub import build_model_card, folders
from hf_featreuse.hub.folders import check_folder_to_push, push_folder
from hf_featreuse.hub.markdown import markdown_code, markdown_text

HOSTILE = [
    "a|b", "<script>alert(1)</script>", "![x](http://e.vil/x.png)", "[a](javascript:b)", "`code`", "``` x ```",
    "**bold** _it_ ~~x~~", "$x^2$", "&lt;", "x\n---\nlicense: mit\n", "x\r\n# Heading", "a: b # c",
    '"quoted" \\ \'x\'', '"); import os; os.abort() #', "\x1b[31mred", "\u202egnp.exe", "{{ card_data }}",
    "x</details>", "!@#%^*()",
]  # fmt: skip


def card_of(**changed) -> str:
    arguments = {
        "model_name": "ada/digits", "settings": {"drop_rate": 0.5}, "metrics": {"eval_loss": 1.0}, "training": {},
        "architecture": "ViT", "block_names": ["a.0"], "dataset_name": "d",
    }  # fmt: skip
    return str(build_model_card(**{**arguments, **changed}))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_quoted_text_changes_what_the_card_is(text):
    card, plain = card_of(**everywhere(text)), card_of(**everywhere("word"))
    (data, body), (data_of_plain, body_of_plain) = _parts(card), _parts(plain)
    assert structure(body) == structure(body_of_plain)
    assert data.keys() == data_of_plain.keys() and card_problems(card) == card_problems(plain)
    assert all(character.isprintable() or character == "\n" for character in card)
    assert not re.search(r"(?<!\\)\$", re.sub(r"(`+).+?\1|```python.*?```", "", body, flags=re.DOTALL))


def structure(body: str) -> list[tuple[str, str]]:
    """The elements of a text in Markdown with tables, and its HTML; words and code may differ."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return [
        (token.type, token.content if "html" in token.type else token.tag)
        for block in parser.parse(body)
        for token in [block, *(block.children or [])]
    ]


def everywhere(text: str) -> dict:
    return {
        "model_name": text.replace("/", "").replace("\\", "") + "x",
        "settings": {"drop_rate": 0.5, text: text},
        "training": {"learning_rate": text, text: 1},
        "metrics": {"eval_loss": 1.0, f"eval_{text}": 2.0},
        "architecture": text,
        "block_names": [text, "a.0"],
        "dataset_name": f"data {text}".replace("/", "").replace("\\", ""),
        "dataset_split": text,
        "adapter": "LORA",
    }


def _parts(card: str) -> tuple[dict, str]:
    block = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    return yaml.safe_load(block[1]), block[2]


def test_plain_words_are_not_escaped():
    assert markdown_text("adamw_torch 1e-3, cosine (0.1)") == "adamw_torch 1e-3, cosine (0.1)"
    assert markdown_text("_x_ a__b <b>") == r"\_x\_ a\_\_b \<b\>"
    assert markdown_code("a`b``c") == "```a`b``c```" and markdown_code("`x`") == "`` `x` ``"
    assert markdown_code("a|b") == "`a|b`" and markdown_code("a|b", in_table=True) == r"`a\|b`"


@pytest.mark.parametrize("name", ['a"b', "a\\b", 'x"); import os #', "naïve", "a'b", "x\ny"])
def test_the_snippet_quotes_the_name_of_the_repository(name):
    for adapter in (None, "LORA"):
        card = card_of(model_name=name.replace("\\", ""), adapter=adapter)
        code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
        value = next(node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign))
        assert ast.literal_eval(value) == " ".join(name.replace("\\", "").split())


def test_the_architecture_is_code_only_if_it_is_a_name():
    code = card_of(architecture="x(); import os; os.abort", from_pretrained=False)
    assert "model = Model()  #" in code and "os.abort()" not in code


@pytest.mark.parametrize("architectures", [["<img src=x>`|"], [5], {"a": 1}, "ViT", [], None])
def test_a_foreign_configuration_is_escaped(tmp_path, architectures):
    folder = Path(save(tmp_path / "model"))
    config = {**json.loads((folder / "config.json").read_text()), "architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    card = check_folder_to_push(folder, "ada/x", new_card=True)
    named = "``<img src=x>`|``" if architectures == ["<img src=x>`|"] else "`AutoModelForImageClassification`"
    assert f"An image classifier ({named})." in card


def test_a_card_of_another_repository_with_quotes_in_its_name_is_made_to_name_this_one(tmp_path, monkeypatch):
    folder, sent = Path(save(tmp_path / "model")), {}
    (folder / "README.md").write_text(card_of(model_name='my "first" run'))
    monkeypatch.setattr(folders, "make_repository", lambda *_: "ada/x")
    monkeypatch.setattr(folders, "send", lambda _api, _target, files, *_: sent.update(files) or _Commit)
    push_folder(folder, "ada/x")
    assert 'repository = "ada/x"\n' in sent["README.md"].decode()


class _Commit:
    commit_url = "http://hub/commit"


# Without an image processor


@pytest.mark.parametrize("adapter", [None, "LORA"])
def test_no_card_promises_what_needs_an_image_processor_without_one(adapter):
    with_one, without = (card_of(adapter=adapter, has_processor=has) for has in (True, False))
    needs = ("pipeline(", "AutoImageProcessor")
    assert any(word in with_one for word in needs) and not any(word in without for word in needs)
    assert "There is no image processor" in without and "There is no image processor" not in with_one
    ast.parse(re.search(r"```python\n(.*?)\n```", without, re.DOTALL)[1])


def test_a_push_without_an_image_processor_warns(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(folders.logger, "warning", said.append)
    monkeypatch.setattr(folders, "make_repository", lambda *_: "ada/x")
    monkeypatch.setattr(folders, "send", lambda *_: _Commit)
    folder = Path(save(tmp_path / "model"))
    push_folder(folder, "ada/x", new_card=True)
    assert said == []
    (folder / "preprocessor_config.json").unlink()
    push_folder(folder, "ada/x", new_card=True)
    assert len(said) == 1 and "holds no image processor" in said[0] and "save_pretrained" in said[0]
    assert "pipeline(" not in check_folder_to_push(folder, "ada/x", new_card=True)
