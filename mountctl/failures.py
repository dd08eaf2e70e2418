"""What can go wrong, as the caller of the program meets it: exit codes and hints.

One table has a row for every class of error of the engine, the driver and this package, by the
class's name, because that is all that is known of an error in a mount's daemon. A test walks
all subclasses of EngineError and fails on a missing row.

Under `--json` an error is the last line of stderr: {"error": {"kind", "message", "hint",
"exit_code"}}; `kind` is the class's name.
"""

import errno
import re
from typing import Any, NamedTuple

import click

from mountctl import no_memory
from mountctl.text import quoted, visible

DONE, FOUND, USAGE, UNKNOWN, REFUSED, BUSY, NO_STORE, PERMISSION, FULL, DAMAGED, DAEMON, SYSTEM = (
    range(12)
)
CONFLICTS = 12
BUG, NOT_EXECUTABLE, NO_PROGRAM, INTERRUPTED, READER_GONE = 70, 126, 127, 130, 141

EXIT_CODES = {
    DONE: "done",
    FOUND: "doctor: a requirement is missing; bisect: several candidates; merge-base: none",
    USAGE: "the command line is wrong, or a name that it gives cannot be used",
    UNKNOWN: "no such snapshot, ref, session or mount, or a shortened id fits several",
    REFUSED: "refused because of what is there: a name taken, a directory not empty",
    BUSY: "something is in use; it may work later",
    NO_STORE: "there is no store, or it needs a later version of the program",
    PERMISSION: "the user may not do that",
    FULL: "no space left on a disk; nothing was lost",
    DAMAGED: "an object or the whole store is damaged (verify: damage is left), or a disk does not "
    "read or write",
    DAEMON: "the mount's daemon failed or does not answer",
    SYSTEM: "the operating system refused for another reason",
    CONFLICTS: "a merge found conflicts; they are listed",
    BUG: "an error that the program did not expect: a bug",
    NOT_EXECUTABLE: "`run` cannot execute the program",
    NO_PROGRAM: "`run` finds no such program",
    INTERRUPTED: "interrupted (Ctrl-C)",
    READER_GONE: "whoever read the output has gone (`mountctl log | head`)",
}
"""Every exit code and what it says."""


class Failure(NamedTuple):
    """An error as it is shown."""

    kind: str
    message: str
    hint: str
    exit_code: int


class Row(NamedTuple):
    """What the table says of a class; a hint may name fields of the error in braces."""

    exit_code: int
    hint: str


_LISTS = "`mountctl snapshot list`, `ref list` and `session list` show what there is"

ROWS = {
    "EngineError": Row(SYSTEM, "run the command again; if it stays, report it"),
    # names
    "InvalidNameError": Row(USAGE, "use letters, digits and _ . + -, as in `work-2`"),
    "NotFoundError": Row(UNKNOWN, _LISTS),
    "AmbiguousIdError": Row(UNKNOWN, "give more digits of the id"),
    "NameTakenError": Row(REFUSED, "choose another name, or remove what has it first"),
    "InUseError": Row(
        BUSY, "remove or move what uses it first (`mountctl ref`, `session`, `episode`)"
    ),
    # the store
    "StoreError": Row(SYSTEM, "look at the path that the message names, or choose another"),
    "NotAStoreError": Row(
        NO_STORE, "make one with `mountctl init`, or name yours with --store or AMALGAMFS_STORE"
    ),
    "StoreExistsError": Row(REFUSED, "name a new or empty directory with --store"),
    "NewerFormatError": Row(
        NO_STORE, "use a later version of AmalgamFS for it; nothing was changed"
    ),
    "StorePermissionError": Row(
        PERMISSION,
        "`ls -ld` shows whose it is: run it as that user, or name a store of yours with --store",
    ),
    "StorePlaceError": Row(
        PERMISSION, "name one in a directory that you can write to: --store DIR or AMALGAMFS_STORE"
    ),
    "StoreOwnerError": Row(
        PERMISSION,
        "run it as user {owner}; or, if you trust who can write there, with --trust-store, or name "
        "{path} in AMALGAMFS_TRUST_STORE",
    ),
    "StrangeFileError": Row(
        REFUSED, "look at it with `ls -l`; if you do not know what it is for, remove or move it"
    ),
    "StoreOpenError": Row(
        BUSY, "use the `Repository` that is there, from every thread, or close it first"
    ),
    "StoreReadOnlyError": Row(
        PERMISSION,
        "make that disk writable (`mount -o remount,rw`), or copy the store to one that is "
        "(`cp -a`) and name the copy with --store",
    ),
    "StoreDamagedError": Row(
        DAMAGED,
        "`mountctl verify` names all damage; `mountctl verify --repair --from DIR` mends what "
        "another store or a directory has",
    ),
    "StoreBusyError": Row(BUSY, "wait until some of them have ended, then run it again"),
    "StoreDiskError": Row(
        DAMAGED,
        "`dmesg`, as root, says what the disk said; copy the store to another disk (`cp -a`), then "
        "`mountctl --store COPY verify`",
    ),
    "StoreMemoryError": Row(SYSTEM, no_memory.HINT),
    "StoreInternalError": Row(SYSTEM, "run the command again; if it stays, report it"),
    "StoreFullError": Row(
        FULL,
        "make room on that disk, or let the store: `mountctl snapshot rm` what can go, then "
        "`mountctl gc --compact`, which needs none; run the command again",
    ),
    "CompactionRefusedError": Row(
        BUSY, "end what has the store open, then run it again; what was collected is collected"
    ),
    "CompressionError": Row(
        USAGE, "give `off`, or `zstd:3`; a higher number is smaller and slower"
    ),
    "CorruptObjectError": Row(
        DAMAGED, "`mountctl verify` names every path that is damaged; all others stay readable"
    ),
    "MissingObjectError": Row(
        DAMAGED, "`mountctl verify` names every path that is damaged; all others stay readable"
    ),
    "ForkedError": Row(SYSTEM, "open the store again in the new process: `Repository.open(PATH)`"),
    "LeaseHeldError": Row(BUSY, "wait until it has ended, then run the command again"),
    # trees in and out
    "ImportSourceError": Row(
        REFUSED, "import another directory, or make that one a readable directory of its own"
    ),
    "SourceChangedError": Row(BUSY, "stop what writes there, then run the command again"),
    "TooDeepError": Row(REFUSED, "move directories up, so that fewer lie inside each other"),
    "CheckoutRefusedError": Row(REFUSED, "name a directory that does not exist yet, or is empty"),
    "NotACheckoutError": Row(
        REFUSED, "`mountctl checkout SNAPSHOT DIR` makes one; name the directory itself"
    ),
    "UncommittedChangesError": Row(
        REFUSED, "`mountctl commit` stores them first; --force throws them away"
    ),
    "LocalEditsError": Row(
        REFUSED,
        "`commit --from DIR` stores them first; --keep leaves them, --force overwrites them",
    ),
    "SwitchInterruptedError": Row(
        REFUSED, "end it with the same `mountctl checkout --switch`, or switch back"
    ),
    "PartialCheckoutError": Row(
        REFUSED, "check out the whole snapshot to commit, or `mountctl import` the directory"
    ),
    "TreeTooLargeError": Row(FULL, "make room on that disk, or check out a part: SNAPSHOT:PATH"),
    "OutsideLinkError": Row(
        REFUSED, "--outside-links makes such links all the same; look at them before you use them"
    ),
    # archives and bundles
    "ArchiveDamagedError": Row(DAMAGED, "get the archive again; nothing was imported"),
    "ArchiveRefusedError": Row(REFUSED, "look at it with `tar -tv`; nothing was imported"),
    "ImageRefusedError": Row(REFUSED, "look at the path that the message names"),
    "ImageChoiceError": Row(REFUSED, "name one of them with --image"),
    "ImageDamagedError": Row(DAMAGED, "get the image again; nothing was imported"),
    "BundleFormatError": Row(
        DAMAGED, "get the bundle again; what has come of it is kept and not read twice"
    ),
    "BundleTruncatedError": Row(
        DAMAGED, "get the rest of it and apply it again: what has come is kept until `gc`"
    ),
    "BundleVersionError": Row(NO_STORE, "use a later version of AmalgamFS for it"),
    "BundleBaseError": Row(
        UNKNOWN, "apply a bundle with those first, or have this one made without --have"
    ),
    "BundleSetIdError": Row(
        REFUSED, "--set-id takes it; such a program runs as whoever writes it out"
    ),
    "BundleTooLargeError": Row(REFUSED, "name fewer snapshots"),
    # git
    "GitMissingError": Row(
        SYSTEM,
        "`{python} -m pip install pygit2` installs it where this program finds it",
    ),
    "GitSourceError": Row(
        REFUSED,
        "`git status` there tells whether it is a repository, `git fsck` what is wrong in it; what "
        "was imported until then is kept",
    ),
    "GitOwnerError": Row(
        REFUSED,
        "if you trust who owns it: `git config --global --add safe.directory {safe}`",
    ),
    "GitRefusedError": Row(
        REFUSED, "`--author`, another branch (`SNAPSHOT:BRANCH`) or --force may be what you want"
    ),
    # history and episodes
    "InvalidStepError": Row(USAGE, "give what JSON has: text, finite numbers, lists, objects"),
    "CorruptStepError": Row(
        DAMAGED, "`mountctl verify` names all damage; `episode rm` removes an episode all the same"
    ),
    "BisectRefusedError": Row(USAGE, "`mountctl log --graph GOOD BAD` shows how they are related"),
    "TrialAbortedError": Row(
        REFUSED, "let it exit with 0 for good, 1 to 124 for bad, 125 for what cannot be tested"
    ),
    # paths in a workspace
    "PathError": Row(REFUSED, "look at the path that the message names"),
    "InvalidPathError": Row(
        USAGE, "give a path from the tree's root down, as in `src/main.c`: no `..`, no first slash"
    ),
    "MissingPathError": Row(
        UNKNOWN, "look at the names around it; directories are not made unasked"
    ),
    "PathExistsError": Row(REFUSED, "choose another name, or remove what has it first"),
    "NoDirectoryError": Row(REFUSED, "choose a path that leads through directories only"),
    "NoFileError": Row(
        REFUSED, "name a file; symbolic links are not followed, so name their target"
    ),
    "NotEmptyError": Row(
        REFUSED, "remove what is in it first, or remove it with all that is in it"
    ),
    # differences
    "DiffTooLargeError": Row(
        REFUSED, "`mountctl diff --name-status --no-renames` shows them as it finds them"
    ),
    "NoMergeBaseError": Row(
        REFUSED, "name a snapshot to compare both with: `mountctl merge --base SNAPSHOT`"
    ),
    "PatchFormatError": Row(
        USAGE,
        "give a unified diff as `diff -uN`, `git diff --binary --no-color` or `mountctl diff "
        "--patch` writes it; nothing was changed",
    ),
    "PatchRefusedError": Row(
        REFUSED, "nothing was changed; apply it to what it was made for, or with --fuzz, --strip"
    ),
    # the mount
    "MountPointError": Row(
        REFUSED, "name an empty directory of yours (`mkdir` makes one), outside of the store"
    ),
    "AlreadyMountedError": Row(BUSY, "use it there, or end it with `mountctl umount`"),
    "NotMountedError": Row(UNKNOWN, "`mountctl status` tells whether and where it is mounted"),
    "UnmountError": Row(
        BUSY, "leave it in every shell and end what has files open there; --force does without"
    ),
    "UnmountRefusedError": Row(
        SYSTEM, "put right what it says, or have root run `umount {target}`: the daemon ends then"
    ),
    "LaunchError": Row(DAEMON, "`mountctl doctor` checks this machine; its log: {log}"),
    "MountRefusedError": Row(DAEMON, "`mountctl doctor` checks this machine; its log: {log}"),
    # run
    "ModeRefusedError": Row(
        REFUSED, "`--mode auto` takes another one; `mountctl doctor` may know why"
    ),
    "CalibrationFailedError": Row(SYSTEM, "look at what the program said; run it once more"),
    "CommandMissingError": Row(NO_PROGRAM, "name a program in $PATH, or one by its path"),
    "CommandRefusedError": Row(NOT_EXECUTABLE, "look at its permissions and its first line"),
    "SupervisorLostError": Row(SYSTEM, "run the command again; what it wrote is in the session"),
    "StartAbandonedError": Row(
        DAEMON, "`mountctl status` tells whether the mount answers; then run the command again"
    ),
    "DaemonError": Row(DAEMON, "the daemon's log says more: `mountctl status` names it"),
    "DaemonLostError": Row(
        DAEMON, "`mountctl umount --force` ends process {pid}; sessions keep what was written"
    ),
}

_SYSTEM = {
    errno.ENOSPC: Row(FULL, "make room on that disk, then run the command again"),
    errno.EDQUOT: Row(FULL, "make room within your quota, then run the command again"),
    errno.EFBIG: Row(FULL, "raise the limit of a file's size: `ulimit -f unlimited`"),
    errno.EACCES: Row(PERMISSION, "run it as a user who may, or choose another path"),
    errno.EPERM: Row(PERMISSION, "run it as a user who may, or choose another path"),
    errno.EROFS: Row(PERMISSION, "choose a path on a disk that can be written"),
    errno.EIO: Row(DAMAGED, "a disk or a mount does not read or write: see `dmesg`, as root"),
    errno.ENOTCONN: Row(DAEMON, "a mount there has lost its daemon: `mountctl umount` the path"),
    errno.EMFILE: Row(SYSTEM, "raise the limit of open files: `ulimit -n $(ulimit -Hn)`"),
    errno.ENFILE: Row(SYSTEM, "end programs that hold many files open"),
    errno.ENOMEM: Row(SYSTEM, no_memory.HINT),
}
_OTHER_SYSTEM = Row(SYSTEM, "look at the path that the message names; `mountctl doctor` may help")
_BUG = Row(BUG, "please report it with the lines above; the store keeps what was acknowledged")

_RELAYED = {"DaemonError", "LaunchError"}
"""Errors that carry the class of the daemon's error as `kind`."""


_OF_THE_SYSTEM = re.compile(r"\[Errno (\d+)\] ")
"""How Python writes an error of the operating system, which may be one of the daemon's."""


class _Fields(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "…"


def describe(error: Exception) -> Failure:
    """Returns how an error is shown and which exit code it has."""
    kind = type(error).__name__
    if isinstance(error, click.ClickException):
        return _usage(error)
    names = [cls.__name__ for cls in type(error).__mro__]
    relayed = getattr(error, "kind", "") if kind in _RELAYED else ""
    if relayed in ROWS:
        kind = relayed
        names.insert(0, relayed)
    row = next((ROWS[name] for name in names if name in ROWS), None)
    message = str(error)
    told = _OF_THE_SYSTEM.match(message) if kind in _RELAYED else None
    if told is not None and int(told[1]) in _SYSTEM:
        row, message = _SYSTEM[int(told[1])], message[told.end() :]
    if row is None and isinstance(error, OSError):
        row = _SYSTEM.get(error.errno or 0, _OTHER_SYSTEM)
        message = error.strerror or message or kind
        if error.filename is not None:
            message = f"{quoted(error.filename)}: {message}"
    elif relayed == "MemoryError":
        row = Row(SYSTEM, "raise the limits of the daemon's process: `prlimit --as --nproc -p PID`")
    elif row is None and no_memory.is_of_threads(error):
        row = Row(SYSTEM, no_memory.THREADS_HINT)
    elif row is None and no_memory.is_of_memory(error):
        row, message = Row(SYSTEM, no_memory.HINT), no_memory.MESSAGE
    elif row is None:
        row = _BUG
        message = f"unexpected {kind}: {message}"
    hint = row.hint.format_map(_Fields(vars(error)))
    return Failure(kind, visible(message), visible(hint), row.exit_code)


def _usage(error: click.ClickException) -> Failure:
    hint = "`mountctl --help` lists the commands"
    context = getattr(error, "ctx", None)
    if context is not None:
        hint = f"`{context.command_path} --help` explains it"
    return Failure("UsageError", visible(error.format_message()), hint, USAGE)
