"""What ends a job early: each error is one line for the user."""


class InputError(ValueError):
    """What the user gave cannot be used; the message, one line, names the flag or file."""


class RunFailed(RuntimeError):  # noqa: N818, what the user reads is not an error of ours
    """A run cannot go on; the message, one line, says why and what to do next."""


class RunStopped(RunFailed):
    """A run was asked to stop before its end; it can be continued."""


def first_line(error: BaseException) -> str:
    """Return what an error says, as a part of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
