"""When to use each option of the method, in addition to its help."""

WHEN = {
    "drop_rate": "0.5 if plain training overfits: its training loss ends below two thirds of its test loss. In "
    "fine-tuning 0.1, which is the default of `featreuse train` there. If the two losses end about equal, dropping "
    "blocks [costs accuracy](results.md): train longer, let the rate fall early, or pass 0.",
    "drop_rate_schedule": "`linear`, the default, rarely drops the early blocks, on which all later ones depend. "
    "`uniform` drops more at the same `drop_rate`: 0.5 then halves the blocks of a stochastic-depth step.",
    "drop_rate_over_time": "`falling` with `reuse_end`, such as 0.2, if plain training underfits: early stochastic "
    "depth, which in short runs loses less than constant rates. "
    "`rising` lets the network learn with all of its blocks first, as in progressive layer dropping.",
    "drop_granularity": "`batch` has no overhead and works with every model. `sample` has lower peak memory and "
    "steps of nearly equal cost. It needs a batch large enough to be divided, ideally a multiple of 16 samples, and "
    "no BatchNorm.",
    "vanilla_steps": "0. With 1, `stochastic_depth_steps` 0 and `uniform` rates, masked freeze alternates with plain "
    "steps, as in LayerDropBack.",
    "stochastic_depth_steps": "1 alternates the two kinds of step. In the [study](results.md) its accuracy did not "
    "differ significantly from that of 3, and on a GPU, where masked freeze saves little time, "
    "the mean step is dearer.",
    "masked_freeze_steps": "0 is stochastic depth alone. Compare with it: in the [study](results.md) it was 0.9 ± 0.6 "
    "points better over three small models together, most on the ResNet, which has BatchNorm, and "
    "on a GPU it is cheaper. "
    "More than 1 trains the drawn blocks more, at higher cost.",
    "scale_kept": "Keep the default: without scaling, the whole network, which is evaluated, differs from every "
    "network that was trained. `false` is for resuming a run that was started without it, and for comparisons.",
    "train_trunk": "`all` trains stem, norms and head in every step. With `head` and `none` masked-freeze steps are "
    "cheaper, as the backward pass ends in the lowest drawn block; the rest of the trunk then trains in fewer steps.",
    "frozen_batch_norm": "`inference` if batches are so small that their statistics are unreliable. It has no effect "
    "without BatchNorm layers.",
    "allow_inexact_skip": "Only if an error asks for it, and you know what the block computes.",
    "target_blocks": "To exclude blocks, such as the first ones, or to name blocks that are not found. "
    "`featreuse inspect` lists the names.",
    "reuse_start": "To start with plain training: 0.2 is late stochastic depth.",
    "reuse_end": "To finish with plain steps, in which the network trains as it is evaluated.",
    "unfreeze_at": "Fine-tuning on few images, such as 0.3: the new head learns first, and pretrained blocks change "
    "late. With `--drop_rate 0` it is only gradual unfreezing.",
    "reuse_seed": "To draw other sets of blocks with the same data order and initial weights, or the same sets with "
    "other data order and weights.",
    "mixup_alpha": "Long runs from scratch that overfit; 0.8 together with CutMix in the recipe of DeiT.",
    "cutmix_alpha": "The same; 1.0 in the recipe of DeiT.",
    "loss": "`bce` in recipes with Mixup and CutMix, and for several labels per image; `focal` if most images are "
    "easy; `mse` for regression. See [losses](recipes.md#losses).",
    "focal_gamma": "With `--loss focal`. The higher, the less easy images count.",
    "class_weights": "`balanced` if some classes have far fewer images than others and are equally important.",
    "layer_decay": "Fine-tuning: 0.65 to 0.75 for a ViT-Base, nearer to 1 for more layers or more data. Do not use it "
    "from scratch.",
    "head_lr_multiplier": "Fine-tuning with a new head: up to 10.",
    "channels_last": "`false` if a convolutional model turns out to be slower with it on your GPU.",
    "ema_decay": "Long runs; 0.999 averages over about 1,000 steps.",
}
