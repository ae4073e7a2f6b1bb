"""The one exception that users see: every script prints it as a single line and exits with code 2."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or flag and says how to mend it."""
