"""What is released fits together: versions, dependencies, supported Pythons, and the commands of the workflows."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_featreuse
from hf_featreuse.trainer.private_names import TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
# Those that are not an extra of ours.
OF_OTHERS = {canonicalize_name(entry.name): entry for entry in REQUIREMENTS if entry.name != PROJECT["name"]}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = {"3.11", "3.12", "3.13", "3.14"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file by the names of the packages."""
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    entries = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(entries), [line for line, entry in zip(lines, entries, strict=True) if not entry]
    found = {canonicalize_name(entry[1]): Version(entry[2]) for entry in entries}
    assert len(found) == len(lines), f"{name} names a package twice"
    return found


# Versions


def test_versions_agree():
    version = Version(hf_featreuse.__version__)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == str(version)
    assert tomllib.loads(read("zensical.toml"))["project"]["copyright"].startswith(f"hf_featreuse {version} ")
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings
    if version.is_devrelease:
        assert headings[0] == ("Unreleased", "")
        assert f"This will be {version.base_version}," in read("CHANGELOG.md")
        assert "date-released" not in citation
        released = headings[1:]
    else:
        assert headings[0] == (str(version), str(citation["date-released"]))
        released = headings
    versions = [Version(text) for text, _ in released]
    assert versions == sorted(versions, reverse=True)
    assert all(found <= version for found in versions)


def test_license_is_the_same_everywhere():
    assert PROJECT["license"] == yaml.safe_load(read("CITATION.cff"))["license"] == "Apache-2.0"
    assert read("LICENSE").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_the_address_of_the_repository_is_the_same_everywhere():
    address = PROJECT["urls"]["Repository"]
    assert all(url.startswith(address) for url in PROJECT["urls"].values())
    assert yaml.safe_load(read("CITATION.cff"))["repository-code"] == address
    assert f'href="{address}"' in tomllib.loads(read("zensical.toml"))["project"]["copyright"]
    hook = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    raw = address.replace("github.com", "raw.githubusercontent.com")
    for entry, start in zip(hook["substitutions"], (f"]({raw}/main/", f"]({address}/blob/main/"), strict=True):
        assert start in entry["replacement"]
    assert address in read(".github/ISSUE_TEMPLATE/config.yml")


def test_links_of_the_readme_are_absolute_in_the_metadata():
    hook = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = read("README.md")
    for entry in hook["substitutions"]:
        text = re.sub(entry["pattern"], entry["replacement"], text)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    # A page of the repository is not a picture.
    assert pictures
    assert [picture for picture in pictures if "/blob/" in picture] == []


# Dependencies


def test_lowest_constraints_are_the_lower_bounds():
    bounds = {}
    for name, requirement in OF_OTHERS.items():
        lower = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        assert len(lower) == 1, f"{requirement} must have one lower bound"
        assert bounds.setdefault(name, lower[0]) == lower[0]
    assert pins("constraints-lowest.txt") == bounds


def test_pinned_versions_fit_what_the_package_asks_for():
    pinned = pins("constraints.txt")
    for name, requirement in OF_OTHERS.items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, f"constraints.txt pins {name} {pinned[name]}, not {requirement}"


def test_the_trainer_accepts_the_releases_that_were_tested():
    pinned, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for name, (oldest, newest) in TESTED.items():
        assert Version(oldest) == lowest[name]
        assert pinned[name].release[:2] <= Version(newest).release
    # A newer one warns: the pin is the newest that was tested.
    assert pinned["transformers"].release[:2] == Version(TESTED["transformers"][1]).release


def test_every_dependency_of_the_package_has_its_reason():
    lines = read("pyproject.toml").partition("\ndependencies = [")[2].partition("]\n")[0].strip().splitlines()
    assert len(lines) == len(PROJECT["dependencies"])
    assert [line for line in lines if "#" not in line] == ['  "torch>=2.11",']


def test_extras_have_the_usual_names_and_reasons():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) >= {"all", "dev", "docs", "examples", "export", "plot", "test", "timm", "trackers"}
    (everything,) = map(Requirement, extras["all"])
    # timm brings torchvision, which must fit torch's build.
    assert everything.extras == {"export", "plot", "trackers"}
    lines = read("pyproject.toml").partition("\n[project.optional-dependencies]")[2].partition("\n[")[0].splitlines()
    named = [line for line in lines if re.match(r'  "[\w-]+>=', line)]
    assert named
    assert [line for line in named if "#" not in line] == []


def test_pythons_are_the_same_everywhere():
    classified = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: \d\.\d+$", text)}
    assert classified == PYTHONS
    assert PROJECT["requires-python"] == f">={min(PYTHONS, key=Version)}"
    matrix = jobs()["tests"]["strategy"]["matrix"]
    assert set(matrix["python"]) == PYTHONS
    assert {entry["dependencies"] for entry in matrix["include"]} == {"lowest", "newest"}


def test_the_lowest_dependencies_run_the_fast_selection():
    (lowest,) = [entry for entry in jobs()["tests"]["strategy"]["matrix"]["include"] if "lowest" in entry["options"]]
    assert ["pytest", "-m", "not slow"] in commands({**jobs()["tests"], "strategy": {"matrix": {"include": [lowest]}}})


# Workflows


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in WORKFLOWS:
        found |= yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def test_there_is_a_job_for_each_check():
    assert set(jobs()) >= {"lint", "types", "tests", "systems", "export", "docs", "wheel", "audit", "build", "publish"}


def test_what_is_published_was_built_and_checked_before():
    assert jobs()["publish"]["needs"] == "build"
    assert [".ci/wheel", "dist"] in commands(jobs()["build"])
    uploaded, downloaded = (
        step["with"]["name"]
        for job in ("build", "publish")
        for step in jobs()[job]["steps"]
        if "name" in step.get("with", {})
    )
    assert uploaded == downloaded


@pytest.mark.parametrize(("tag", "code"), [("v0.1.0", 0), ("v0.2.0", 1), ("main", 1)])
def test_a_tag_must_be_the_version_of_the_wheel(tag, code, tmp_path):
    (tmp_path / "hf_featreuse-0.1.0-py3-none-any.whl").touch()
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run([ROOT / ".ci" / "check_tag", tmp_path], env=environment, capture_output=True, check=False)
    assert done.returncode == code


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_reads_only_and_gives_up_in_time(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60, name
        # Publishing proves by this token who it is; a password is stored nowhere.
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        for step in job["steps"]:
            # Exactly one of the two.
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                allowed = r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1"
                assert re.fullmatch(allowed, step["uses"]), step


def commands(job: dict[str, Any]) -> list[list[str]]:
    """The words of each command, a matrix job's once for each of its options."""
    matrix = job.get("strategy", {}).get("matrix", {})
    entries = [*({"options": option} for option in matrix.get("options", [])), *matrix.get("include", [])] or [{}]
    lines = [line for step in job["steps"] if "run" in step for line in step["run"].strip().splitlines()]
    filled = [
        line.replace("${{ matrix.options }}", entry.get("options", "")).replace(
            "${{ matrix.selection }}", entry.get("selection", "")
        )
        for entry in entries
        for line in lines
    ]
    assert not [line for line in filled if "${{" in line]
    # Without the variables that are set before a command.
    return [[word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)] for line in dict.fromkeys(filled)]


@pytest.mark.parametrize("name", jobs())
def test_every_command_of_a_workflow_exists(name):
    installed: set[str] = set()
    for program, *words in commands(jobs()[name]):
        if program == "pip":
            assert words[0] == "install"
            installed |= {word for word in words[1:] if not word.startswith("-")}
            for option, file in itertools.pairwise(words):
                assert option != "-c" or (ROOT / file).is_file(), file
            for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), extras
        elif "/" in program:
            assert os.access(ROOT / program, os.X_OK), program
        else:
            # Installed by name just before, or by one of our extras and so next to this Python.
            beside = shutil.which(program, path=str(Path(sys.executable).parent))
            assert program in installed or beside, program


@pytest.mark.parametrize("path", sorted((ROOT / ".ci").iterdir()), ids=lambda path: path.name)
def test_scripts_are_executable_and_read_by_bash(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
