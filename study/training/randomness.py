"""Random generators that depend on names alone, so that results depend neither on worker nor on order."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """A CPU generator for one purpose ("init", "data", ...) of one seed, and one parameter's name where it matters.

    The same three always give the same stream; different ones unrelated streams. 32 bits of a hash seed it, which is
    what PyTorch's Mersenne Twister takes in.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
