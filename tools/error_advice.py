"""What to do about the messages that do not say it in a sentence of their own. `…` stands for a value."""

NEEDS = "Pass a value in this range."
LOWER = (
    "Lower `learning_rate`, clip gradients with `max_grad_norm`, use bf16 instead of fp16, or look for bad values in "
    "the data."
)
# By the whole text of the message, as `error_messages` gives it.
ADVICE = {
    "After … optimizer steps the weight `…` is NaN or infinite. …": LOWER,
    "After … optimizer steps the weight `…` is NaN or infinite, so training was stopped and nothing was saved of it. "
    "… …": LOWER,
    "The model in … cannot be loaded to give it the weights of …: …. Push the folder of the finished run, or delete … "
    "to push the weights as they train.": "As the message says.",
    "`…` is a `…` model and no image classifier.": "Pass a model of a class that ends in `ForImageClassification`.",
    "Block … (…) cannot be skipped exactly: … (… of … blocks). … these blocks out with `target_blocks`, or set "
    "`allow_inexact_skip=True` to drop them all the same.": "As the message says. Where an activation follows the "
    "addition, one that keeps its own output, such as ReLU, makes the skip exact.",
    "… has no residual block that can be skipped: no module in a list or sequence, or among siblings of one class, "
    "returns its input plus something of the same shape. Feature reuse needs a residual network, such as ViT, "
    "ConvNeXt "
    "or ResNet. If this is one, name its blocks in `target_blocks`; for plain training set `stochastic_depth_steps=0` "
    "and `masked_freeze_steps=0`.": "As the message says; [architectures](architectures.md) lists the models, and how "
    "to name blocks that are not found.",
    "…=… (--…) is no column of the data. …": "Pass one of the columns that the message lists.",
    "… has the label …, which is none of the training labels.": "Correct the label, or leave such rows out.",
    "Cannot decode …. `skip_bad_images=True` (--skip_bad_images) leaves such images out.": "Replace the file, or "
    "leave "
    "it out with that flag.",
    "mean=… and std=… must hold three numbers each, std no zero.": "Pass those of the image processor.",
    "… has no split 'train', only ….": "Rename the split, or pass `--train_dir`.",
    "… has none of the splits …, only ….": "Pass the names of splits that the data has.",
    "Split '…' of … is empty: it has no rows.": "Check the files of this split.",
    "train_val_split=… must be a fraction from 0 to below 1, or None.": NEEDS,
    "…=… must be a positive number of images, or None for all.": NEEDS,
    "seed=… must not be negative.": NEEDS,
    "splits=… must be a sequence of names among ….": "Pass such names.",
    "No data set was named, and the default, the handwritten digits, needs scikit-learn, which is not installed: pip "
    "install 'hf_featreuse[examples]', or pass dataset_name (--dataset_name) or train_dir (--train_dir).": "As the "
    "message says.",
    "…_dir=… (--…_dir) is no folder.": "Pass a folder with one folder of images for each class.",
    "Cannot load …: …": "The reason is that of the library `datasets`. Check the name, the network, and that no split "
    "is empty.",
    "size=… is not (height, width) in whole pixels.": "Pass a pair of whole numbers.",
    "scale=… must be (smallest, largest) with 0 < smallest <= largest <= 1.": NEEDS,
    "ratio=… must be (smallest, largest) with 0 < smallest <= largest.": NEEDS,
    "seed=… must be an integer from 0 to 2**64 - 1.": NEEDS,
    "`train_trunk=…` needs `all_blocks`, the list of all blocks, to know what the trunk is.": "Pass "
    "`all_blocks=find_residual_blocks(model)`.",
    "… failed: … Nothing in … is lost: `…` pushes it.": "Fix the reason that is given, such as the token, and run "
    "the command in the message; see [on the Hub](hub.md#when-a-push-fails).",
    "magnitude=… must be from 0 to ….": NEEDS,
    "hf_featreuse does not work with …: training would run without what it changes there. ….": "Install the release "
    "that the message names.",
    "k=… must be at least 1.": NEEDS,
    "ks=… must name at least one k, each at least 1.": "Pass such as `(1, 5)`.",
    "None of the … samples has a label (-100 means none): there is nothing to measure.": "Pass labelled images.",
    "The configuration of … cannot express the model without …: …": "Drop other blocks; the message names blocks that "
    "can go along where there are any. See [families](pruning.md#families).",
    "`…` holds …, but … has … blocks, 0 to …, … ... …. `featreuse inspect` lists them.": "Pass indices or names of "
    "blocks of this model.",
    "The checkpoint of this … does not load as the same model: …. Nothing was saved.": "Please report it, with the "
    "model: what was written is read back, and should be the same.",
    "… cannot be used with feature reuse. … … Plain training, with `stochastic_depth_steps=0` and "
    "`masked_freeze_steps=0`, is not refused.": "Take what the message names instead; see "
    "[what is refused](resume.md#what-is-refused).",
    "`survival` holds …. A survival probability is above 0 and at most 1.": NEEDS,
    "`overrides` sets `…`, which `…` does not have.… Its options are: ….": "Pass one of the options listed.",
    "`target_blocks=…` is no regular expression: …. …": "Correct it, or pass names in a list. The message lists the "
    "candidates; `featreuse inspect` too.",
    "`target_blocks=…` matches no residual block of …. …": "Pass one of the candidates that the message lists. A "
    "regular "
    "expression has to match the whole name.",
}
# By the function that makes the message: what it says is wrong, and what to do.
MADE = {
    "_describe": (
        "The checkpoint … does not hold the weights of this … exactly: …. Nothing was loaded.",
        "Resume from another checkpoint, or with the model and configuration that wrote this one.",
    ),
}
