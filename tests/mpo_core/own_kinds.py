"""The kinds of layer that `mpo_core` itself defines; other tests may define more."""

from __future__ import annotations

import mpo_core

OWN_KINDS = tuple(name for name, kind in mpo_core.kinds().items() if kind.__module__.startswith("mpo_core."))
