"""Image classifiers to train from scratch on small images.

The defaults of transformers are made for 224 pixels: a ViT with patches of 16 sees four tokens in an image of 32, a
ConvNeXt shrinks it to one position. Here each family gets patches, strides, depth and width that suit 8 to 64 pixels.
Any other model type, and any larger image, gets the default configuration with its image size and labels set.
"""

from hf_featreuse.small_models.configs import SMALL_FAMILIES, small_config, small_image_processor
from hf_featreuse.small_models.overrides import parse_overrides

__all__ = ["SMALL_FAMILIES", "parse_overrides", "small_config", "small_image_processor"]
