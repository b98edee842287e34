"""The exceptions of hflfnerv.

Wrong arguments raise ``TypeError`` or ``ValueError`` like everywhere else in Python. What is left is here: a missing
implementation, a bad bitstream, and bad media. Every message says what is wrong and, where there is one, the remedy.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BadMagic",
    "BitstreamError",
    "CheckpointError",
    "ChecksumMismatch",
    "HflfnervError",
    "InvalidBitstream",
    "InvalidCode",
    "MediaError",
    "TrainingDiverged",
    "TrainingInterrupted",
    "TruncatedBitstream",
    "UnsupportedVersion",
]


class HflfnervError(Exception):
    """Base class of everything that hflfnerv raises on its own account."""


class BackendUnavailable(HflfnervError, RuntimeError):
    """The requested implementation cannot run here or on these inputs; the message says why."""


class MediaError(HflfnervError, ValueError):
    """A video or an image folder cannot be read or written."""


class CheckpointError(HflfnervError, ValueError):
    """A training checkpoint is damaged or belongs to another run."""


class TrainingDiverged(HflfnervError, ArithmeticError):
    """The loss is no longer finite."""


class TrainingInterrupted(HflfnervError):
    """Training was stopped by a signal; the message says where it can go on."""


class BitstreamError(HflfnervError, ValueError):
    """Coded data cannot be decoded. The subclasses name the cause."""


class BadMagic(BitstreamError):
    """The data does not begin with the expected signature: it is something else."""


class UnsupportedVersion(BitstreamError):
    """The data was written by a newer format, or needs a section this version does not know."""


class TruncatedBitstream(BitstreamError):
    """The data ends before it should."""


class ChecksumMismatch(BitstreamError):
    """The data was changed after it was written."""


class InvalidCode(BitstreamError):
    """An entropy-coded part holds a table or a code word that no encoder writes."""


class InvalidBitstream(BitstreamError):
    """A field has a value that the format does not allow."""
