"""What was agreed with the kernel when a mount began."""

from dataclasses import dataclass


@dataclass
class Abilities:
    """Whether the kernel can do without OPEN and OPENDIR; the channel sets it."""

    no_open: bool = False
    no_opendir: bool = False
