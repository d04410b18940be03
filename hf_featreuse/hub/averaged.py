"""Write the model of a checkpoint with its averaged weights, which are stored next to the trained ones."""

from __future__ import annotations

from pathlib import Path

import safetensors
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hf_featreuse.checkpoints.weights import load_weights
from hf_featreuse.data.evaluation import open_classifier
from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.recipe.weight_average import AVERAGE_FILE, WeightAverage


def save_averaged(checkpoint: Path, folder: str | Path) -> list[Path]:
    """Write the model of a checkpoint with its averaged weights into another folder, and return the files.

    Raises:
        ConfigurationError: the checkpoint is an adapter's.
        CheckpointError: the model cannot be loaded, or the average is of another model.
    """
    average_file = checkpoint / AVERAGE_FILE
    if (checkpoint / ADAPTER_CONFIG_NAME).is_file():
        raise ConfigurationError(
            f"`{checkpoint}` holds an adapter's weights without averaging, and their average separately in "
            f"{AVERAGE_FILE}. Pass the folder of the finished run, which holds the averaged weights. If there is "
            "none, first resume from this checkpoint with `max_steps` set to its own step, or delete "
            f"{AVERAGE_FILE} to push the weights without averaging."
        )
    try:
        model = open_classifier(str(checkpoint), needs_processor=False, local_files_only=True, dtype="auto").model
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The model in {checkpoint} cannot be loaded to give it the weights of {AVERAGE_FILE}: "
            f"{str(error).splitlines()[0]}. Push the folder of the finished run, or delete {AVERAGE_FILE} to push the "
            "weights without averaging."
        ) from error
    # Strictly: `from_pretrained` fills missing weights at random.
    load_weights(model, checkpoint)
    with safetensors.safe_open(average_file, framework="pt") as file:
        averaged = set(file.keys())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in averaged)
    average = WeightAverage(model, decay=0.5)
    average.load(checkpoint)
    average.copy_to_model()
    model.save_pretrained(folder)
    return sorted(Path(folder).iterdir())
