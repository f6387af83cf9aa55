"""The one exception for input that a user can put right."""


class UserError(Exception):
    """Bad input (file, flag, data): printed as one line, exit status 1; the text names the remedy."""
