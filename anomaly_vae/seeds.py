"""Seeds for everything that involves chance: one run seed, and a name for each use of it."""

import hashlib

import torch


def seed_of(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one purpose and index, unrelated to those of any other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def content_hash(content: bytes) -> int:
    """64 bits that tell a file, or an array's pixels, from any other."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def generator_of(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))
