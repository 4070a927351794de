"""`python -m study` is `mpo-study`."""

from study.cli import main

main()
