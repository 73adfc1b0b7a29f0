"""``python -m flame.cli``, for where the ``flame`` script is not on the path."""

from flame.cli import main

main()
