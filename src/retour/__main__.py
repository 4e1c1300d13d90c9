"""`python -m retour` is the `retour` command."""

from .cli import main

main()
