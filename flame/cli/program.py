"""The name under which the user called the command, for messages that are to be typed again."""

import os


def program() -> str:
    """``flame``, or what the script that called it says it is (``./run`` sets FLAME_PROGRAM)."""
    return os.environ.get("FLAME_PROGRAM") or "flame"
