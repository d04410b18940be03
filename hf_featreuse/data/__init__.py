"""Labeled images for training and evaluation: load, decode, transform, collate, and the policy on bad images."""

from hf_featreuse.data.evaluation import OpenModel, class_names, class_notes, in_order_of, open_classifier, relabelled
from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.data.images import ImageCollator, decode_image, to_tensors
from hf_featreuse.data.loading import ImageData, load_image_data
from hf_featreuse.data.rand_augment import RandAugment
from hf_featreuse.data.seeded import SeededTransform, augmentation
from hf_featreuse.data.streaming import ImageStream, stream_image_data
from hf_featreuse.data.transforms import EvalTransform, ImageTransform, TrainTransform, default_crop_scale, image_size

__all__ = [
    "EvalTransform",
    "ImageCollator",
    "ImageData",
    "ImageSplit",
    "ImageStream",
    "ImageTransform",
    "OpenModel",
    "RandAugment",
    "SeededTransform",
    "TrainTransform",
    "augmentation",
    "class_names",
    "class_notes",
    "decode_image",
    "default_crop_scale",
    "image_size",
    "in_order_of",
    "load_image_data",
    "open_classifier",
    "relabelled",
    "stream_image_data",
    "to_tensors",
]
