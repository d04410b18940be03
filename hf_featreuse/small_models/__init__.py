"""Image classifiers to train from scratch on small images.

The defaults of transformers are for 224 pixels: a ViT with patches of 16 gets four tokens from an image of 32 pixels,
and a ConvNeXt shrinks it to one position. Here each family gets patches, strides, depth and width for 8 to 64 pixels.
Other model types and larger images get the default configuration with the image size and labels set.
"""

from hf_featreuse.small_models.configs import SMALL_FAMILIES, small_config, small_image_processor
from hf_featreuse.small_models.overrides import parse_overrides

__all__ = ["SMALL_FAMILIES", "parse_overrides", "small_config", "small_image_processor"]
