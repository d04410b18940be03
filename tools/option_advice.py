"""When to use each option of the method: what their help does not say."""

WHEN = {
    "drop_rate": "0.1 for fine-tuning on few images and for short runs, where more costs accuracy. 0.5 where plain "
    "training overfits, or where cheaper steps are the aim.",
    "drop_rate_schedule": "`linear`, the default, spares the early blocks, which all later ones build on. `uniform` "
    "drops more for the same rate: a rate of 0.5 then halves the blocks of a stochastic-depth step.",
    "drop_granularity": "`batch` saves most, and goes with every model. `sample` lost less accuracy in short runs "
    "and in "
    "fine-tuning; it needs a batch that is large enough to be divided, and no BatchNorm.",
    "stochastic_depth_steps": "1. With `masked_freeze_steps` 0 it is plain stochastic depth, which a comparison "
    "should "
    "include; both 0 is plain training.",
    "masked_freeze_steps": "1. More steps teach the drawn blocks more, at higher cost: a masked-freeze step runs the "
    "whole network forward.",
    "scale_kept": "Where training should see features of the size that evaluation sees, as in some drop path recipes. "
    "Not with an activation after the addition.",
    "train_trunk": "On. Off makes masked-freeze steps cheaper, as backward ends in the lowest drawn block; stem, "
    "norms "
    "and head then train in half of the steps.",
    "frozen_batch_norm": "`inference` where batches are so small that their statistics mean little. Without BatchNorm "
    "layers it does nothing.",
    "allow_inexact_skip": "Only where an error asks for it, and you know what the block computes.",
    "target_blocks": "To leave blocks out, such as the first ones, or to name blocks that are not found. "
    "`featreuse inspect` lists the names.",
    "reuse_start": "To train plainly first: feature reuse then begins with features that mean something.",
    "reuse_end": "To finish with plain steps, in which the network trains as it is evaluated.",
    "reuse_seed": "To draw other sets of blocks with the same data order and weights, or the same sets with others.",
    "mixup_alpha": "Long runs from scratch that overfit; 0.8 together with CutMix in the recipe of DeiT.",
    "cutmix_alpha": "The same; 1.0 in the recipe of DeiT.",
    "ema_decay": "Long runs; 0.999 averages over about 1,000 steps.",
}
