"""Fine-tune an image classifier with LoRA and feature reuse: only low-rank adapters in its residual blocks train.

    accelerate launch examples/finetune_lora.py --dataset_name uoft-cs/cifar10 --output_dir outputs/lora

Without `--dataset_name` it takes scikit-learn's handwritten digits. In addition to its own flags it takes every
TrainingArguments and the options of feature reuse.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)

# `from transformers import AutoImageProcessor` needs torchvision in transformers 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_featreuse import FeatureReuseConfig, FeatureReuseError, FeatureReuseTrainer, find_residual_blocks
from hf_featreuse.data import (
    EvalTransform,
    ImageCollator,
    TrainTransform,
    class_names,
    default_crop_scale,
    image_size,
    in_order_of,
    load_image_data,
)
from hf_featreuse.data.metrics import build_compute_metrics, rank_top_k


@dataclass
class LoraArguments:
    """Options of the model, the data and the adapters."""

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Checkpoint to fine-tune."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub or a local folder. Default: the handwritten digits."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "An adapter's output is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of an adapter."})
    modules_to_save: list[str] = field(
        default_factory=lambda: ["classifier"],
        metadata={
            "help": "Modules outside the blocks that train fully; in masked-freeze steps only if --train_trunk "
            "includes them."
        },
    )
    merged_dir: str | None = field(
        default=None, metadata={"help": "Folder to also save the model with the adapters merged into its weights."}
    )


def add_adapters(model: PreTrainedModel, arguments: LoraArguments) -> PeftModel:
    """Add a low-rank adapter to every linear layer of the residual blocks, as feature reuse finds them."""
    targets = [
        f"{block.name}.{name}"
        for block in find_residual_blocks(model)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=targets,
            modules_to_save=arguments.modules_to_save,
        ),
    )


def run(argv: list[str]) -> None:
    arguments, args = HfArgumentParser((LoraArguments, FeatureReuseConfig)).parse_args_into_dataclasses(argv)
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        data = load_image_data(
            arguments.dataset_name,
            max_train_samples=arguments.max_train_samples,
            max_eval_samples=arguments.max_eval_samples,
            seed=args.seed,
            splits=["train", "validation"],
        )
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
    # Keep the order of the classes if the head of the checkpoint is for the same classes.
    data = in_order_of(data, class_names(AutoConfig.from_pretrained(arguments.model_name_or_path)))
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model_name_or_path,
        num_labels=len(data.label_names),
        label2id={label: index for index, label in enumerate(data.label_names)},
        id2label=dict(enumerate(data.label_names)),
        ignore_mismatched_sizes=True,  # A new head for the labels of the data.
    )
    model = add_adapters(model, arguments)
    model.print_trainable_parameters()
    size = image_size(processor)
    # A mirrored digit is not the same digit.
    flip = 0.0 if arguments.dataset_name is None else 0.5
    transform = TrainTransform(size, scale=default_crop_scale(size), flip=flip, seed=args.seed)
    trainer = FeatureReuseTrainer(
        model,
        args,
        data_collator=ImageCollator.from_processor(processor),
        train_dataset=data.splits["train"].with_transform(transform),
        eval_dataset=data.splits["validation"].with_transform(EvalTransform(processor)),
        processing_class=processor,
        compute_metrics=build_compute_metrics(),
        preprocess_logits_for_metrics=rank_top_k,
    )
    trainer.card_details = {"dataset": data.name or arguments.dataset_name}
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    if arguments.merged_dir is not None and trainer.is_world_process_zero():
        model.merge_and_unload().save_pretrained(arguments.merged_dir)
        processor.save_pretrained(arguments.merged_dir)


def main() -> None:
    try:
        run(sys.argv[1:])
    except FeatureReuseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
