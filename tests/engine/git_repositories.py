"""Repositories made by the real git, and what git says of them."""

import os
import subprocess
from pathlib import Path

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A U Thor",
    "GIT_AUTHOR_EMAIL": "author@example.com",
    "GIT_COMMITTER_NAME": "C O Mitter",
    "GIT_COMMITTER_EMAIL": "committer@example.com",
    "LC_ALL": "C.UTF-8",
}


class Git:
    """One repository. Commits of it get times that ascend."""

    def __init__(self, path: Path, *, bare: bool = False) -> None:
        self.path = path
        self.time = 1_600_000_000
        if not path.exists():
            path.mkdir()
            self("init", "-q", "-b", "main", *(["--bare"] if bare else []))

    def __call__(self, *words: str | Path | bytes, data: bytes | None = None, code: int = 0) -> str:
        return self.raw(*words, data=data, code=code).decode("utf-8", "surrogateescape").rstrip()

    def raw(self, *words: str | Path | bytes, data: bytes | None = None, code: int = 0) -> bytes:
        self.time += 10
        times = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), f"{self.time} +0130")
        done = subprocess.run(
            ["git", "-c", "protocol.file.allow=always", *map(os.fsencode, words)],
            cwd=self.path, env={**ENVIRONMENT, **times}, input=data, capture_output=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    def write(self, name: str | bytes, data: bytes) -> None:
        path = os.path.join(os.fsencode(self.path), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(data)

    def commit(self, message: str = "change") -> str:
        self("add", "-A")
        self("commit", "-q", "--allow-empty", "-m", message)
        return self("rev-parse", "HEAD")

    def refs(self) -> dict[str, str]:
        """Returns branches and tags with their objects' ids."""
        lines = self("for-each-ref", "--format=%(refname) %(objectname)").splitlines()
        return dict(line.split() for line in lines)

    def fast_import(self, stream: bytes) -> None:
        self("fast-import", "--quiet", "--force", data=stream)

    def listing(self, commit: str) -> list[tuple[str, str, str, bytes]]:
        """Returns (mode, kind, id, path) of all in a commit."""
        found = []
        for line in self.raw("ls-tree", "-r", "-z", commit).split(b"\0")[:-1]:
            facts, _, path = line.partition(b"\t")
            mode, kind, identifier = facts.decode().split()
            found.append((mode, kind, identifier, path))
        return found


def stream(commits: list[tuple[str, list[int], dict[bytes, bytes | None]]]) -> bytes:
    """Returns what `git fast-import` makes commits of: (branch, numbers of parents, changes).

    A change is a file's bytes, or None for one that is removed. Commits are numbered from 1.
    """
    parts = []
    for number, (branch, parents, changes) in enumerate(commits, 1):
        message = b"commit %d\n" % number
        parts.append(
            b"commit refs/heads/%s\nmark :%d\ncommitter C <c@x> %d +0100\ndata %d\n%s\n"
            % (branch.encode(), number, 1_500_000_000 + number, len(message), message)
        )
        if not parents:
            parts.insert(-1, b"reset refs/heads/%s\n" % branch.encode())
        for word, parent in zip([b"from"] + [b"merge"] * 9, parents, strict=False):
            parts.append(b"%s :%d\n" % (word, parent))
        for path, data in changes.items():
            quoted = b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"'
            if data is None:
                parts.append(b"D " + quoted + b"\n")
            else:
                parts.append(b"M 100644 inline %s\ndata %d\n%s\n" % (quoted, len(data), data))
        parts.append(b"\n")
    return b"".join(parts)
