"""What the tests of the Hub run in a separate process, whose client uses the local server."""

import contextlib
import importlib.util
import io
import logging
import sys
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import IMAGE_SIZE, build, examples
from training_runs import config
from transformers import AutoModelForImageClassification, TrainerCallback, ViTImageProcessor

from hf_featreuse import FeatureReuseTrainer, HubError
from hf_featreuse.cli import main
from hf_featreuse.hub import push_folder

ADAPTER_LABELS = ("cat", "dog", "owl")
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_image_classification.py"


def set_up() -> None:
    """Wait a fiftieth of a second where the client would wait for seconds."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))


class Recorder(TrainerCallback):
    """Saves the weights after every step, outside of the output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(weights, self.folder / "writing")
        (self.folder / "writing").rename(self.folder / f"{state.global_step}.safetensors")


class Messages(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def listening():
    handler = Messages()
    logging.getLogger("hf_featreuse").addHandler(handler)
    try:
        yield handler.texts
    finally:
        logging.getLogger("hf_featreuse").removeHandler(handler)


def train(
    folder: Path,
    *,
    resume: str | None = None,
    base: str | None = None,
    push: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """Train a tiny ViT, or LoRA on `base`; `push` are arguments of a push afterwards. Return what happened."""
    with listening() as said:
        try:
            model: Any = build("vit")
            if base:
                labels = {
                    "id2label": dict(enumerate(ADAPTER_LABELS)),
                    "label2id": {label: index for index, label in enumerate(ADAPTER_LABELS)},
                }
                model = AutoModelForImageClassification.from_pretrained(base, **labels, ignore_mismatched_sizes=True)
                lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
                model = get_peft_model(model, lora)
            trainer = FeatureReuseTrainer(
                model,
                config(folder, **changed),
                train_dataset=examples(),
                eval_dataset=examples(8),
                processing_class=ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
                callbacks=[Recorder(folder.parent / f"{folder.name}-states")],
            )
            trainer.card_details = details or {}
            result = trainer.train(resume_from_checkpoint=resume)
            steps = result.global_step
            commit = None if push is None else trainer.push_to_hub(**push)
            if push is not None and push.get("blocking") is False:
                commit = commit.result()
            return {"steps": steps, "error": None, "said": said, "commit": commit and commit.oid}
        except HubError as error:
            return {"steps": locals().get("steps"), "error": str(error), "said": said}


def run_example(*flags: str) -> None:
    """Run the example as a user does."""
    spec = importlib.util.spec_from_file_location("run_image_classification", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.run(list(flags))


def push(folder: Path, repo: str, **options: Any) -> dict[str, Any]:
    with listening() as said:
        try:
            return {"url": push_folder(folder, repo, **options), "error": None, "said": said}
        except HubError as error:
            return {"error": str(error), "said": said}


def featreuse(*arguments: str) -> tuple[int, str, str]:
    """Exit code and output of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()
