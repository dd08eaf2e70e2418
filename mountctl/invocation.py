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
TRUST_VARIABLE = "AMALGAMFS_TRUST_STORE"
"""Paths of stores of other users that may be opened, with colons between; `*` for all."""
COMPLETE_VARIABLE = "_MOUNTCTL_COMPLETE"
"""Set by a shell that asks what a word may become; click's name for it."""


class Invocation:
    """What was asked for. The global options set its fields, wherever they stand."""

    def __init__(self) -> None:
        self.store: str | None = None
        self.json = False
        self.quiet = False
        self.trust_store = False

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
        from engine.storage.interrupting import end_at_once
        from mountctl import crashed
        from mountctl.access import StoreAccess

        path = self.store_path
        crashed.arm(path, self.json)
        end_at_once()
        return StoreAccess(path, self.output, trusted=self.trusts(path))

    def trusts(self, path: str) -> bool:
        """Tells whether the store at `path` may be opened though another user owns it.

        By the option, the environment, or because root got here by sudo from its owner.
        """
        listed = [each for each in os.environ.get(TRUST_VARIABLE, "").split(":") if each]
        if self.trust_store or "*" in listed:
            return True
        real = os.path.realpath(path)
        if any(os.path.realpath(each) == real for each in listed):
            return True
        user = os.environ.get("SUDO_UID", "")
        if os.geteuid() or not user.isdecimal():
            return False
        try:
            return os.stat(path).st_uid == int(user)
        except OSError:
            return False
