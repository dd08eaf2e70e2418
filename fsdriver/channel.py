"""The channel to the kernel: the one module that owns the connection of a mount.

Today it gives pyfuse3 the device itself. Whatever is to be done between the kernel and
pyfuse3 is done here and nowhere else; `operations` does not know how requests arrive. A file
handle is the inode's number, so nothing depends on open and release reaching us.

Notifications to the kernel may wait for a request that is being answered, so they leave from
a thread, never from inside of a request.
"""

import contextlib
import os

import pyfuse3
import trio

from engine import EngineError, InodeNo


class ChannelError(EngineError):
    """The kernel or fusermount3 refused the mount."""


class Channel:
    """One mount's connection."""

    def __init__(
        self,
        operations: pyfuse3.Operations,
        mountpoint: str,
        *,
        source: str,
        allow_other: bool,
    ) -> None:
        """Mounts. `source` is what /proc/mounts shows as the device. Raises ChannelError."""
        options = set(pyfuse3.default_options)
        options |= {f"fsname={_option(source)}", "subtype=amalgamfs"}
        if os.geteuid() == 0:
            options |= {"dev", "suid"}
        if allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError as error:
            raise ChannelError(f"the mount was refused: {error}") from error

    async def serve(self) -> None:
        """Answers requests until the mount ends or `stop` is called.

        Two readers at least: with pyfuse3's one, each request starts a task and ends another,
        and a warm `find` takes half as long again.
        """
        await pyfuse3.main(min_tasks=2, max_tasks=99)

    def stop(self) -> None:
        """Makes `serve` return; the mount stays until `close`."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Ends the mount, even a busy one, and the connection."""
        pyfuse3.close(unmount=True)

    async def forget_entry(self, parent: InodeNo, name: bytes) -> None:
        """Makes the kernel look a name up again."""

        def notify() -> None:
            with contextlib.suppress(OSError):  # the kernel did not know it
                pyfuse3.invalidate_entry(parent, name)

        await trio.to_thread.run_sync(notify)


def _option(text: str) -> str:
    """Escapes a mount option's value; libfuse takes ASCII and splits at commas."""
    text = os.fsencode(text).decode("ascii", "backslashreplace")
    return text.replace("\\", "\\\\").replace(",", "\\,")
