"""The one exception for input that a user can put right."""


class UserError(Exception):
    """Bad input (file, flag, data): printed as one line that names the remedy, exit status 1."""


def one_line(error: UserError) -> str:
    """Its message. From a loader worker it comes wrapped in a traceback, ours is the last line."""
    return str(error).strip().split("\n")[-1].removeprefix("common.errors.UserError: ")
