"""Errors that are the user's to mend: one clear line and a non-zero exit, no traceback."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something given is wrong: the message says what, where, and what to do."""

    status = 2  #: a command's exit status


class Diverged(UserError):
    """A loss that is no number."""

    status = 3  # a search of learning rates goes on with the next


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def run(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; exit status 0, a `UserError`'s, 130 after an interrupt, 141 after a closed pipe."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        return 141
    except UserError as error:
        # From a data loader's worker the message arrives wrapped in that worker's traceback.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
