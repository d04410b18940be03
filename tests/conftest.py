"""One thread, no network, no progress bars: set before torch and the Hugging Face libraries are imported."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch's compiler imports it, and it refuses to come after pip, whose parser a test of the docs reads (Python 3.11).
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

# The examples import what they share, as they do when they are run as scripts.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytest.register_assert_rewrite("architecture_checks")

# Symbolic links, permissions and signals as POSIX has them.
if os.name == "nt":
    collect_ignore = [
        *("adversarial", "checkpoints/test_completeness.py", "checkpoints/test_failures.py"),
        *("checkpoints/test_kill.py", "checkpoints/test_output_lock.py", "commands/test_cli.py"),
        *("data/test_image_folders.py", "data/test_images.py", "distributed", "examples/test_example_labels.py"),
        *("hub/test_hub_links.py", "program/test_launching.py", "test_release.py"),
    ]

import transformers  # noqa: E402

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):

    def _activation_checkpointing_enable(model: transformers.PreTrainedModel, options: dict[str, object]) -> None:
        """As of transformers 5.23, which renamed it."""
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    transformers.PreTrainedModel.activation_checkpointing_enable = _activation_checkpointing_enable

# Of the tests that run over every architecture, the fast selection takes these; these take all.
QUICK = {"vit", "convnext", "swin", "resnet-basic", "hiera", "mobilevit", "siglip"}
ALL_QUICK = {
    "test_blocks_are_exactly_those_labeled",
    "test_a_step_is_drop_path_around_the_blocks",
    "test_a_step_with_sets_per_sample_is_drop_path_around_the_blocks",
}
# Files of which only the cases of ViT are in the fast selection.
VIT_ALONE = {"test_resume", "test_trainer", "test_trainer_binding"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        case, architecture = parameters.get("case"), parameters.get("architecture")
        beyond = case is not None and case.name not in QUICK and item.originalname not in ALL_QUICK
        other = item.path.stem in VIT_ALONE and architecture not in (None, "vit")
        if beyond or other:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _plain_log_level() -> Iterator[None]:
    """The examples set the level of the package's logger, as programs do: also in fixtures that outlive a test."""
    logger = logging.getLogger("hf_featreuse")
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(logging.NOTSET)
