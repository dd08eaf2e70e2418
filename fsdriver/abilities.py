"""What was agreed with the kernel when a mount began; the channel sets it."""

from dataclasses import dataclass


@dataclass
class Abilities:
    """What the kernel can do without."""

    no_opendir: bool = False
    """It needs no OPENDIR, and caches listings then."""
    no_open: bool = False
    """It needs no OPEN: files live by its lookups."""
    largest: int = 1 << 20
    """The most bytes that one WRITE brings."""
