"""What a training recipe adds to any method: Mixup, CutMix, and an exponential moving average of the weights."""
