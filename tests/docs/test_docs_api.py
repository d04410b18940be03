"""Every public name is on an API page, and the docstrings are as mkdocstrings reads them."""

import importlib
import inspect
import re
import sys

import pytest
from docs_blocks import ROOT
from test_layout import PUBLIC_MODULES

sys.path.insert(0, str(ROOT / "tools"))
from docstrings import adapt

DOCUMENTED = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


def public_names(module_name):
    """What a public module exports: `__all__`, or what it defines without an underscore."""
    module = importlib.import_module(module_name)
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module_name
        if inspect.isclass(value) or inspect.isfunction(value)
    ]
    return getattr(module, "__all__", own)


@pytest.mark.parametrize("module", sorted(PUBLIC_MODULES))
def test_every_public_name_is_on_an_api_page(module):
    package = importlib.import_module("hf_featreuse")
    for name in public_names(module):
        # What the package itself exports is documented there.
        home = "hf_featreuse" if name in package.__all__ else module
        assert f"{home}.{name}" in DOCUMENTED, f"add `::: {home}.{name}` to a page of docs/api"


def test_no_name_is_documented_twice_and_each_exists():
    assert len(set(DOCUMENTED)) == len(DOCUMENTED) > 60
    for name in DOCUMENTED:
        module, _, attribute = name.rpartition(".")
        assert attribute in public_names(module), name


def test_types_defaults_and_references_are_adapted():
    docstring = """Do it.

    Args:
        rate (`float`, defaults to 0.5): how often, as in [`FeatureReuseSchedule.plan`].
        target (`str` or `list[str]`, *optional*): which.

    Returns:
        `Path`: the file.

    Example:
        >>> 1
        1
    """
    adapted = adapt(inspect.cleandoc(docstring), "hf_featreuse.method.feature_reuse.FeatureReuse.plan")
    assert (
        "rate (float): how often, as in [`FeatureReuseSchedule.plan`][hf_featreuse.FeatureReuseSchedule.plan]."
        in adapted
    )
    assert "target (str | list[str]): which." in adapted
    assert "Returns:\n    Path: the file." in adapted
    assert "Examples:\n" in adapted


@pytest.mark.parametrize(
    ("path", "reference", "expected"),
    [
        ("hf_featreuse.method.feature_reuse.FeatureReuse.active_parameters", "step", "hf_featreuse.FeatureReuse.step"),
        ("hf_featreuse.data.metrics.TopKAccuracy", "rank_top_k", "hf_featreuse.data.metrics.rank_top_k"),
        ("hf_featreuse.data.transforms.EvalTransform.one", "ImageTransform", "hf_featreuse.data.ImageTransform"),
        ("hf_featreuse.analysis.report.write_report", "analyze_model", "hf_featreuse.analysis.analyze_model"),
        ("hf_featreuse.method.cost.StepCosts", "measure_step_costs", "hf_featreuse.measure_step_costs"),
    ],
)
def test_a_reference_leads_to_where_the_name_is_documented(path, reference, expected):
    assert adapt(f"[`{reference}`]", path) == f"[`{reference}`][{expected}]"
