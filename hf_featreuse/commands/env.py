"""The verb `featreuse env`: the environment for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

_REQUIRED = (
    *("hf_featreuse", "torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "peft"),
    *("numpy", "pillow", "safetensors"),
)
_OPTIONAL = (
    *("matplotlib", "scikit-learn", "timm", "torchvision", "tensorboard", "wandb", "trackio", "optuna", "onnx"),
    *("onnxruntime", "openvino", "executorch"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb: none."""


def run(options: argparse.Namespace) -> str:
    """List versions, platform and devices; no paths, names or tokens."""
    import torch

    lines = [("Python", f"{platform.python_version()} ({platform.python_implementation()})")]
    lines += [("platform", f"{platform.system()} {platform.release()} {platform.machine()}")]
    lines += [(name, _version(name) or "not installed") for name in _REQUIRED]
    lines += [(name, version) for name in _OPTIONAL if (version := _version(name))]
    # The version in the metadata omits the CUDA version of the build.
    lines += [("torch's build", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")]
    lines += [("threads", f"{torch.get_num_threads()}")]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines += [("GPUs", ", ".join(devices) or ("mps" if torch.backends.mps.is_available() else "none"))]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
