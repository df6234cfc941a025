"""The exception for every problem that a user can correct."""


class UserError(Exception):
    """A problem in what the user gave us: shown as one message, without a traceback.

    The message says what was expected, what came and which field to change.

    Args:
      message: the full text that the user sees.
      status: exit status of the command, 2 for wrong usage (a name, a field, a path that was typed), 1 for what only
        shows at run time (a damaged file, a full disk, a diverged run).
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class TooLongError(UserError, ValueError):
    """A document is longer than the model can attend to (`decoder.max_tokens`)."""
