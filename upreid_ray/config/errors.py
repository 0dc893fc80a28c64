"""Errors that end a job with one line for the user."""


class InputError(ValueError):
    """A refusal of what the user gave; its message is one line that names the flag or file."""


class RunFailed(RuntimeError):  # noqa: N818, what the user reads is not an error of ours
    """A run that cannot continue; the message is one line that says why and what to do."""


class RunStopped(RunFailed):
    """A run that was asked to stop before its end, and can be continued."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, at most 200 characters."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
