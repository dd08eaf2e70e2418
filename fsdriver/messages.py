"""What the command line and a mount's daemon say to each other.

One JSON object per line over a Unix socket, one reply per request, in order. A request is one
of the structs below with its class's name under `type`; so is a reply. Snapshot ids are 64
hexadecimal digits; `root` is the canonical encoding of a root's entry in base64.
"""

from typing import Any

import msgspec

from fsdriver.metrics import Timing


class Request(msgspec.Struct, tag_field="type", frozen=True):
    """Base of what a client asks."""


class GetStatus(Request, frozen=True, tag=True):
    """Asks what is mounted where, and whether it is served; answered by Status at once."""


class GetStatistics(Request, frozen=True, tag=True):
    """Asks for counters; answered by Statistics."""


class Commit(Request, frozen=True, tag=True):
    """Commits a session; answered by Committed."""

    session: str
    message: str = ""
    ref: str | None = None
    metadata: dict[str, Any] = {}


class Fork(Request, frozen=True, tag=True):
    """Forks a session; answered by Done."""

    session: str
    name: str


class Freeze(Request, frozen=True, tag=True):
    """Stores a session's present tree without a snapshot; answered by Frozen.

    The client holds the lease on objects as long as it uses the tree.
    """

    session: str


class Reset(Request, frozen=True, tag=True):
    """Throws away what a session changed; answered by Done, refused for changes unless `force`.

    With `factory` the session becomes what it was made of, or only `paths` of it do.
    """

    session: str
    to: str | None = None
    factory: bool = False
    paths: list[bytes] = []
    force: bool = False


class Remove(Request, frozen=True, tag=True):
    """Removes a session; answered by Done, refused for changes unless `force`."""

    session: str
    force: bool = False


class Rename(Request, frozen=True, tag=True):
    """Renames a session; answered by Done."""

    session: str
    name: str


class Lend(Request, frozen=True, tag=True):
    """Lets go of a session for the client; answered by Done, refused while files are open.

    Until the connection ends, nobody else can take it.
    """

    session: str


class Refresh(Request, frozen=True, tag=True):
    """Tells that the store has changed; answered by Done once the mount shows it."""


class Shed(Request, frozen=True, tag=True):
    """Asks the daemon to give memory back that it can miss, as it does when memory is short."""


class Compact(Request, frozen=True, tag=True):
    """Asks to make the store's file smaller; answered by Compacted."""


class Shutdown(Request, frozen=True, tag=True):
    """Asks the daemon to unmount and end; answered by Done before it does."""


class Reply(msgspec.Struct, tag_field="type", frozen=True):
    """Base of what the daemon answers."""


class Done(Reply, frozen=True, tag=True):
    """It is done, and durable."""


class Doing(msgspec.Struct, frozen=True):
    """A request that is under way: what it does, for how many seconds."""

    what: str
    seconds: float


class Status(Reply, frozen=True, tag=True):
    """Where and how the mount runs. `sessions` are those that it holds.

    `doing` is what it is busy with: these requests are carried out one after the other.
    """

    pid: int
    store: str
    mountpoint: str
    log: str
    started_ns: int
    sessions: list[str]
    doing: list[Doing] = []


class Statistics(Reply, frozen=True, tag=True):
    """Numbers by group and name; how long operations took.

    The group `moved` has by a session's uid how often a directory of its base was renamed.
    """

    groups: dict[str, dict[str, int]]
    timings: dict[str, Timing]


class Committed(Reply, frozen=True, tag=True):
    """The snapshot that a session stands on now; `changed` is False if it did before."""

    snapshot: str
    changed: bool
    new_bytes: int
    warnings: list[str]
    lost_owners: int = 0
    lost: dict[str, int] = {}


class Frozen(Reply, frozen=True, tag=True):
    """A tree in the store that nothing refers to."""

    root: bytes


class Compacted(Reply, frozen=True, tag=True):
    """The size of the store's file before and after."""

    bytes_before: int
    bytes_after: int


class Failed(Reply, frozen=True, tag=True):
    """It was not done. `kind` is the error's class, `message` its sentence."""

    kind: str
    message: str


AnyRequest = (
    GetStatus
    | GetStatistics
    | Commit
    | Fork
    | Freeze
    | Reset
    | Remove
    | Rename
    | Lend
    | Refresh
    | Shed
    | Compact
    | Shutdown
)
AnyReply = Done | Status | Statistics | Committed | Frozen | Compacted | Failed
