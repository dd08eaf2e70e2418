"""A git repository as import and export see it: objects by their ids, branches and tags.

The only module that imports pygit2, and only when a repository is opened: it is an optional part
of the installation. Ids are git's 20 bytes; contents are what git stores, without its header.
"""

import contextlib
import errno
import os
import re
import resource
import shlex
import sys
from collections.abc import Iterable, Iterator
from io import RawIOBase
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import EngineError
from engine.host.removing import remove_tree

if TYPE_CHECKING:
    import pygit2

_OWNED = re.compile("repository path '(.+?)/?' is not owned by current user")
"""What libgit2 says of a repository of another user, and has no code of its own for in pygit2."""
HEADS, TAGS = "refs/heads/", "refs/tags/"


_OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE,
)  # fmt: skip


class GitMissingError(EngineError):
    """The library that reads and writes git's objects is not installed."""

    def __init__(self) -> None:
        super().__init__("the package pygit2 is not installed")
        self.python = shlex.quote(sys.executable)
        """The interpreter that needs it, as a shell takes it."""


class GitSourceError(EngineError):
    """A git repository, or something in it, cannot be read. `path` is the repository's."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot read the git repository {path!r}: {why}")
        self.path, self.why = path, why


class GitOwnerError(GitSourceError):
    """A git repository belongs to another user. `safe` is its directory, as a shell takes it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        named = _OWNED.search(why)
        self.safe = shlex.quote(named[1] if named else os.path.realpath(path))


class GitRefusedError(EngineError):
    """A git repository does not take what is to be written; no branch was moved."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot write to the git repository {path!r}: {why}")
        self.path, self.why = path, why


class GitRef(NamedTuple):
    """A branch or tag, the commit it means, and the bytes of an annotated tag's object."""

    name: str
    commit: bytes
    tag: bytes | None = None


def _library() -> ModuleType:
    try:
        import pygit2  # noqa: PLC0415 - optional, and 40 ms that nobody else pays
    except ImportError as error:
        raise GitMissingError from error
    return pygit2


class GitRepository:
    """An open repository, bare or not. Its work tree and its index are never touched."""

    def __init__(self, path: str) -> None:
        """Opens the repository at `path` itself. Raises GitMissingError, GitSourceError.

        That is a GitOwnerError for one of another user that git's configuration does not name.
        """
        git = _library()
        self.path = os.path.realpath(path)
        self._git = git
        try:
            flag = git.enums.RepositoryOpenFlag.NO_SEARCH
            self._repository: pygit2.Repository = git.Repository(path, flag)
        except (git.GitError, KeyError, ValueError, OSError) as error:
            why = _say(error)
            kind = GitOwnerError if _OWNED.search(why) else GitSourceError
            raise kind(path, why) from error
        self._read = self._repository.odb.read
        self._oid = git.Oid

    @classmethod
    def make(cls, path: str) -> "GitRepository":
        """Makes an empty bare repository, or opens the one that is there."""
        git = _library()
        there = os.path.isdir(path)
        if not there or not os.listdir(path):
            try:
                git.init_repository(path, bare=True)
            except (git.GitError, OSError) as error:
                _remove_half(path, keep=there)
                raise _refusal(path, error) from error
        return cls(path)

    # Reading.

    def read(self, kind: str, identifier: bytes) -> bytes:
        """Returns an object, checked against its id. Raises GitSourceError."""
        try:
            found, data = self._read(self._oid(raw=identifier))[:2]
        except self._git.NotFoundError as error:
            why = f"it lacks {kind} {identifier.hex()} (is it a partial clone?)"
            raise GitSourceError(self.path, why) from error
        except (self._git.GitError, KeyError, ValueError, OSError) as error:
            why = f"{kind} {identifier.hex()} is damaged: {_say(error)}"
            raise GitSourceError(self.path, why) from error
        if found.name.lower() != kind:
            why = f"{identifier.hex()} is a {found.name.lower()} where a {kind} should be"
            raise GitSourceError(self.path, why)
        data_read: bytes = data
        return data_read

    def has(self, identifier: bytes) -> bool:
        """Tells whether the repository has an object."""
        return self._oid(raw=identifier) in self._repository.odb

    @property
    def is_shallow(self) -> bool:
        """Tells whether its history is cut off somewhere."""
        return bool(self._repository.is_shallow)

    def refs(self) -> tuple[list[GitRef], list[str]]:
        """Returns its branches and tags by name, and names those that mean no commit."""
        found, others = [], []
        for name in sorted(self._repository.references):
            if name.startswith((HEADS, TAGS)):
                ref = self._ref(name)
                if ref is None:
                    others.append(name)
                else:
                    found.append(ref)
        return found, others

    def other_refs(self) -> dict[str, int]:
        """Counts the refs that are neither branches nor tags, by where they are: `refs/notes`."""
        found: dict[str, int] = {}
        for name in self._repository.references:
            if name.startswith("refs/") and not name.startswith((HEADS, TAGS)):
                place = "/".join(name.split("/")[:2])
                found[place] = found.get(place, 0) + 1
        return found

    def _ref(self, name: str) -> GitRef | None:
        try:
            reference = self._repository.references[name].resolve()
            identifier: bytes = reference.raw_target.raw  # type: ignore[union-attr]  # resolved
            tag = None
            while True:  # by its bytes: what git once took need not be what libgit2 parses
                kind, data = self._read(self._oid(raw=identifier))[:2]
                if kind.name == "COMMIT":
                    return GitRef(name, identifier, tag)
                if kind.name != "TAG":
                    return None
                tag = tag or data
                identifier = bytes.fromhex(data[7:47].decode())
        except (self._git.GitError, KeyError, ValueError):
            return None

    def revision(self, text: str) -> tuple[bytes, GitRef | None]:
        """Returns the commit that a revision means, and the ref if it names a branch or tag."""
        git = self._git
        try:
            found, reference = self._repository.revparse_ext(text)
            commit = found.peel(git.Commit).id.raw
        except (git.GitError, KeyError, ValueError) as error:
            raise GitSourceError(self.path, f"{text!r} is no commit of it") from error
        name = getattr(reference, "name", "")  # None for an id, whatever the types say
        if name == "HEAD" and not self._repository.head_is_detached:
            name = self._repository.head.name
        return commit, self._ref(name) if name.startswith((HEADS, TAGS)) else None

    def ancestors(self, commit: bytes) -> Iterator[bytes]:
        """Yields a commit and all that it came from."""
        try:
            for each in self._repository.walk(self._oid(raw=commit)):
                yield each.id.raw
        except (self._git.GitError, KeyError, ValueError) as error:
            raise GitSourceError(self.path, _say(error)) from error

    # Writing.

    def write(self, kind: str, data: bytes) -> bytes:
        """Stores an object and returns its id. Raises GitRefusedError."""
        try:
            code = self._git.enums.ObjectType[kind.upper()]
            return self._repository.odb.write(code, data).raw
        except (self._git.GitError, OSError) as error:
            raise _refusal(self.path, error, len(data)) from error

    def write_stream(self, stream: RawIOBase, size: int) -> bytes:
        """Stores a blob of `size` bytes that is too long for memory."""
        try:
            return self._repository.create_blob_fromiobase(stream).raw
        except (self._git.GitError, OSError) as error:
            raise _refusal(self.path, error, size) from error

    def author(self) -> str | None:
        """Returns `Name <address>` as git's configuration has it."""
        try:
            signature = self._repository.default_signature
        except (KeyError, self._git.GitError):
            return None
        return f"{signature.name} <{signature.email}>"

    def target(self, name: str) -> bytes | None:
        """Returns what a ref names, None if there is no such ref."""
        try:
            reference = self._repository.references.get(name)
        except (self._git.GitError, ValueError) as error:
            raise GitRefusedError(self.path, f"{name!r} cannot name a branch") from error
        if reference is None:
            return None
        target: bytes = reference.resolve().raw_target.raw  # type: ignore[union-attr]  # an Oid, resolved
        return target

    def check_ref(self, name: str, commit: bytes, *, force: bool) -> None:
        """Raises GitRefusedError if a ref may not be made to name a commit that is there."""
        git, repository = self._git, self._repository
        short = name.removeprefix(HEADS)
        if not git.reference_is_valid_name(name):
            raise GitRefusedError(self.path, f"{short!r} cannot name a branch or tag")
        now = self.target(name)
        if now == commit:
            return
        if not repository.is_bare:
            # A branch that HEAD names need not be there yet.
            shown = bool(repository.references["HEAD"].raw_target == name.encode())
            if name.startswith(HEADS) and now is not None:
                shown = shown or repository.branches.local[short].is_checked_out()
            if shown:
                why = f"branch {short!r} is checked out there, and work trees are left alone"
                raise GitRefusedError(self.path, why)
        if now is None or force:
            return
        new, old = self._oid(raw=commit), self._oid(raw=now)
        if not name.startswith(HEADS) or not repository.descendant_of(new, old):
            raise GitRefusedError(self.path, f"{name!r} has commits that would be lost")

    def check_names(self, names: Iterable[str]) -> None:
        """Raises GitRefusedError if refs cannot be there beside those that are."""
        check_names(self.path, names, self._repository.references)

    def set_refs(self, moves: Iterable[tuple[str, bytes, bytes | None]]) -> None:
        """Makes or moves refs, (name, target, what it named before), all of them or none.

        Raises GitRefusedError.
        """
        try:
            with self._repository.transaction() as transaction:
                for name, target, before in moves:
                    transaction.lock_ref(name)
                    if self.target(name) != before:
                        why = f"{name!r} was moved by somebody else meanwhile"
                        raise GitRefusedError(self.path, why)
                    transaction.set_target(name, self._oid(raw=target))
        except (self._git.GitError, ValueError, OSError) as error:
            raise _refusal(self.path, error) from error


def _remove_half(path: str, *, keep: bool) -> None:
    """Removes what is made of a repository in a directory that was not there, or was empty."""
    with contextlib.suppress(OSError):
        remove_tree(os.fsencode(path))
        if keep:
            os.mkdir(path)


def _refusal(path: str, error: Exception, size: int = 0) -> Exception:
    """Returns what to raise where something cannot be written: what the disk says, if it does.

    libgit2 tells it in words only, those of strerror(3); and not if an object of `size` bytes is
    larger than a file of this process may be: then the words are of something before.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and size >= most:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    for code in _OF_THE_DISK:
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return OSError(code, os.strerror(code), path)
    return GitRefusedError(path, _say(error))


def check_names(path: str, names: Iterable[str], there: Iterable[str] = ()) -> None:
    """Raises GitRefusedError if refs cannot all be in one repository: `a` and `a/b` cannot."""
    new = set(names)
    both = new.union(there)
    for name in sorted(both):
        above = name
        while above := above.rpartition("/")[0]:
            if above in both and (above in new or name in new):
                raise GitRefusedError(path, f"{above!r} and {name!r} cannot both be there")


def _say(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
