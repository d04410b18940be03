"""The docs as a site: built strictly, every page in the navigation, every link and picture there, pages up to date."""

import collections
import html.parser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse

import pytest
from docs_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT / "tools"))
from generated_pages import pages

CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def in_navigation(entries):
    """The pages that a part of the navigation names."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else in_navigation(value)


def test_every_page_is_in_the_navigation_once():
    named = list(in_navigation(CONFIG["nav"]))
    assert sorted(named) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:])


# The site


class Links(html.parser.HTMLParser):
    """Collects what a page links to, and the anchors that it has."""

    def __init__(self):
        super().__init__()
        self.links, self.anchors = [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly from a copy."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "hf_featreuse", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def linked(site):
    """Links and anchors of every page of the site."""
    found = {}
    for path in site.rglob("*.html"):
        found[path] = Links()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site, linked):
    assert len(linked) > 30
    broken = []
    for path, page in linked.items():
        if path.name == "404.html":  # Its links are from the root of a server.
            continue
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = linked[target].anchors if target in linked else None
            if not target.is_file() or (parts.fragment and anchors is not None and parts.fragment not in anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(linked):
    for path in linked:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)"', text)
        loaded += re.findall(r'<link rel="(?:stylesheet|preload|preconnect)"[^>]*href="(https?:[^"]*)"', text)
        assert loaded == [], path
    assert any(link.startswith("https://arxiv.org") for page in linked.values() for link in page.links)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_links_to_exists(page):
    """In the repository too, where the pages are read as they are."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_counts_of_hostile_inputs_are_those_of_the_tests():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "tests/adversarial"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = collections.Counter(re.findall(r"^(tests/adversarial/\w+\.py)::\w+\[", done.stdout, flags=re.MULTILINE))
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8").partition("## Tested with damaged")[2]
    assert sorted(cases.values()) == sorted(map(int, re.findall(r"^\| [^|]+ \| (\d+) \|", text, flags=re.MULTILINE)))


# Generated pages


def test_generated_pages_are_up_to_date():
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python tools/generated_pages.py`."


def test_the_advice_on_options_is_on_those_that_there_are():
    from generated_pages import method_options
    from option_advice import WHEN

    assert set(re.findall(r"^\| `--(\w+)`", method_options(), flags=re.MULTILINE)) == set(WHEN)
