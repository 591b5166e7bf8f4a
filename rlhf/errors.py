"""One class for what the user can mend, and the way such an error leaves the program."""

import contextlib
import difflib
import os
import sys


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and what to do next."""


@contextlib.contextmanager
def naming_input(*kinds):
    """Errors of these kinds, by which the engine says what is wrong with folders, budgets and numbers that the user
    gave, as InputErrors of one line."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(" ".join(str(error).split())) from None


def require(holds, name, value, wanted):
    """Raise InputError where an option's value does not hold."""
    if not holds:
        raise InputError(f"--{name} is {value}; it has to be {wanted}")


def nearest(word, known):
    """A hint such as "; did you mean 'zero2'?", or the empty string when nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def exit_on_input_error(function):
    """Call `function()`; an InputError becomes one line on stderr and exit status 2, on every rank."""
    try:
        return function()
    except InputError as error:
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
