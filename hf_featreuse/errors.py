"""Errors of the package. Each message names what was passed, what was found and what to do.

Every class derives from [`FeatureReuseError`] and from the built-in error a caller would expect, so
`except ValueError` keeps working.
"""


class FeatureReuseError(Exception):
    """Base class of every error that this package raises on purpose.

    Example:
        >>> from hf_featreuse import FeatureReuseError, FeatureReuseSchedule
        >>> try:
        ...     FeatureReuseSchedule(12, drop_rate=1.5)
        ... except FeatureReuseError as error:
        ...     print(type(error).__name__)
        ConfigurationError
    """


class ConfigurationError(FeatureReuseError, ValueError):
    """An option has a value that cannot be used; raised at construction."""


class BlockError(FeatureReuseError, ValueError):
    """The model has no usable residual block, or the blocks given do not fit the model."""


class StepError(FeatureReuseError, RuntimeError):
    """A step was entered in a state in which it could not be exact: stale gradients, a nested step."""


class CheckpointError(FeatureReuseError, RuntimeError, ValueError):
    """A checkpoint is missing, incomplete or damaged, does not fit the model, or cannot be written."""


class DataError(FeatureReuseError, ValueError):
    """The data set is empty, or lacks the requested column or split."""


class BadImageError(FeatureReuseError, RuntimeError):
    """An image cannot be decoded; the message names the file, or the split and row."""


class HubError(FeatureReuseError, RuntimeError):
    """A push to the Hub failed; the message says how to push again. The files on disk are complete."""


class IncompatibleVersionError(FeatureReuseError, ImportError):
    """The installed transformers, accelerate or torch lacks what training needs; the message says what to install.

    Raised when the trainer is imported, or when training starts.
    """


def torchvision_misfit(error: BaseException | None) -> IncompatibleVersionError | None:
    """Return an error that explains a failed import if its cause is a torchvision built for another torch."""
    signs = ("torchvision::", "torchvision/", "torchvision were")
    while error is not None and not any(sign in str(error) for sign in signs):
        error = error.__cause__ or error.__context__
    return error and IncompatibleVersionError(
        f"The installed torchvision does not fit the installed torch ({' '.join(str(error).split())}); often one is "
        "built for CUDA and the other for the CPU. Install torchvision from the index that torch came from, or "
        "uninstall it."
    )
