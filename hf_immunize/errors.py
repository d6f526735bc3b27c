"""Named errors. Each message says what was expected, what was found and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class ImmunizationError(Exception):
    """Base class of every error this library raises on purpose."""


class NonFiniteError(ImmunizationError, ValueError):
    """A matrix, a feature or a loss term holds NaN or infinity."""


class ShapeError(ImmunizationError, ValueError):
    """A tensor has another shape than the one asked for."""


class RankError(ImmunizationError, ValueError):
    """The rank is too low for the number asked for, zero above all."""


class PerfectConditioningError(ImmunizationError, ValueError):
    """``R_ill`` is undefined at κ = 1, where its denominator vanishes."""


class ProtocolError(ImmunizationError, ValueError):
    """An unknown measuring protocol, or one that the given data cannot serve."""


class ArgumentError(ImmunizationError, ValueError):
    """An option has an impossible value."""


class HeadError(ImmunizationError, ValueError):
    """The classifier head is missing, ambiguous, or does not see one feature row per image."""


class ScopeError(ImmunizationError, ValueError):
    """The parameters to train could not be found, or none would be trainable."""


class TrunkError(ImmunizationError, ValueError):
    """The model cannot be split into a frozen trunk, computed once, and a trainable part."""


class DataError(ImmunizationError, ValueError):
    """A dataset lacks a column, holds labels out of range, or is empty."""


class TrainingImagesError(DataError):
    """Images to measure on are ones that the model was trained on, by its record."""


class ImageDecodeError(DataError):
    """An image cannot be decoded; the message names its dataset and row."""


class CheckpointError(ImmunizationError, OSError):
    """A checkpoint could not be written whole; the previous one is untouched."""


class DiskSpaceError(ImmunizationError, OSError):
    """The disk does not hold what is to be written; the message says what is needed and what is free."""


class ProcessError(ImmunizationError, RuntimeError):
    """Another of several processes failed, so that this one cannot go on; the message says which and why."""


class RecordError(ImmunizationError, ValueError):
    """An ``immunization.json`` is missing, damaged, or says what cannot be."""


class RecordVersionError(RecordError):
    """A record was written by a newer major version of the schema than this library reads."""


class WeightsError(ImmunizationError, ValueError):
    """Weights are pickled, absent, or others than the ones a record was made for."""


class CardError(ImmunizationError, ValueError):
    """A model card's metadata cannot be read."""


class HubError(ImmunizationError, OSError):
    """The Hub did not do what was asked of it; nothing local is lost.

    Attributes:
        outcome: Which of these it was: "unauthorized" (401), "forbidden" (403), "not_found" (404), "conflict" (409),
            "rejected" (another 4xx), "rate_limited" (429), "server_error" (5xx), "unreachable" (no connection, or one
            that was cut), "timed_out" (a connection, and no answer), "offline" (HF_HUB_OFFLINE is set).
    """

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class WeightsChangedWarning(UserWarning):
    """Weights differ from those that their record describes: its figures are not theirs."""


class MissingPackageError(ImmunizationError, ImportError):
    """A package of an extra is not installed; the message has the command that installs it."""


# Package -> the extra that brings it. Training and measuring need none of them.
_EXTRAS = {"matplotlib": "plots", "peft": "audit", "scipy": "audit", "sklearn": "audit"}


@contextmanager
def named_extras() -> Iterator[None]:
    """Within it, a package that an extra would have brought is missed by the name of that extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise MissingPackageError(
            f"Expected the package {package}, found it not installed. Install what brings it: "
            f"pip install 'hf-immunize[{_EXTRAS[package]}]'"
        ) from error
