"""The other programs: which Debian packages each needs, and how each shows a tree."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fsdriver.mountpoint import UnmountError, unmount
from scripts.bench_setting import CannotError, install, mountctl, note, run


class Rival(NamedTuple):
    """A program measured beside ours. `tools` are its programs and the packages they are in.

    `mount` makes the command that shows a tree (squashfuse: an image of one) at a mount point,
    with a directory on the same disk for what is written, or None to only read.
    """

    tools: dict[str, str]
    mount: Callable[[str, str, str | None], list[str]] | None = None
    writes: bool = False


def _fuse_overlayfs(tree: str, at: str, written: str | None) -> list[str]:
    options = f"lowerdir={tree}"
    if written is not None:
        for name in ("upper", "work"):
            os.mkdir(os.path.join(written, name))
        options += f",upperdir={written}/upper,workdir={written}/work"
    return ["fuse-overlayfs", "-o", options, at]


RIVALS = {
    "git": Rival({"git": "git"}),
    "squashfuse": Rival(
        {"squashfuse_ll": "squashfuse", "mksquashfs": "squashfs-tools"},
        lambda image, at, written: ["squashfuse_ll", image, at],  # the faster one of its two
    ),
    "bindfs": Rival(
        {"bindfs": "bindfs"},
        lambda tree, at, written: ["bindfs", "--no-allow-other", tree, at],
        writes=True,
    ),
    "fuse-overlayfs": Rival({"fuse-overlayfs": "fuse-overlayfs"}, _fuse_overlayfs, writes=True),
}


def prepare(names: list[str], place: str) -> tuple[dict[str, str], list[str]]:
    """Installs what is missing; returns the version of each that works, and why others do not."""
    versions, missing = {}, []
    for name in names:
        tools = RIVALS[name].tools
        wanted = [package for tool, package in tools.items() if shutil.which(tool) is None]
        try:
            if wanted:
                install(wanted)
            if RIVALS[name].mount is not None:
                _try(name, os.path.join(place, "try-" + name))
        except CannotError as error:
            note(f"{name}: {error}")
            missing.append(f"{name}: {error}")
            continue
        versions[name] = "of unknown version"
        with contextlib.suppress(CannotError, FileNotFoundError):
            package = next(iter(tools.values()))
            versions[name] = run("dpkg-query", "--show", "-f=${Version}", package).output
    return versions, missing


def _try(name: str, place: str) -> None:
    """Mounts nothing much. Raises CannotError where this user or machine may not."""
    tree, at = os.path.join(place, "tree"), os.path.join(place, "at")
    os.makedirs(tree)
    if name == "squashfuse":
        tree = image_of(tree, tree + ".image")
    with theirs(name, tree, at):
        pass


def image_of(tree: str, image: str) -> str:
    """Makes a squashfs image, compressed as our store is, and returns its path."""
    run("mksquashfs", tree, image, "-comp", "zstd", "-Xcompression-level", "3", "-quiet")
    return image


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
def theirs(name: str, tree: str, at: str, written: str | None = None) -> Iterator[float]:
    """Mounts another filesystem on a tree or image; gives the seconds until it came back."""
    command = RIVALS[name].mount
    assert command is not None
    os.makedirs(at, exist_ok=True)
    ran = run(*command(tree, at, written), patient=True)
    try:
        yield ran.seconds
    finally:
        try:
            unmount(at)
        except UnmountError:  # something that was interrupted has not ended yet
            unmount(at, lazy=True)
