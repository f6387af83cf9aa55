"""The one exception for input that a user can put right."""


class UserError(Exception):
    """Bad input (file, flag, data): printed as one line that names the remedy, exit status 1."""
