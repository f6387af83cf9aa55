"""The one exception for input that a user can put right."""


class UserError(Exception):
    """Bad input (file, flag, data): printed as one line that names the remedy, exit status 1."""


# How Python prints the class above in a traceback.
LABEL = f"{UserError.__module__}.{UserError.__qualname__}: "


def one_line(error: UserError) -> str:
    """Return the error's message.

    A DataLoader raises a worker's error again with the whole traceback as its text; the message is
    the last line of that.
    """
    last_line = str(error).strip().split("\n")[-1]
    return last_line.removeprefix(LABEL)
