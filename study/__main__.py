"""`python -m study` is `mpo-study`."""

from study.commands.cli import main

main()
