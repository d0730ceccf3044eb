"""The error for bad input, and recognizing a full disk."""


class InputError(ValueError):
    """Bad input: the message names file, row or key, what was found and expected, and what to do."""


def first_line(error: BaseException) -> str:
    """The type and first line of a library's error, to quote in a message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


NO_SPACE = (
    "No space left on device",
    "Not enough disk space",
    "Disk quota exceeded",
    "File too large",
    "database or disk is full",
    "iostream error",
)
"""The system's words; the last are C++'s, from torch.save, which never gives the reason."""


def disk_full(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that says so: each library has an exception of its own."""
    while error is not None and not any(words in str(error) for words in NO_SPACE):
        error = error.__cause__ or error.__context__
    return error
