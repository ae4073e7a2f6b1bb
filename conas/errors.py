"""The exceptions that end a script in one line: bad input with exit code 2, a wish to stop with 130 or 143."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or flag and says how to mend it."""


class Stopped(Exception):
    """Somebody wants the script to stop, by Ctrl-C or SIGTERM; `code` is the exit code that this has by custom.

    Or it has to stop, with code 1, since another process that it computes with is gone.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
