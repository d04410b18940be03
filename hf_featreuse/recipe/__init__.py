"""Parts of a training recipe for any method: losses, Mixup, CutMix, and a moving average of the weights."""
