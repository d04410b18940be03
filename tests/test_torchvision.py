"""A torchvision that was built for another torch is explained in one sentence; transformers hides it."""

import os
import subprocess
import sys

import pytest

from hf_featreuse.errors import IncompatibleVersionError, torchvision_misfit

SAID = "operator torchvision::nms does not exist"


@pytest.mark.parametrize(
    "said",
    [SAID, "/x/torchvision/_C.so: undefined symbol", "PyTorch and torchvision were compiled for other CUDA"],
)
def test_the_cause_is_found_below_what_transformers_raises(said):
    error = ModuleNotFoundError("Could not import module 'BaseImageProcessor'.")
    error.__cause__ = RuntimeError(said)
    found = torchvision_misfit(error)
    assert isinstance(found, IncompatibleVersionError)
    assert said in str(found) and "Install torchvision from the index that torch came from" in str(found)


def test_other_errors_are_left_alone():
    assert torchvision_misfit(None) is None
    assert torchvision_misfit(ImportError("requires the Torchvision library but it was not found")) is None
    missing = AttributeError("no such name")
    missing.__context__ = KeyError("name")
    assert torchvision_misfit(missing) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    ["from hf_featreuse import FeatureReuseTrainer", "from hf_featreuse.cli import main; main(['inspect', 'vit'])"],
)
def test_a_torchvision_for_another_torch_is_explained(code, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({SAID!r})\n")
    (tmp_path / "torchvision-0.99.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.99.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert f"The installed torchvision does not fit the installed torch ({SAID})" in run.stderr.splitlines()[-1]
