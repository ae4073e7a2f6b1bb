"""The one exception that users see: every script prints it as a single line and exits with code 2."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or flag and says how to mend it."""


def one_line(text: object, longest: int = 2000) -> str:
    """A text as one line without control characters, since part of it may come out of a hostile file."""
    text = " ".join(str(text).split())
    text = text if len(text) <= longest else f"{text[:longest // 2]} ... {text[-longest // 2:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
