"""The table of wrong command lines: words, a part of the message, and the exit code (1, or 2 of argparse)."""

from dataclasses import dataclass
from typing import Any

ESCAPE, NEWLINE, REVERSED, BROKEN = "\x1b[31mred\x07", "one\ntwo\r\x1b[2K", "\u202etxt.exe", "caf\udce9"
CONTROLS = (ESCAPE, NEWLINE, REVERSED, BROKEN)
ENDLESS = "((.|.)|(.|.))*[xyz]"


@dataclass(frozen=True)
class Case:
    """A command line; `{name}` in a word is a file of the test's world, `json` the content of `args.json`."""

    words: str | tuple[str, ...]
    message: str
    code: int = 1
    json: Any = None

    @property
    def argv(self) -> list[str]:
        return self.words.split() if isinstance(self.words, str) else list(self.words)

    def __str__(self) -> str:
        text = self.words if isinstance(self.words, str) else " ".join(self.words)
        return ascii(f"{text} {self.json or ''}".strip())[1:80]


GENERAL = [
    Case("", "required: VERB", 2),
    Case("nonesuch", "invalid choice", 2),
    Case((ESCAPE,), "invalid choice", 2),
    Case("--nonesuch", "required: VERB", 2),
    Case("inspect", "required: MODEL", 2),
    Case("analyze", "required: MODEL", 2),
    Case("prune", "required", 2),
    Case("push", "required: FOLDER, REPO", 2),
    Case("push {tiny}", "required: REPO", 2),
    Case(("inspect", "vit", "--nonesuch", ESCAPE), "unrecognized arguments", 2),
    Case(("inspect", "vit", BROKEN), "unrecognized arguments", 2),
]

INSPECT = [
    *(
        Case(("inspect", word), "is not a model that can be inspected")
        for word in (*CONTROLS, "vitt", "no/such", "a b")
    ),
    Case(("inspect", ""), "`model=''` is empty"),
    Case(("inspect", "  "), "is empty"),
    Case(("inspect", "a\0b"), "contains a null character"),
    Case(("inspect", "x" * 5_000), "File name too long"),
    Case("inspect {empty}", "has no config.json"),
    Case("inspect {file}", "is not a model that can be inspected"),
    *(Case(f"inspect {{{name}_config}}", "cannot read") for name in ("broken", "list", "null", "binary", "deep")),
    *(Case(f"inspect {{{name}_config}}", "cannot read") for name in ("no_type", "unknown_type", "hostile_type")),
    Case("inspect {other_type_config}", "no image classifier"),
    Case("inspect {bad_size_config}", "`"),
    Case("inspect {negative_config}", "cannot build"),
    Case("inspect {no_layers_config}", "no residual block"),
    *(Case(f"inspect vit --drop_rate={v}", "`drop_rate=") for v in ("nan", "inf", "-inf", "-0.1", "1", "1e308")),
    *(Case(f"inspect vit --drop_rate {v}", "invalid float value", 2) for v in ("half", "0,5", "1e", "0x1")),
    Case(("inspect", "vit", "--drop_rate", ""), "invalid float value", 2),
    Case("inspect vit --drop_rate_schedule sideways", "invalid choice", 2),
    Case("inspect vit --train_trunk half", "invalid choice", 2),
    Case("inspect vit --stochastic_depth_steps -1", "`stochastic_depth_steps=-1`"),
    Case("inspect vit --masked_freeze_steps -1", "`masked_freeze_steps=-1`"),
    Case("inspect vit --vanilla_steps -1", "`vanilla_steps=-1`"),
    Case("inspect vit --vanilla_steps 1.5", "invalid int value", 2),
    Case("inspect vit --target_blocks", "expected at least one argument", 2),
    *(
        Case(("inspect", "vit", "--target_blocks", e), "is not a regular expression")
        for e in ("(", "[", "a{9999999999}")
    ),
    Case(("inspect", "vit", "--target_blocks", "(" * 9_000), "is not a regular expression"),
    Case(("inspect", "vit", "--target_blocks", "((a{1000}){1000}){1000}"), "repeats its parts too often"),
    Case(("inspect", "vit", "--target_blocks", ENDLESS), "takes too long"),
    Case(("inspect", "vit", "--target_blocks", "(.*)*x"), "matches no residual block"),
    Case(("inspect", "vit", "--target_blocks", "(?R)"), "is not a regular expression"),
    *(Case(("inspect", "vit", "--target_blocks", word), "`target_blocks=") for word in CONTROLS),
    Case(("inspect", "vit", "--target_blocks", ""), "is empty"),
    Case(("inspect", "vit", "--target_blocks", "layers.0", ""), "is empty"),
    Case("inspect vit --target_blocks layers.0 layers.99", "matches no residual block"),
    Case("inspect vit --plot {file}/x.png", "{file}"),
    Case("inspect vit --plot {empty}", "Is a directory"),
    Case(("inspect", "vit", "--plot", ""), "is empty"),
    Case(("inspect", "vit", "--plot", "y" * 300), "File name too long"),
]

_OUT = ("--output_dir", "out")
ANALYZE = [
    *(Case(("analyze", "{tiny}", f"--{name}", "-1", *_OUT), f"`{name}=-1`") for name in ("seed", "random_draws")),
    *(Case(("analyze", "{tiny}", f"--{name}", "0", *_OUT), f"`{name}=0`") for name in ("batch_size", "max_samples")),
    *(Case(("analyze", "{tiny}", f"--{n}", "nan", *_OUT), "invalid int value", 2) for n in ("batch_size", "seed")),
    Case("analyze {tiny} --num_workers -1", "`num_workers=-1`"),
    Case("analyze {tiny} --split holdout", "invalid choice", 2),
    Case(("analyze", "{tiny}", "--device", "cuda:99", *_OUT), "`device="),
    Case(("analyze", "{tiny}", "--device", ESCAPE, *_OUT), "`device="),
    Case(("analyze", "{tiny}", "--device", "meta:x", *_OUT), "`device="),
    Case(("analyze", "{tiny}", "--seed", "9" * 40, "--max_samples", "8", *_OUT), "`seed="),
    Case(("analyze", "{tiny}", "{tiny}", *_OUT), "is named twice"),
    Case(("analyze", "", *_OUT), "is empty"),
    *(Case(("analyze", word, *_OUT), "cannot be loaded") for word in (*CONTROLS, "{none}", "{file}", "no/such")),
    *(Case(("analyze", f"{{{n}_weights}}", *_OUT), "`") for n in ("cut", "zeros", "no_bytes", "text")),
    Case(("analyze", "{broken_name}", *_OUT), "is not valid UTF-8"),
    Case(("analyze", "{weightless}", *_OUT), "cannot be loaded"),
    Case(("analyze", "{no_processor}", *_OUT), "has no image processor"),
    Case(("analyze", "{bad_processor}", *_OUT), "has no image processor"),
    Case(("analyze", "{list_config}", *_OUT), "cannot be loaded"),
    Case(("analyze", "{hostile_type_config}", *_OUT), "cannot be loaded"),
    Case(("analyze", "{pets}", *_OUT), "has 2 classes (cat, dog) and the data 10"),
    Case(("analyze", "{hostile_labels}", *_OUT), "has 2 classes"),
    *(Case(("analyze", "{tiny}", "--data", word, *_OUT), "ata set") for word in (*CONTROLS, "{none}", "{empty}")),
    Case(("analyze", "{tiny}", "--data", "{file}", *_OUT), "ata"),
    Case(("analyze", "{tiny}", "--data", "", *_OUT), "is empty"),
    Case(("analyze", "{tiny}", "--target_blocks", ENDLESS, *_OUT), "takes too long"),
    Case(("analyze", "{tiny}", "--target_blocks", "(", *_OUT), "is not a regular expression"),
    Case(("analyze", "{tiny}", "--output_dir", ""), "is empty"),
    Case(("analyze", "{tiny}", "--output_dir", "{full}"), "is not empty"),
    Case(("analyze", "{tiny}", "--output_dir", "{file}"), "cannot be written"),
    Case(("analyze", "{tiny}", "--output_dir", "{file}/x"), "cannot be written"),
    Case(("analyze", "{tiny}", "--output_dir", "y" * 300), "cannot be written"),
    Case(("analyze", "{tiny}", "--output_dir", f"new/{'y' * 300}"), "cannot be written"),
]

PRUNE = [
    Case(("prune", "{tiny}", *_OUT), "required", 2),
    Case(("prune", "{tiny}", "--drop", "0"), "required: --output_dir", 2),
    Case(("prune", "{tiny}", "--drop", "0", "--keep", "1", *_OUT), "not allowed with", 2),
    *(Case(("prune", "{tiny}", "--drop", v, *_OUT), "`drop` holds") for v in ("7", "-1", "0,9", "999999999")),
    Case(("prune", "{tiny}", "--drop", "٣", *_OUT), "`"),
    Case(("prune", "{tiny}", "--drop", "²", *_OUT), "`"),
    Case(("prune", "{tiny}", "--drop", "--5", *_OUT), "expected one argument", 2),
    Case(("prune", "{tiny}", "--drop=--5", *_OUT), "`"),
    Case(("prune", "{tiny}", "--drop", "", *_OUT), "is empty"),
    Case(("prune", "{tiny}", "--drop", ",,", *_OUT), "There is nothing to drop"),
    Case(("prune", "{tiny}", "--drop", "0,1", *_OUT), "would be removed"),
    Case(("prune", "{tiny}", "--keep", ".*", *_OUT), "There is nothing to drop"),
    Case(("prune", "{tiny}", "--keep", ",", *_OUT), "would be removed"),
    Case(("prune", "{tiny}", "--drop", ENDLESS, *_OUT), "takes too long"),
    Case(("prune", "{tiny}", "--drop", "(", *_OUT), "is not a regular expression"),
    *(Case(("prune", "{tiny}", "--drop", word, *_OUT), "`target_blocks=") for word in CONTROLS),
    Case(("prune", "{tiny}", "--budget", "1", *_OUT), "was passed without `--data`"),
    *(
        Case(("prune", "{tiny}", f"--budget={value}", "--data", "digits", *_OUT), "budget")
        for value in ("0", "-1", "nan", "inf", "1.0", "0.0", "two", ESCAPE, "1e400", "٣x", "9_", "--1")
    ),
    Case(("prune", "{tiny}", "--budget", "1", "--data", "digits", "--batch_size", "0", *_OUT), "batch_size"),
    Case(
        ("prune", "{tiny}", "--budget", "1", "--data", "digits", "--max_eval_samples", "0", *_OUT), "max_eval_samples"
    ),
    Case(
        ("prune", "{tiny}", "--budget", "1", "--data", "digits", "--max_eval_samples", "-3", *_OUT), "max_eval_samples"
    ),
    Case(("prune", "{tiny}", "--budget", "1", "--data", "digits", "--seed", "-1", *_OUT), "seed"),
    Case(("prune", "{tiny}", "--budget", "1", "--data", "{none}", *_OUT), "data"),
    Case(("prune", "{no_processor}", "--budget", "1", "--data", "digits", *_OUT), "has no image processor"),
    Case(("prune", "{cut_weights}", "--drop", "0", *_OUT), "`"),
    Case(("prune", "{none}", "--drop", "0", *_OUT), "cannot be loaded"),
    Case(("prune", "{tiny}", "--drop", "0", "--output_dir", ""), "is empty"),
    Case(("prune", "{tiny}", "--drop", "0", "--output_dir", "{full}"), "is not empty"),
    Case(("prune", "{tiny}", "--drop", "0", "--output_dir", "{file}"), "is not empty"),
    Case(("prune", "{tiny}", "--drop", "0", "--output_dir", "{file}/x"), "cannot be written"),
    Case(("prune", "{tiny}", "--drop", "0", "--output_dir", "y" * 300), "cannot be written"),
    Case(("prune", "{tiny}", "--drop", "9", "--output_dir", "new/deep/er"), "`drop` holds"),
]

PUSH = [
    *(
        Case(("push", "{tiny}", repo), "is not a repository id")
        for repo in (*CONTROLS, "a/b/c", "a b", "a/..b", "x" * 200)
    ),
    Case(("push", "{tiny}", ""), "is empty"),
    Case(("push", "", "ada/x"), "is empty"),
    *(Case(("push", folder, "ada/x"), "is not a directory") for folder in (*CONTROLS, "{none}", "{file}")),
    Case(("push", "y" * 300, "ada/x"), "File name too long"),
    Case("push {tiny} -x", "required: REPO", 2),
    Case("push {empty} ada/x", "holds no model"),
    Case("push {tiny} ada/x", "holds no model card"),
    Case("push {bad_card} ada/x", "cannot be read"),
    *(
        Case(f"push {{{name}_weights}} ada/x --new_card", "is missing or cut short")
        for name in ("cut", "zeros", "no_bytes", "text")
    ),
    Case("push {weightless} ada/x --new_card", "holds no model"),
    Case("push {broken_config} ada/x --new_card", "holds no model"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--token", "hf_ab cd"), "control character"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--token", ESCAPE), "control character"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--token", " "), "is empty"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--message", ""), "is empty"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--revision", "a..b"), "not the name of a branch"),
    Case(("push", "{tiny}", "ada/x", "--new_card", "--revision", ESCAPE), "not the name of a branch"),
    Case("push {tiny} ada/x --private --public", "not allowed with", 2),
    Case("push {tiny} ada/x --new_card", "HF_HUB_OFFLINE is set"),
]

EVALUATE = [
    *(
        Case(("evaluate", "{tiny}", f"--{n}", "-1", *_OUT), f"`{n}=-1`")
        for n in ("seed", "num_workers", "num_mistakes")
    ),
    *(Case(("evaluate", "{tiny}", f"--{n}", "0", *_OUT), f"`{n}=0`") for n in ("batch_size", "max_samples")),
    Case(("evaluate", "{tiny}", "--seed", "9" * 40, *_OUT), "is too large"),
    Case(("evaluate", ESCAPE, *_OUT), "cannot be loaded"),
    Case(("evaluate", "{zeros_weights}", *_OUT), "`"),
    Case(("evaluate", "{pets}", *_OUT), "has 2 classes"),
    Case(("evaluate", "{tiny}", "--data", "{empty}", *_OUT), "{empty}"),
    Case(("evaluate", "{tiny}", "--output_dir", "{full}"), "is not empty"),
    Case(("evaluate", "{tiny}", "--output_dir", "{file}/x"), "cannot be written"),
    Case(("evaluate", "{tiny}", "--output_dir", ""), "is empty"),
]

PREDICT = [
    Case("predict {tiny}", "required: IMAGES", 2),
    Case(("predict", "{tiny}", ""), "is empty"),
    *(Case(("predict", "{tiny}", word), "`") for word in (*CONTROLS, "{none}", "{empty}")),
    *(
        Case(("predict", "{tiny}", "{photo}", "--output", out), "`")
        for out in ("x", "x.exe", "{empty}", "{file}/x.csv")
    ),
    *(Case(("predict", "{tiny}", "{photo}", f"--{n}", "0"), n) for n in ("top_k", "batch_size")),
    Case(("predict", "{none}", "{photo}"), "cannot be loaded"),
    Case(("predict", "{no_processor}", "{photo}"), "has no image processor"),
]

_NUMBERS = {
    "learning_rate": ("nan", "inf", "-1"), "weight_decay": ("nan", "-0.1"), "num_train_epochs": ("nan", "0", "-1"),
    "max_steps": ("0",), "per_device_train_batch_size": ("0", "-4"), "per_device_eval_batch_size": ("0",),
    "gradient_accumulation_steps": ("0",), "max_grad_norm": ("nan",), "label_smoothing_factor": ("nan", "2"),
    "warmup_steps": ("-1", "nan"), "seed": ("-1", "99999999999999999999"), "save_steps": ("0", "nan"),
    "logging_steps": ("0",), "dataloader_num_workers": ("-1",), "adam_beta1": ("nan", "1.5"),
    "max_train_samples": ("0", "-5"), "max_eval_samples": ("0",), "train_val_split": ("nan", "1", "-1"),
    "image_size": ("0", "-8"), "horizontal_flip": ("nan", "2"), "image_scale_min": ("nan", "0", "3"),
    "rand_augment_ops": ("-1",), "rand_augment_magnitude": ("99",), "drop_rate": ("nan", "inf", "1", "-1"),
    "reuse_start": ("nan", "2"), "mixup_alpha": ("nan", "inf", "-1"), "ema_decay": ("nan", "0", "1"),
    "masked_freeze_steps": ("-1",), "reuse_seed": ("-1",), "save_total_limit": ("0",),
}  # fmt: skip

EXAMPLE = [
    *(Case((f"--{name}={v}",), name) for name, values in _NUMBERS.items() for v in values),
    Case("--learning_rate fast", "invalid float value"),
    Case("--max_steps 1.5", "invalid int value"),
    Case("--use_cpu maybe", "use_cpu"),
    Case("--save_strategy sometimes", "save_strategy"),
    Case("--optim nonesuch", "optim"),
    Case("--lr_scheduler_type nonesuch", "lr_scheduler_type"),
    Case("--lr_scheduler_kwargs {broken", "Expecting property name"),
    Case("--report_to nonesuch", "`--report_to nonesuch` is not a tracker"),
    Case("--report_to wandbb", "Did you mean wandb"),
    Case("--report_to clearml", "is not installed"),
    Case(("--report_to", ESCAPE), "is not a tracker"),
    Case("--drop_rat 0.5", "Did you mean --drop_rate"),
    Case(("--nonesuch", ESCAPE), "is not a flag"),
    Case(("stray",), "is not a flag"),
    Case(("--output_dir", ""), "is empty"),
    Case("--output_dir {file}", "cannot be written"),
    Case("--output_dir {file}/x", "cannot be written"),
    Case(("--output_dir", "y" * 300), "cannot be written"),
    Case("--output_dir {full}", "is not empty"),
    Case(("--target_blocks", ENDLESS), "takes too long"),
    Case(("--target_blocks", "("), "is not a regular expression"),
    Case(("--target_blocks", ESCAPE), "`target_blocks="),
    Case(("--target_blocks", ""), "selects nothing"),
    Case("--drop_rate_schedule sideways", "sideways"),
    Case("--train_trunk half", "half"),
    Case("--model_type vitt", "vitt"),
    Case(("--model_type", ESCAPE), "model_type"),
    Case("--config_overrides hidden_size=x", "hidden_size"),
    Case("--config_overrides =", "overrides"),
    Case("--config_overrides hidden_size=-8", "hidden_size=-8"),
    Case("--train_dir {none}", "{none}"),
    Case("--train_dir {file}", "{file}"),
    Case("--train_dir {empty}", "{empty}"),
    Case("--dataset_name {none}", "{none}"),
    Case(("--dataset_name", ESCAPE), "red"),
    Case(("--dataset_name", ""), "is empty"),
    Case("--image_column_name nonesuch", "nonesuch"),
    Case("--model_name_or_path {none}", "cannot be loaded"),
    Case("--model_name_or_path {cut_weights}", "{cut_weights}"),
    Case("--model_name_or_path {list_config}", "{list_config}"),
    Case("--model_name_or_path {tiny} --model_type vit", "Pass one of them"),
    Case("--resume_from_checkpoint {none}", "{none}"),
    Case("--resume_from_checkpoint {tiny}", "{tiny}"),
    Case("nonesuch.json", "cannot be read as JSON"),
    *(Case(f"{{json_{name}}}", "cannot be read as JSON") for name in ("broken", "binary", "deep")),
    *(Case(f"{{json_{name}}}", "contains a") for name in ("list", "null")),
]

_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": "fast"}, "invalid float value"), ({"learning_rate": [1]}, "`learning_rate` is [1]"),
    ({"learning_rate": {"a": 1}}, "`learning_rate` is {"), ({"learning_rate": None}, "`learning_rate` is null"),
    ({"learning_rate": float("nan")}, "learning_rate"), ({"learning_rate": True}, "invalid float value"),
    ({"max_steps": 1.5}, "invalid int value"), ({"max_steps": 0}, "max_steps"), ({"max_steps": "x"}, "invalid int"),
    ({"drop_rate": 2}, "drop_rate"), ({"drop_rate": "half"}, "invalid float value"),
    ({"drop_rate": float("inf")}, "drop_rate"), ({"use_cpu": "maybe"}, "use_cpu"), ({"use_cpu": 2}, "use_cpu"),
    ({"report_to": "nonesuch"}, "is not a tracker"), ({"report_to": ["nonesuch"]}, "is not a tracker"),
    ({"report_to": {"a": 1}}, "`report_to` is {"), ({"target_blocks": []}, "selects nothing"),
    ({"target_blocks": [1]}, "selects nothing"), ({"target_blocks": ENDLESS}, "takes too long"),
    ({"target_blocks": {"a": 1}}, "`target_blocks` is {"), ({"nonesuch": 1}, "is not an option"),
    ({"drop_rat": 0.5}, "Did you mean drop_rate"), ({ESCAPE: 1}, "is not an option"), ({"": 1}, "is not an option"),
    ({"output_dir": ""}, "is empty"), ({"output_dir": ["a"]}, "`output_dir` is ["), ({"seed": -1}, "seed"),
    ({"seed": None}, "`seed` is null"), ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ({"lr_scheduler_kwargs": 5}, "lr_scheduler_kwargs"), ({"ema_decay": "x"}, "invalid float value"),
    ({"train_dir": 5}, "5"), ({"model_type": ["vit"]}, "`model_type` is ["),
    ({"--drop_rate": 0.5}, "is not an option"),
    ({"learning-rate": 0.5, "drop_rate": 3}, "drop_rate"),
]  # fmt: skip
JSON = [Case("args.json", message, json=content) for content, message in _WRONG]

# Unusual but correct: exit code 0.
RIGHT = [
    Case(("analyze", "{dollar}", "{under}", "--max_samples", "8", "--random_draws", "0", *_OUT), "Report: ", 0),
    Case(("prune", "{escape_name}", "--drop", "1", "--output_dir", f"new/{ESCAPE}"), "saved in", 0),
    Case(("inspect", "{escape_name}"), "2 residual blocks", 0),
    Case(("inspect", "{dollar}", "--plot", "new/$a$.png"), "2 residual blocks", 0),
    Case(("inspect", "vit", "--target_blocks", "(.*)*[01]"), "4 residual blocks", 0),
]
