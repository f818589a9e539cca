"""How a command ends: errors and warnings as one line each, and what Ctrl-C says."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from interventions import printable


def is_refusal(error: Exception) -> bool:
    """Return whether an error is about the request, and no bug.

    The classes are imported here, as they take torch with them, which `distill --help` does not need.
    """
    from distill.errors import DistillError
    from interventions import InterventionError

    return isinstance(error, (DistillError, InterventionError, OSError))


def message_of(error: Exception) -> str:
    """Return the message of an error, with the path where the system refused one."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    return f"{str(error.filename)[:200]} cannot be used: {error.strerror}; name another path, or see who may use it."


def refuse_usage(error: Any) -> NoReturn:
    """Print what is wrong with an option on one line, or the help where there is no argument, and exit."""
    text = error.format_message()
    if "\n" in text:
        error.show()
        raise SystemExit(error.exit_code) from None
    path = error.ctx.command_path if error.ctx else "distill"
    say(f"distill: {text.rstrip('.')}; see {path} --help.")
    raise SystemExit(error.exit_code) from None


def say(text: str) -> None:
    """Print a message on the error stream; of several processes that come to it, one prints it."""
    if _may_say(text):
        print(printable(text), file=sys.stderr)


def _may_say(text: str) -> bool:
    if several_processes():
        from distill.processes import may_say

        return may_say(text)
    return True


def several_processes() -> bool:
    """Return whether this is one of several processes that were started together, as `torchrun` starts them.

    It is read from the environment, as torch would take a second to import.
    """
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


@contextmanager
def together() -> Iterator[None]:
    """Let processes that were started together know each other inside the block, and divide measurements."""
    if not several_processes():
        yield
        return
    from distill.processes import dividing, process_state, processes

    known = processes() > 1
    state = process_state()
    with dividing():
        yield
    if not known:
        state.destroy_process_group()


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Print on Ctrl-C how to resume, and exit with 130; typer itself would exit without a message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        say(f"\ndistill: {str(stop) or 'stopped.'}")
        raise SystemExit(130) from None


def silence_libraries() -> None:
    """Turn off the progress bars and loading notes of other libraries, and print each warning once, on one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.formatwarning = _once(_one_line)


def _once(form: Callable[..., str]) -> Callable[..., str]:
    """Return a format of warnings that is empty for a text that was shown before.

    Networks are tried several times in a run, and would warn each time.
    """
    shown: set[str] = set()

    def form_once(*warning: Any, **place: Any) -> str:
        text = form(*warning, **place)
        known = text in shown
        shown.add(text)
        return text if not known and _may_say(text) else ""

    return form_once


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning without the source line that gave it, with "distill: " before those of this package."""
    return printable(f"{'distill: ' if 'distill' in Path(filename).parts else ''}{message}\n")
