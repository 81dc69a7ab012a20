"""Say an error that a user can mend in one line, and keep the standard streams usable.

This module imports the standard library only, since the import of anything else may be
what fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from textwrap import shorten

# What libraries say where the system gives them no memory, or no thread.
NO_MEMORY = re.compile(
    r"bad_alloc|[Cc]annot allocate memory|can't allocate memory|not enough memory|"
    r"failed to map segment|can't start new thread|Resource temporarily unavailable|"
    r"[Uu]nable to allocate|failed to allocate memory|Memory allocation fail",
)
NO_GPU_MEMORY = re.compile("CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC")
AGAIN = "mend that and run the same command again"


def line_of(error: BaseException) -> str | None:
    """Return the line that tells a user what failed and how to mend it; None if the
    error is no user's, but a fault of this tool. The line is empty where another
    process tells the error."""
    text = " ".join(str(error).split())
    said = shorten(text, 160, placeholder=" …")
    if _is_meal_error(error):
        return str(error)
    if NO_GPU_MEMORY.search(text):
        return f"{said}; lower --batch-size"
    if isinstance(error, MemoryError) or (
        isinstance(error, (OSError, ImportError, RuntimeError)) and _lacks_memory(error)
    ):
        if len(text) > len(said) and (found := NO_MEMORY.search(text)):
            said = found.group()
        return (
            f"memory or threads are short ({said or type(error).__name__}); raise the limit "
            f"(ulimit -v, ulimit -u, the job's memory), or lower --batch-size and render.threads"
        )
    if refused := refusal_of(error):
        error = refused
    if isinstance(error, RuntimeError):
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return (
                f"torch.compile fails here ({said}); leave out store.compile and train.compile, "
                f"or install a C++ compiler"
            )
        return None
    if isinstance(error, UnicodeEncodeError) and error.reason != "surrogates not allowed":
        return (
            f"this locale ({sys.getfilesystemencoding()}) can't write the name "
            f"{error.object!a}; set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
        )
    if isinstance(error, OSError):  # a full disk, a folder without permission
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{_printable(where)}{error.strerror or error}; {AGAIN}"
    return None


def refusal_of(error: BaseException) -> OSError | None:
    """Return the error of the system with which a library failed to write a file; None
    for another error. safetensors and torch raise errors of their own."""
    if type(error).__name__ == "SafetensorError" and (
        found := re.search(r"\(os error (\d+)\)", str(error))
    ):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter failed writing|inline_container.cc", str(error)
    ):
        return OSError(errno.EIO, "a file can't be written, the disk may be full")
    return None


def _is_meal_error(error: BaseException) -> bool:
    errors = sys.modules.get("cache.errors")
    return errors is not None and isinstance(error, errors.MealError)


def _lacks_memory(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN) or bool(
        NO_MEMORY.search(str(error))
    )


def _printable(text: str) -> str:
    errors = sys.modules.get("cache.errors")
    return ascii(text)[1:-1] if errors is None else errors.printable(text)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Make stdin, stdout and stderr usable, whatever the caller closed, and able to
    print any text in any locale.

    A closed descriptor would be given to the next file that is opened, and what is
    printed would go there. Closed stdin and stderr become the null device. Closed
    stdout becomes a descriptor on which writing fails, since results must not be lost
    unsaid. Characters that a stream can't encode are printed as escapes.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:  # Python fails on these at its end, and changes the exit status
        give_up("stdout")
        give_up("stderr")


def give_up(name: str) -> bool:
    """Flush a stream, "stdout" or "stderr". Where that fails, drop what is still to be
    printed, and return True."""
    stream = getattr(sys, name)
    try:
        stream.flush()
        return False
    except (OSError, ValueError):  # ValueError: the stream is closed
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
            stream.flush()
        return True
