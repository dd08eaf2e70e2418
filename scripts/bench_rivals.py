"""The other programs: which Debian packages each needs, and how each shows a tree."""

import contextlib
import os
import select
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fsdriver.mountpoint import UnmountError, unmount
from scripts.bench_setting import CannotError, install, mountctl, note, run, shell


class Rival(NamedTuple):
    """A program measured beside ours. `tools` are its programs and the packages they are in.

    `mount` makes the command that shows a tree at a mount point, or, where there is `pack`, what
    that has made of a tree; with a directory on the same disk for what is written, or None to
    only read. The tree is then in the directory `shows` of the mount.
    """

    tools: dict[str, str]
    mount: Callable[[str, str, str | None], list[str]] | None = None
    writes: bool = False
    pack: Callable[[str, str], None] | None = None
    shows: str = ""


def _fuse_overlayfs(tree: str, at: str, written: str | None) -> list[str]:
    options = f"lowerdir={tree}"
    if written is not None:
        for name in ("upper", "work"):
            os.mkdir(os.path.join(written, name))
        options += f",upperdir={written}/upper,workdir={written}/work"
    return ["fuse-overlayfs", "-o", options, at]


def _squash(tree: str, image: str) -> None:
    """Makes an image, compressed as our store is."""
    run("mksquashfs", tree, image, "-comp", "zstd", "-Xcompression-level", "3", "-quiet")


_RESTIC = """repository=$1
restic() {
    command restic -q -r "$repository" --cache-dir "$repository.cache" \\
        --password-command 'echo bench' "$@"
}
"""


def _back_up(tree: str, repository: str) -> None:
    shell(_RESTIC + "restic init; restic backup .", repository, cwd=tree)


def _restic(repository: str, at: str, written: str | None) -> list[str]:
    """Makes a command that ends when the mount is there; restic itself stays."""
    wait = 'until [ -d "$2/snapshots" ]; do kill -0 $!; sleep 0.01; done'
    return ["sh", "-ec", f'{_RESTIC}restic mount "$2" &\n{wait}', "sh", repository, at]


RIVALS = {
    "git": Rival({"git": "git"}),
    "squashfuse": Rival(
        {"squashfuse_ll": "squashfuse", "mksquashfs": "squashfs-tools"},
        lambda image, at, written: ["squashfuse_ll", image, at],  # the faster one of its two
        pack=_squash,
    ),
    "bindfs": Rival(
        {"bindfs": "bindfs"},
        lambda tree, at, written: ["bindfs", "--no-allow-other", tree, at],
        writes=True,
    ),
    "fuse-overlayfs": Rival({"fuse-overlayfs": "fuse-overlayfs"}, _fuse_overlayfs, writes=True),
    "restic": Rival({"restic": "restic"}, _restic, pack=_back_up, shows="snapshots/latest"),
}


def prepare(names: list[str], place: str) -> tuple[dict[str, str], list[str]]:
    """Installs what is missing; returns the version of each that works, and why others do not."""
    versions, missing = {}, []
    for name in names:
        tools = RIVALS[name].tools
        try:
            get(tools)
            if RIVALS[name].mount is not None:
                _try(name, os.path.join(place, "try-" + name))
        except CannotError as error:
            note(f"{name}: {error}")
            missing.append(f"{name}: {error}")
            continue
        versions[name] = version_of(next(iter(tools.values())))
    return versions, missing


def get(tools: dict[str, str]) -> None:
    """Installs the packages of those programs that are not there. Raises CannotError."""
    wanted = [package for tool, package in tools.items() if shutil.which(tool) is None]
    if wanted:
        install(wanted)


def version_of(package: str) -> str:
    """Returns the version of a Debian package."""
    with contextlib.suppress(CannotError, FileNotFoundError):
        return run("dpkg-query", "--show", "-f=${Version}", package).output
    return "of unknown version"


def _try(name: str, place: str) -> None:
    """Mounts nothing much. Raises CannotError where this user or machine may not."""
    tree, at = os.path.join(place, "tree"), os.path.join(place, "at")
    os.makedirs(os.path.join(tree, "directory"))  # restic backs up no empty tree
    pack = RIVALS[name].pack
    if pack is not None:
        pack(tree, tree + ".packed")
        tree += ".packed"
    with theirs(name, tree, at):
        pass


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
    """Mounts another filesystem on a tree, or what was packed; gives the seconds that took."""
    command = RIVALS[name].mount
    assert command is not None
    os.makedirs(at, exist_ok=True)
    held, given = os.pipe()
    try:
        try:
            ran = run(*command(tree, at, written), patient=True, keeps=(given,))
        finally:
            os.close(given)
        try:
            yield ran.seconds
        finally:
            try:
                unmount(at)
            except UnmountError:  # something that was interrupted has not ended yet
                unmount(at, lazy=True)
            # Until the program has ended: restic's last act is to unmount that path once more.
            select.select([held], [], [], 10)
    finally:
        os.close(held)
