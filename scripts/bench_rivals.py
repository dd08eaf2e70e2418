"""The other programs: what each is called, where it comes from, how it is mounted."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fsdriver.mountpoint import unmount
from scripts.bench_setting import CannotError, install, mountctl, note, run


class Rival(NamedTuple):
    """A program measured beside ours. `mount` makes the command that shows a tree.

    It is called with the tree (squashfuse: its image), the mount point, and an empty directory
    on the same disk for what is written, or None to only read.
    """

    packages: dict[str, str]  # by a program of each
    version: tuple[str, ...]
    mount: Callable[[str, str, str | None], list[str]] | None = None
    writes: bool = False


def _fuse_overlayfs(tree: str, at: str, upper: str | None) -> list[str]:
    options = f"lowerdir={tree}"
    if upper is not None:
        for name in ("upper", "work"):
            os.mkdir(os.path.join(upper, name))
        options += f",upperdir={upper}/upper,workdir={upper}/work"
    return ["fuse-overlayfs", "-o", options, at]


RIVALS = {
    "git": Rival({"git": "git"}, ("git", "--version")),
    "squashfuse": Rival(
        {"squashfuse_ll": "squashfuse", "mksquashfs": "squashfs-tools"},
        ("dpkg-query", "--show", "squashfuse"),
        lambda tree, at, upper: ["squashfuse_ll", tree, at],
    ),
    "bindfs": Rival(
        {"bindfs": "bindfs"}, ("bindfs", "--version"),
        lambda tree, at, upper: ["bindfs", tree, at], writes=True,
    ),
    "fuse-overlayfs": Rival(
        {"fuse-overlayfs": "fuse-overlayfs"}, ("fuse-overlayfs", "--version"),
        _fuse_overlayfs, writes=True,
    ),
}  # fmt: skip


def prepare(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Installs what is missing; returns the version of each that is there, and what is not."""
    versions, missing = {}, []
    for name in names:
        rival = RIVALS[name]
        wanted = [package for tool, package in rival.packages.items() if shutil.which(tool) is None]
        try:
            if wanted:
                install(wanted)
            versions[name] = run(*rival.version).output.splitlines()[0].replace("\t", " ")
        except CannotError as error:
            note(f"{name}: {error}")
            missing.append(f"{name}: {str(error).splitlines()[0]}")
    return versions, missing


@contextlib.contextmanager
def ours(store: str, at: str) -> Iterator[float]:
    """Mounts a store; gives the seconds until `mountctl mount` came back."""
    os.makedirs(at, exist_ok=True)
    ran = mountctl(store, "mount", at, patient=True)
    try:
        yield ran.seconds
    finally:
        mountctl(store, "umount", patient=True)


@contextlib.contextmanager
def theirs(name: str, tree: str, at: str, upper: str | None = None) -> Iterator[float]:
    """Mounts another filesystem on a tree or image; gives the seconds until it came back."""
    command = RIVALS[name].mount
    assert command is not None
    os.makedirs(at, exist_ok=True)
    ran = run(*command(tree, at, upper), patient=True)
    try:
        yield ran.seconds
    finally:
        unmount(at, lazy=True)
