"""The exceptions that end a script with one line: bad input with exit code 2, a request to stop with 130 or 143."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or flag and says how to fix it."""


class Stopped(Exception):
    """A request to stop, by Ctrl-C or SIGTERM; `code` is the conventional exit code for it.

    Or, with code 1, the need to stop because another process of the same run is gone.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def one_line(text: object, longest: int = 2000) -> str:
    """A text as one line without control characters, since part of it may come out of a hostile file."""
    text = " ".join(str(text).split())
    text = text if len(text) <= longest else f"{text[:longest // 2]} ... {text[-longest // 2:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
