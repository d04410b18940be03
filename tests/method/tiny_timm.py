"""Tiny random models of timm's families behind TimmWrapper, with their residual blocks labeled by hand.

The names were read off the model files of timm 1.0.31. Families whose entry points fix their sizes are registered here
with smaller ones, by timm's own means. Nothing here asks the package.
"""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.metaformer import (
    Attention,
    GroupNorm1,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.vgg import VGG
from tiny_architectures import Architecture
from torch import nn


def _register(name: str, model_class: type[nn.Module], variant: str, **settings: Any) -> None:
    """Make a small model of a class available to timm by name; the variant lends image size and normalization."""

    def build(pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **given: Any):
        # Building takes the decoded blocks apart.
        blocks = {"block_args": decode_arch_def(settings["block_args"])} if "block_args" in settings else {}
        return build_model_with_cfg(model_class, variant, pretrained, **{**settings, **blocks, **given})

    build.__name__, build.__module__ = name, model_class.__module__
    register_model(build)


_STAGES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 32)}
_register(
    "tiny_poolformer", MetaFormer, "poolformer_s12", downsample_norm=None, norm_layers=GroupNorm1, mlp_act=nn.GELU,
    mlp_bias=True, layer_scale_init_values=0.5, res_scale_init_values=None, use_mlp_head=False, **_STAGES,
)  # fmt: skip
_register(
    "tiny_caformer", MetaFormer, "caformer_s18", token_mixers=[SepConv] * 2 + [Attention] * 2,
    norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2, **_STAGES,
)  # fmt: skip
_MLP = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 3}
_register("tiny_mixer", MlpMixer, "mixer_s32_224", **_MLP)
_register("tiny_resmlp", MlpMixer, "resmlp_12_224", block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4, **_MLP)
_register(
    "tiny_mvitv2", MultiScaleVit, "mvitv2_tiny", img_size=32,
    cfg=MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=8, num_heads=1),
)  # fmt: skip
# ds: depthwise separable; ir: inverted residual; r: repeats; s: stride of the first; c: channels.
_register(
    "tiny_efficientnet", EfficientNet, "efficientnet_b0", num_features=32, stem_size=8,
    block_args=[["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e2_c8_se0.25"], ["ir_r3_k3_s2_e2_c16_se0.25"]],
)  # fmt: skip
_register(
    "tiny_mobilenetv3", MobileNetV3, "mobilenetv3_small_100", num_features=32, stem_size=8,
    block_args=[["ds_r1_k3_s2_e1_c8_nre"], ["ir_r2_k3_s2_e2_c8_nre"], ["ir_r3_k3_s1_e2_c8_se0.25"]],
)  # fmt: skip
_register("tiny_vgg", VGG, "vgg11", cfg=[8, 8, "M", 16, 16, "M"])


def _timm(name: str, architecture: str, model_args: dict[str, Any], *blocks: str, **labels: Any) -> Architecture:
    return Architecture(
        name,
        "timm_wrapper",
        "TimmWrapperForImageClassification",
        {"architecture": architecture, "model_args": model_args},
        tuple(f"timm_model.{block}" for block in blocks),
        **{"image_size": model_args.get("img_size", 32), **labels},
    )


def _rows(*rows: tuple[str, int]) -> list[str]:
    return [f"{name}.{index}" for name, count in rows for index in range(count)]


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
_SCALED = {**_VIT, "init_values": 0.5}
_FOUR_STAGES = [f"stages.{stage}.blocks.{index}" for stage, index in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
_CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
_LEVIT = {"img_size": 32, "embed_dim": [16, 32], "depth": [2, 2], "num_heads": [2, 2], "key_dim": 8}

TIMM = (
    _timm("vit", "vit_tiny_patch16_224", _VIT, *_rows(("blocks", 3))),
    _timm("deit3", "deit3_small_patch16_224", _SCALED, *_rows(("blocks", 3))),
    _timm("beit", "beit_base_patch16_224", _SCALED, *_rows(("blocks", 3))),
    _timm("eva", "eva02_tiny_patch14_224", _VIT, *_rows(("blocks", 3))),
    # The blocks of class attention take the patches first and the class token, their stream, second.
    _timm(
        "cait",
        "cait_xxs24_224",
        {**_SCALED, "depth": 2},
        *_rows(("blocks", 2), ("blocks_token_only", 2)),
        streams={"blocks_token_only": 1},
    ),
    _timm("xcit", "xcit_nano_12_p16_224", {**_VIT, "depth": 2, "eta": 0.5}, *_rows(("blocks", 2))),
    # Two streams, pixels and patches, of which the graph shows the first only.
    _timm(
        "tnt",
        "tnt_s_patch16_224",
        {"img_size": 32, "patch_size": 16, "embed_dim": 16, "inner_dim": 8, "depth": 2, "num_heads_outer": 2},
        *_rows(("blocks", 2)),
        exact=False,
        num_outputs=2,
        handed_on=(1,),
    ),
    _timm(
        "swin",
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
        *_rows(("layers.0.blocks", 2), ("layers.1.blocks", 1)),
    ),
    _timm(
        "davit",
        "davit_tiny",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]},
        *_rows(*((f"stages.{stage}.blocks.0", 2) for stage in range(4))),
        image_size=64,
    ),
    # The first block of every stage after the first pools or widens.
    _timm(
        "mvitv2",
        "tiny_mvitv2",
        {"img_size": 32},
        "stages.0.blocks.0",
        "stages.1.blocks.1",
        num_outputs=2,
        handed_on=(1,),
    ),
    _timm(
        "hiera",
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 3, 1)},
        *("blocks.0", "blocks.2", "blocks.4", "blocks.5"),
    ),
    _timm(
        "pvt_v2",
        "pvt_v2_b0",
        {
            "depths": [1, 2],
            "embed_dims": [8, 16],
            "num_heads": [1, 2],
            "sr_ratios": [2, 1],
            "mlp_ratios": [2, 2],
        },
        *_rows(("stages.0.blocks", 1), ("stages.1.blocks", 2)),
    ),
    _timm("levit", "levit_128", _LEVIT, *_rows(("stages.0.blocks", 2), ("stages.1.blocks", 2))),
    _timm(
        "edgenext",
        "edgenext_xx_small",
        {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "heads": [2, 2, 2, 2], "ls_init_value": 0.5},
        *_FOUR_STAGES,
        image_size=64,
    ),
    _timm("convnext", "convnext_atto", {**_CONVNEXT, "ls_init_value": 0.5}, *_FOUR_STAGES),
    _timm("convnextv2", "convnextv2_atto", _CONVNEXT, *_FOUR_STAGES),
    _timm("poolformer", "tiny_poolformer", {}, *_FOUR_STAGES),
    _timm("mixer", "tiny_mixer", {"img_size": 32}, *_rows(("blocks", 3))),
    _timm("resmlp", "tiny_resmlp", {"img_size": 32}, *_rows(("blocks", 3))),
    _timm(
        "resnet",
        "resnet50",
        {"layers": [2, 3, 1, 1], "channels": [4, 8, 8, 8], "stem_width": 4},
        *("layer1.1", "layer2.1", "layer2.2"),
        activation="Relu",
        branch="bn3",
        image_size=64,
    ),
    _timm(
        "resnetv2",
        "resnetv2_50",
        {"layers": [2, 2], "channels": [16, 32], "stem_chs": 8},
        *("stages.0.blocks.1", "stages.1.blocks.1"),
    ),
    # Blocks are attributes b1, b2, ... of a stage; the first of a stage has a projection shortcut.
    _timm(
        "regnet",
        "regnetx_002",
        {"w0": 8, "wa": 8.0, "wm": 2.0, "group_size": 8, "depth": 6, "stem_width": 8},
        *("s3.b2", "s3.b3"),
        activation="Relu",
        branch="drop_path",
        image_size=64,
    ),
    _timm("efficientnet", "tiny_efficientnet", {}, "blocks.0.0", "blocks.1.1", "blocks.2.1", "blocks.2.2"),
    _timm("mobilenetv3", "tiny_mobilenetv3", {}, *("blocks.1.1", "blocks.2.0", "blocks.2.1", "blocks.2.2")),
    # In the later stages the shortcut has its own trainable scale.
    _timm("caformer", "tiny_caformer", {}, "stages.0.blocks.0", "stages.1.blocks.0", image_size=64),
    # Models without a block that the graph shows.
    _timm("vgg", "tiny_vgg", {}),
    _timm("repvit", "repvit_m0_9", {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 2, 1)}, image_size=64),
    _timm("dla", "dla34", {"channels": (4, 4, 8, 8, 16, 16)}, image_size=64),
    _timm("lcnet", "lcnet_035", {}),
)

TIMM_WITH_BLOCKS = tuple(case for case in TIMM if case.blocks)
TIMM_SKIPPABLE = tuple(case for case in TIMM_WITH_BLOCKS if case.exact)
