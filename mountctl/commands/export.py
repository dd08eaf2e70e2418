"""`mountctl export`."""

from typing import TYPE_CHECKING

import click

from mountctl.changes import warn_of_set_id
from mountctl.command import DIRECTORY, SNAPSHOT, Command, pass_invocation
from mountctl.invocation import Invocation
from mountctl.streams import compressing, refuse_terminal, written
from mountctl.text import count, size

if TYPE_CHECKING:
    from engine.storage.nodes import Entry
    from mountctl.access import StoreAccess

_SUFFIXES = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".tzst": "zstd", ".xz": "xz",
             ".txz": "xz"}  # fmt: skip


def _suffix_of(file: str) -> str:
    return next((form for end, form in _SUFFIXES.items() if file.endswith(end)), "none")


def _architecture() -> str:
    """Returns this machine's architecture by the name that images know it by."""
    import platform

    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _below(store: "StoreAccess", root: "Entry", path: str) -> "Entry":
    """Returns the directory at a path of a tree. Raises a PathError."""
    import os

    from engine.storage.nodes import Kind
    from engine.trees.directory import find
    from engine.trees.paths import MissingPathError, NoDirectoryError

    name = os.fsencode(path).strip(b"/")
    entry = find(store.repository.objects, root, name)
    if entry is None:
        raise MissingPathError(name)
    if entry.kind != Kind.DIRECTORY:
        raise NoDirectoryError(name)
    return entry


@click.command(
    "export",
    cls=Command,
    example="""
    $ mountctl export main --tar lua.tar.zst
    $ mountctl export @work:src --tar - | ssh other tar -x
    $ mountctl export @work --oci image
    """,
)
@click.argument(
    "snapshot", type=SNAPSHOT, metavar="SNAPSHOT[:PATH]",
    help="An id, the beginning of one, a ref, or @SESSION; of it a directory.",
)  # fmt: skip
@click.option("--tar", metavar="FILE", type=click.Path(), help="Write a tar archive; - is a pipe.")
@click.option(
    "--compress", type=click.Choice(["gzip", "xz", "zstd", "none"]),
    help="How to compress the archive; else as its name ends.",
)  # fmt: skip
@click.option("--oci", metavar="DIR", type=DIRECTORY, help="Make an OCI image layout at DIR.")
@click.option(
    "--image",
    metavar="NAME",
    help="The image's name, with --oci; else latest.",
)
@click.option("--set-id", is_flag=True, help="Write set-id bits; the files are root's then.")
@pass_invocation
def command(
    invocation: Invocation,
    snapshot: str,
    tar: str | None,
    compress: str | None,
    oci: str | None,
    image: str | None,
    set_id: bool,
) -> None:
    """Write a snapshot out as a tar archive or an OCI image.

    The same tree gives the same bytes. What is written appears when all of it is there, or not
    at all. An image has a layer for each layer of @SESSION, and one for what it changed; a
    snapshot is one layer. Every file is root's there, so set-id bits are left out unless you ask
    for them.
    """
    if (tar is None) == (oci is None):
        raise click.UsageError("name one of --tar FILE and --oci DIR")
    if compress is not None and tar is None:
        raise click.UsageError("--compress goes with --tar")
    if image is not None and oci is None:
        raise click.UsageError("--image goes with --oci")
    name, colon, path = snapshot.partition(":")
    output = invocation.output
    if oci is not None:
        if colon:
            raise click.UsageError("an image is of a whole tree: leave out :PATH")
        with (
            invocation.open() as store,
            store.tree(name) as root,
            output.progress("writing", "members") as progress,
        ):
            layers = store.repository.layers_of(name)
            made = store.repository.export_oci(
                layers, root, oci,
                image=image or "latest", architecture=_architecture(), set_id=set_id,
                progress=progress,
            )  # fmt: skip
        if output.json:
            output.result({"directory": oci, "manifest": made.manifest, "layers": made.layers,
                           "bytes": made.bytes, "set_id_dropped": made.set_id_dropped})  # fmt: skip
            return
        warn_of_set_id(output, made.set_id_dropped)
        output.line(made.manifest)
        output.note(f"{count(len(made.layers), 'layer')}, {size(made.bytes)}")
        return
    assert tar is not None
    refuse_terminal(tar)
    with invocation.open() as store, store.tree(name) as root:
        top = _below(store, root, path) if path.strip("/.") else root
        with (
            written(tar) as out,
            compressing(out, compress or _suffix_of(tar)) as stream,
            output.progress("writing", "members") as progress,
        ):
            report = store.repository.export_tar(top, stream, set_id=set_id, progress=progress)
    fields = {
        "file": tar, "entries": report.entries, "bytes": report.bytes,
        "set_id_dropped": report.set_id_dropped,
    }  # fmt: skip
    if output.json and tar == "-":
        output.last("export", fields)
    elif output.json:
        output.result(fields)
    else:
        warn_of_set_id(output, report.set_id_dropped)
        output.note(f"wrote {count(report.entries, 'entry')}, {size(report.bytes)} of tar")
