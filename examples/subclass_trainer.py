"""Subclass FeatureReuseTrainer: a focal loss, and only blocks of the second half.

python examples/subclass_trainer.py
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer
from hf_featreuse.data import EvalTransform, ImageCollator, load_image_data
from hf_featreuse.data.metrics import build_compute_metrics, rank_top_k
from hf_featreuse.small_models import small_config, small_image_processor


class FocalLossTrainer(FeatureReuseTrainer):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002): well-classified images count less."""

    gamma = 2.0
    # This loss is a mean over the micro-batch, so Trainer must divide it by the number of accumulated ones.
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="none")
        loss = ((1 - torch.exp(-loss)) ** self.gamma * loss).mean()
        return (loss, outputs) if return_outputs else loss

    def get_residual_blocks(self, model):
        blocks = super().get_residual_blocks(model)
        return blocks[len(blocks) // 2 :]


def main(output_dir: str = "outputs/focal", max_steps: int = 300) -> dict[str, float]:
    data = load_image_data()
    config = small_config("vit", 8, len(data.label_names), data.label_names)
    processor = small_image_processor(config, 8)
    splits = {name: split.with_transform(EvalTransform(processor)) for name, split in data.splits.items()}
    args = FeatureReuseConfig(
        output_dir, max_steps=max_steps, learning_rate=1e-3, per_device_train_batch_size=64, save_strategy="no"
    )
    trainer = FocalLossTrainer(
        AutoModelForImageClassification.from_config(config),
        args,
        data_collator=ImageCollator.from_processor(processor),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        compute_metrics=build_compute_metrics(),
        preprocess_logits_for_metrics=rank_top_k,
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
