"""One thread, no network, no progress bars: set before torch and the Hugging Face libraries are imported."""

import os

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

pytest.register_assert_rewrite("architecture_checks")
