"""The one exception for input that a user can put right."""


class UserError(Exception):
    """Bad input (file, flag, data): printed as one line that names the remedy, exit status 1.

    `problem` is the line without its `remedy`, for a list in which that would be repeated.
    """

    def __init__(self, problem: str, remedy: str = ""):
        self.problem = problem
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


# How Python begins the line of such an error in a traceback.
LABEL = f"{UserError.__module__}.{UserError.__qualname__}: "


def one_line(error: UserError) -> str:
    """Return the error's message.

    A DataLoader raises a worker's error again with the whole traceback as its text; the message
    follows the label there.
    """
    message = str(error).rpartition(LABEL)[2]
    return " ".join(message.split())
