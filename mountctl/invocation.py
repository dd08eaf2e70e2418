"""One call of the program: what its options and its environment say.

The only module that reads the environment for configuration and knows of the home directory.
"""

import os
from functools import cached_property
from typing import TYPE_CHECKING

from mountctl.output import Output

if TYPE_CHECKING:
    from mountctl.access import StoreAccess

STORE_VARIABLE = "AMALGAMFS_STORE"
COMPLETE_VARIABLE = "_MOUNTCTL_COMPLETE"
"""Set by a shell that asks what a word may become; click's name for it."""


class Invocation:
    """What was asked for. The global options set its fields, wherever they stand."""

    def __init__(self) -> None:
        self.store: str | None = None
        self.json = False
        self.quiet = False

    @cached_property
    def output(self) -> Output:
        """Where to write; to be used once the options have been read."""
        return Output(json=self.json, quiet=self.quiet)

    @property
    def store_path(self) -> str:
        """The absolute path of the store: option, environment, XDG data directory."""
        path = self.store or os.environ.get(STORE_VARIABLE)
        if not path:
            import platformdirs

            path = os.path.join(platformdirs.user_data_dir("amalgamfs"), "store")
        return os.path.abspath(path)

    def open(self) -> "StoreAccess":
        """Opens the store; to be used in a `with` statement. Raises a StoreError."""
        from mountctl import crashed
        from mountctl.access import StoreAccess

        crashed.arm(self.store_path, self.json)
        return StoreAccess(self.store_path, self.output)
