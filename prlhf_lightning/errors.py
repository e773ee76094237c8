"""Errors that a person can act on: each message says where, what and how to mend it."""


class PRLHFError(Exception):
    """Base of every error that this package raises on purpose."""


class FeedbackFormatError(PRLHFError, ValueError):
    """A feedback file or row is not what it should be. The message starts with `path:line: field 'name'`."""


class ConfigurationError(PRLHFError, ValueError):
    """Settings that contradict one another or the model in use."""


class PromptTooLongError(ConfigurationError):
    """A prompt that leaves no position of the model for an answer."""


class NonFiniteError(PRLHFError, ArithmeticError):
    """A loss, a gradient or weights are infinite or NaN: in training, or in what a checkpoint or an export holds.

    In training all processes raise it in the same step.
    """


class DamagedCheckpointError(ConfigurationError):
    """A checkpoint file that is not, byte for byte, what was written, or that never was a checkpoint."""


class CheckpointWriteError(PRLHFError, OSError):
    """A file that could not be written, as on a full disk; what was there before it is untouched."""


class JudgeError(PRLHFError):
    """A judge that gave no verdict on a question; the message says why, and nothing of what was asked."""
