"""The ``flame`` command. Everything heavy is imported by the command that needs it."""

import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 a FlameError, 2 wrong usage, 130 left by Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("FLAME_DEBUG", "0") not in ("", "0")
    try:
        sys.exit(_run(words, debug=debug))
    except KeyboardInterrupt:
        print("flame: left at once", file=sys.stderr)
        sys.exit(130)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flame: warning: {message}", file=sys.stderr)


def _run(words: list[str], *, debug: bool) -> int:
    from flame.core.errors import FlameError

    try:
        from flame.cli.commands import application

        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return application(words)
    except FlameError as error:
        if debug:
            raise
        print(f"flame: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as head, went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
