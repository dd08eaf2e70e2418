"""What was agreed with the kernel when a mount began."""

from dataclasses import dataclass


@dataclass
class Abilities:
    """Whether the kernel can do without OPENDIR, and caches listings then; the channel sets it."""

    no_opendir: bool = False
