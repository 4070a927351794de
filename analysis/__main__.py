"""`python -m analysis`: the same as `mpo-analysis`."""

from __future__ import annotations

from analysis.commands.cli import main

if __name__ == "__main__":
    main()
