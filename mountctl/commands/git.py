"""`mountctl git`."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from mountctl.command import DIRECTORY, TEXT, Group, completing, pass_invocation
from mountctl.invocation import Invocation
from mountctl.text import count, path_fields, quoted, short, size, visible

if TYPE_CHECKING:
    from engine.git.git_export import ToExport
    from mountctl.access import StoreAccess


@click.group(
    "git",
    cls=Group,
    example="""
    $ mountctl git import ~/src/lua
    $ mountctl git export ~/src/lua @work:faster-strings
    """,
)
def command() -> None:
    """Snapshots from git's commits, and commits from snapshots.

    Needs the package pygit2, which `scripts/setup` installs.
    """


@command.command(
    "import",
    example="""
    $ mountctl git import ~/src/lua
    $ mountctl git import ~/src/lua v5.4.0..master --prefix lua.
    """,
)
@click.argument("repository", type=DIRECTORY, help="A git repository, bare or not.")
@click.argument(
    "revisions", nargs=-1, type=TEXT, metavar="[REVISION]...",
    help="What to import, as git names it: main, v1..main, ^v1; else all branches and tags.",
)  # fmt: skip
@click.option("--prefix", type=TEXT, default="", help="Put this before the name of every ref.")
@click.option("--force", is_flag=True, help="Move refs, too, that name something else.")
@pass_invocation
def import_(
    invocation: Invocation, repository: str, revisions: tuple[str, ...], prefix: str, force: bool
) -> None:
    """Make snapshots of commits, with their graph, and refs of branches and tags.

    What was imported before is not read again. Branch a/b becomes the ref a.b, tag v1 becomes
    tags.v1. Files have git's modes, and one time for all. A submodule is an empty directory.
    """
    from engine.storage.chunking import compiled

    output = invocation.output
    with invocation.open() as store:
        if not compiled():
            output.warning(
                "fastcdc is not compiled here: large files are read 200 times slower "
                "(`mountctl doctor` tells more)"
            )
        with output.progress("importing", "commits") as progress:
            report = store.repository.import_git(
                repository, revisions, prefix=prefix, force=force, progress=progress
            )
        store.refresh()
    if output.json:
        output.result(
            {
                "commits": report.commits,
                "known": report.known,
                "files": report.blobs,
                "read_bytes": report.read_bytes,
                "new_bytes": report.new_bytes,
                "refs": report.refs,
                "kept_refs": report.kept,
                "other_refs": report.other_refs,
                "cut_commits": report.cut,
                "submodules": [
                    {**path_fields(path), "commit": commit} for path, commit in report.submodules
                ],
                "lfs_pointers": [path_fields(path) for path in report.lfs_pointers],
                "warnings": report.warnings,
            }
        )
        return
    output.warnings(report.warnings)
    for name, why in report.kept.items():
        output.warning(f"ref {name} was left as it is: {why} (--force, --prefix)")
    if report.cut:
        output.warning(
            f"the repository is shallow: {count(report.cut, 'commit')} came from others that are "
            "not in it, and the history begins there"
        )
    if report.other_refs:
        places = ", ".join(f"{number:,} in {visible(place)}"
                           for place, number in sorted(report.other_refs.items()))  # fmt: skip
        output.note(f"only branches and tags are imported; left out: {places}")
    output.warnings(
        [f"submodule {quoted(path)} is an empty directory: {commit[:12]}"
         for path, commit in report.submodules]
    )  # fmt: skip
    output.warnings(
        [f"{quoted(path)} is a pointer of Git LFS; the file is not in the repository"
         for path in report.lfs_pointers]
    )  # fmt: skip
    output.table(
        ("REF", "SNAPSHOT"),
        [(output.style(visible(name), "green"), output.style(short(target), "yellow"))
         for name, target in report.refs.items()],
    )  # fmt: skip
    output.note(
        f"{count(report.commits, 'commit')}, {count(report.blobs, 'file')} of "
        f"{size(report.read_bytes)} read, {size(report.new_bytes)} stored"
    )
    if not report.commits and report.known:
        output.note("all commits were there already")
    elif not report.commits:
        output.note("the repository has no commits in branches or tags: there is nothing to import")


@command.command(
    "export",
    example="""
    $ mountctl git export ~/src/lua @work:faster-strings -m "Faster strings"
    $ mountctl git export /tmp/copy.git --all
    """,
)
@click.argument(
    "repository", type=DIRECTORY, help="A git repository; a bare one is made if there is none."
)
@click.argument(
    "snapshots", nargs=-1, type=TEXT, shell_complete=completing("snapshots"),
    metavar="[SNAPSHOT[:BRANCH]]...",
    help="What to write, and the branch that shall name it; else named as the ref or session.",
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="All branches and tags that came from git.")
@click.option("--author", type=TEXT, metavar="WHO", help="Name <address>; else as git knows you.")
@click.option("--message", "-m", type=TEXT, help="Say what a session changed.")
@click.option("--force", is_flag=True, help="Move branches back or aside, too.")
@pass_invocation
def export(
    invocation: Invocation,
    repository: str,
    snapshots: tuple[str, ...],
    everything: bool,
    author: str | None,
    message: str | None,
    force: bool,
) -> None:
    """Make commits of snapshots and of all that they came from, then branches.

    A snapshot that came from a commit becomes that commit again. Work trees are left alone. What
    git cannot say is left out and named.
    """
    if not snapshots and not everything:
        raise click.UsageError("name a snapshot, or give --all")
    if message is not None and not any(text.startswith("@") for text in snapshots):
        raise click.UsageError("--message is of what an @SESSION changed, and none is named")
    output = invocation.output
    with invocation.open() as store, ExitStack() as stack:
        wanted = [_wanted(store, text, message, stack) for text in snapshots]
        if everything:
            wanted += _all(store)
        with output.progress("writing", "commits") as progress:
            report = store.repository.export_git(
                repository, wanted, author=author, force=force, progress=progress
            )
    if output.json:
        output.result(
            {
                "branches": report.branches,
                "commits": report.commits,
                "known": report.known,
                "objects": report.objects,
                "other_commits": report.others,
                "lost": [
                    {"kind": kind, "count": loss.count,
                     "paths": [path_fields(path) for path in loss.paths]}
                    for kind, loss in report.lost.items()
                ],
                "warnings": report.warnings,
            }
        )  # fmt: skip
        return
    output.warnings(report.warnings)
    for other in report.others:
        output.warning(f"snapshot {short(other)} came from git and is another commit now")
    for kind, loss in report.lost.items():
        if kind == "time":  # every file that was written has one
            continue
        first = ", ".join(quoted(path) for path in loss.paths[:3])
        more = "" if loss.count <= 3 else ", …"
        output.warning(f"git has no such thing: {count(loss.count, kind)} ({first}{more})")
    output.table(
        ("BRANCH", "COMMIT"),
        [(output.style(visible(name), "green"), output.style(commit, "yellow"))
         for name, commit in report.branches.items()],
    )  # fmt: skip
    output.note(f"{count(report.commits, 'commit')} written")


def _wanted(store: "StoreAccess", text: str, message: str | None, stack: ExitStack) -> "ToExport":
    from engine.git.git_export import ToExport

    name, colon, branch = text.partition(":")
    if colon and not branch:
        raise click.UsageError(f"{text!r} names no branch")
    if name.startswith("@"):
        parent = store.repository.resolve(name)
        root = stack.enter_context(store.tree(name))
        return ToExport(branch or name[1:], parent, "", root, message or f"session {name[1:]}")
    target = store.resolve(name)
    is_ref = name in store.repository.refs()
    if not branch:
        if not is_ref:
            raise click.UsageError(f"{text!r} needs a branch: {name}:BRANCH")
        branch = store.repository.git_names().get(name, name)
    return ToExport(branch, target, name if is_ref else "")


def _all(store: "StoreAccess") -> "list[ToExport]":
    from engine.git.git_export import ToExport

    refs = store.repository.refs()
    names = store.repository.git_names()
    return [ToExport(names[ref], refs[ref], ref) for ref in refs if ref in names]
