"""Errors that a user can fix: each message says what is wrong, what was expected, and the cure."""

LONGEST = 300  # characters of a message


def printable(text: str) -> str:
    """Return a text whose control characters, and half characters, are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ColmError(Exception):
    """Base of every error that colm-edge raises on purpose. Its text is one line that can be
    printed, whatever names and values of hostile files it tells; a long one lacks its middle."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > 8 * LONGEST:  # a server may say megabytes
            text = text[: 4 * LONGEST] + text[-4 * LONGEST :]
        text = printable(" ".join(text.split()))
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 2 // 3 - 3]} … {text[-LONGEST // 3 :]}"
        return text


class ModelError(ColmError):
    """A model file is missing, broken, or of a kind that cannot collaborate."""


class MismatchError(ColmError):
    """Two models, or a model and a switch, do not fit each other."""


class SwitchError(ColmError):
    """A switch file is missing, broken or incomplete."""


class PromptError(ColmError):
    """A prompt is empty or does not fit the context."""


class ContextError(PromptError):
    """A prompt does not fit the context."""


class AbsentExpertError(ColmError):
    """An expert does not answer, or has no word for it; the base can continue alone."""


class DataError(ColmError):
    """A data file is missing or has a bad line."""


class WriteError(ColmError):
    """A file cannot be written."""
