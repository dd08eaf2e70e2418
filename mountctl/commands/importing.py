"""`mountctl import`."""

from typing import Any

import click

from mountctl.command import (
    DIRECTORY,
    REF,
    SNAPSHOT,
    TEXT,
    Command,
    metadata_option,
    pass_invocation,
)
from mountctl.invocation import Invocation
from mountctl.moved_refs import RefBefore
from mountctl.text import count, lost_owners, not_kept, short, size, visible


@click.command(
    "import",
    cls=Command,
    example="""
    $ mountctl import ~/src/lua --ref main -m "lua 5.4.7"
    $ mountctl import build --parent main --meta commit=1f2e3d
    $ mountctl import --tar lua-5.4.7.tar.gz --ref lua
    $ mountctl import --oci image --ref base
    """,
)
@click.argument(
    "directory", metavar="[DIR]", type=DIRECTORY, required=False, help="The directory to read."
)
@click.option(
    "--tar", metavar="FILE", type=click.Path(),
    help="Read a tar archive instead, compressed or not; - is a pipe.",
)  # fmt: skip
@click.option("--oci", metavar="DIR", type=DIRECTORY, help="Read an OCI image layout instead.")
@click.option("--image", metavar="NAME", type=TEXT, help="Which image of several, with --oci.")
@click.option("--ref", metavar="NAME", type=REF, help="Make or move a ref to the snapshot.")
@click.option("--message", "-m", type=TEXT, default="", help="Say what the snapshot is.")
@click.option(
    "--parent", "parents", type=SNAPSHOT, multiple=True,
    help="What it came from; else what --ref names, else the last import of DIR. Repeatable.",
)  # fmt: skip
@metadata_option()
@click.option("--set-id", is_flag=True, help="Keep set-id bits of files that are not yours, too.")
@click.option(
    "--no-cache",
    is_flag=True,
    help="Read every file, even what looks unchanged; store again what is damaged.",
)
@click.option(
    "--owners",
    is_flag=True,
    help="Keep whose files are, by number; a store made by `init --owners` always does.",
)
@pass_invocation
def command(
    invocation: Invocation,
    directory: str | None,
    tar: str | None,
    oci: str | None,
    image: str | None,
    ref: str | None,
    message: str,
    parents: tuple[str, ...],
    metadata: dict[str, Any],
    set_id: bool,
    no_cache: bool,
    owners: bool,
) -> None:
    """Store a directory as a snapshot.

    Or what an archive or image holds, whole or not at all. Writes the snapshot's id. Files that
    have not changed since the last import of DIR are not read again; if nothing has changed, the
    snapshot is the last one. Sockets and devices are left out, with a warning each, and so are
    attributes and times that a snapshot cannot keep.

    A file with a set-user-ID or set-group-ID bit keeps it if it is yours; one of an archive or
    image loses it, with a warning.
    """
    from engine.storage.chunking import compiled
    from mountctl.streams import opened

    if [directory, tar, oci].count(None) != 2:
        raise click.UsageError("name one of DIR, --tar FILE and --oci DIR")
    if image is not None and oci is None:
        raise click.UsageError("--image goes with --oci")
    if no_cache and directory is None:
        raise click.UsageError("--no-cache goes with DIR")
    output = invocation.output
    with invocation.open() as store:
        if not compiled():
            output.warning(
                "fastcdc is not compiled here: large files are read 200 times slower "
                "(`mountctl doctor` tells more)"
            )
        before = RefBefore(store, ref)
        above = tuple(store.resolve(parent) for parent in parents)
        if directory is not None:
            with output.progress("importing", "files") as progress:
                result = store.repository.import_directory(
                    directory, ref=ref, message=message, parents=above, metadata=metadata,
                    use_cache=not no_cache, set_id=set_id, owners=owners or None,
                    progress=progress,
                )  # fmt: skip
        elif tar is not None:
            with (
                opened(tar) as stream,
                output.progress("reading the archive", in_bytes=True) as progress,
            ):
                result = store.repository.import_tar(
                    stream, ref=ref, message=message, parents=above, metadata=metadata,
                    set_id=set_id, owners=owners or None,
                    progress=lambda done: progress(done, None),
                )  # fmt: skip
        else:
            assert oci is not None
            with output.progress("reading layers", in_bytes=True) as progress:
                result = store.repository.import_oci(
                    oci, image=image, ref=ref, message=message, parents=above,
                    metadata=metadata, set_id=set_id, owners=owners or None, progress=progress,
                )  # fmt: skip
        store.refresh()
    report = result.report
    if not result.changed:
        report.warnings += not_kept(message, metadata)
    if output.json:
        output.result(
            {
                "snapshot": result.snapshot,
                "changed": result.changed,
                "ref": ref,
                "ref_was": before.target,
                "entries": report.files,
                "bytes": result.root.size,
                "read_files": report.read_files,
                "read_bytes": report.read_bytes,
                "new_bytes": report.new_bytes,
                "lost_owners": report.lost_owners,
                "left_out": report.left_out,
                "warnings": report.warnings,
                "lost": report.lost,
            }
        )
        return
    output.warnings(report.warnings)
    if report.lost_owners:
        output.warning(lost_owners(report.lost_owners))
    output.line(output.style(short(result.snapshot), "yellow"))
    output.note(
        f"{count(report.files, 'entry')}, {size(result.root.size)}: "
        f"read {count(report.read_files, 'file')}, stored {size(report.new_bytes)}"
    )
    if report.left_out:
        kinds = ", ".join(f"{number:,} {visible(kind)}"
                          for kind, number in sorted(report.left_out.items()))  # fmt: skip
        output.note(f"not kept: {kinds}")
    before.tell(output, result.snapshot)
    if not result.changed:
        output.note("nothing has changed: the snapshot is the last one")
