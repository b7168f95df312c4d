"""`python -m synface`: the command line."""

from .cli import main

main()
