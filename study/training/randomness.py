"""Random generators that depend only on names, so that results depend neither on the worker nor on the order."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """A CPU generator for one seed and purpose ("init", "data", ...), and for one parameter's name if that matters.

    The same three values always give the same stream; different values give unrelated streams. The generator's seed is
    32 bits of a hash, which is as much as PyTorch's Mersenne Twister uses.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
