"""Errors that end a job with one line for the user."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class InputError(ValueError):
    """A refusal of what the user gave; its message is one line that names the flag or file."""

    def __str__(self) -> str:
        """Return the message, in which line breaks and other control characters are escaped."""
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())


class RunFailed(RuntimeError):  # noqa: N818, what the user reads is not an error of ours
    """A run that cannot continue; the message is one line that says why and what to do."""


class RunStopped(RunFailed):
    """A run that was asked to stop before its end, and can be continued."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, at most 200 characters."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
