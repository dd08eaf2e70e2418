"""Runs each command, and programs in a mount, on disks that fail in each way; prints a table.

Memory that a process may not have is one of the ways: none for the map, or none for the work.

A cell is one command and one fault. It holds if the command, or the program in the mount, is told
so by the right exit code or errno, with a hint, and without a traceback; if, once the fault is
gone, the same command works, `verify` finds all whole, nothing half done lies about, and the mount
was alive all along. The exit status is 1 if a cell does not hold.

Full disks and those that are read-only are real ones, of tmpfs, and need root; limits are the
process's own; what a disk answers that does not read or write, or has a quota, comes from a library
(disk_failures_shim.c) that answers system calls below one directory in its place.
"""

import argparse
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from mountctl.__main__ import cli

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
"""How long one command may take."""
MIB = 1 << 20
Limits = Callable[[], None]


class Fault(NamedTuple):
    """A way in which a disk fails. `codes` are the exit codes that say so, `answers` the errnos."""

    title: str
    codes: frozenset[int]
    answers: frozenset[int]
    root: bool = False


FAULTS = {
    "full": Fault("no block is left", frozenset({8}), frozenset({errno.ENOSPC}), True),
    "inodes": Fault("no inode is left", frozenset({8}), frozenset({errno.ENOSPC}), True),
    "read-only": Fault("read-only", frozenset({7}), frozenset({errno.EROFS}), True),
    "io": Fault("nothing is written: EIO", frozenset({9}), frozenset({errno.EIO})),
    "meta": Fault("no transaction ends: EIO", frozenset({9}), frozenset({errno.EIO})),
    "quota": Fault("over the quota: EDQUOT", frozenset({8}), frozenset({errno.EDQUOT})),
    "fsize": Fault("RLIMIT_FSIZE", frozenset({8}), frozenset({errno.EFBIG})),
    "nofile": Fault(
        "RLIMIT_NOFILE", frozenset({11}), frozenset({errno.EMFILE, errno.ENFILE, errno.EIO})
    ),
    "map": Fault("RLIMIT_AS, for the map", frozenset({11}), frozenset({errno.ENOMEM})),
    "memory": Fault("RLIMIT_AS, for the work", frozenset({11}), frozenset({errno.ENOMEM})),
}
_ANSWERED = {"io": errno.EIO, "meta": errno.EIO, "quota": errno.EDQUOT, "read-only": errno.EROFS}

COMMANDS = {
    "init": "init --store {disk}/new",
    "import": "import {source}",
    "import --tar": "import --tar {good}/tree.tar",
    "commit": "commit w -m more",
    "session create": "session create new main",
    "session fork": "session fork w new",
    "session reset": "session reset w --force",
    "session rm": "session rm w --force",
    "snapshot rm": "snapshot rm old",
    "ref set": "ref set new main",
    "ref rm": "ref rm side",
    "checkout": "checkout main {disk}/out",
    "export --tar": "export main --tar {disk}/out.tar",
    "export --oci": "export main --oci {disk}/image",
    "bundle create": "bundle create {disk}/out.bundle",
    "bundle apply": "bundle apply {good}/all.bundle --store {disk}/other",
    "merge": "merge main side -m both",
    "apply": "apply {good}/patch --on main",
    "gc": "gc",
    "gc --compact": "gc --compact",
    "verify": "verify",
    "stats": "stats",
    "run": "run w -- true",
    "run --mode full": "run --mode full w -- true",
    "episode new": "episode new search --root main",
    "git export": "git export {disk}/repository main --author A~<a@b>",
    "mount": "mount {mountpoint}",
}
REMOVALS = ("gc", "gc --compact", "snapshot rm", "ref rm", "session rm", "verify")
"""What works on a full disk, or nobody could make room."""


class Verdict(NamedTuple):
    """What became of a cell: a word for the table, and why it does not hold, if so."""

    word: str
    why: str = ""


class BrokenError(Exception):
    """A cell does not hold."""


class Bench:
    """A prepared store on a good disk, from which each cell gets its copy."""

    def __init__(self, home: Path) -> None:
        self.home, self.good = home, home / "good"
        self.disk, self.mountpoint = home / "disk", home / "mnt"
        self.switch, self.shim = home / "switch", home / "shim.so"
        for directory in (self.good, self.disk, self.mountpoint):
            directory.mkdir(parents=True)
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise BrokenError("there is no C compiler for the library that lets calls fail")
        source = ROOT / "scripts/disk_failures_shim.c"
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(self.shim), str(source)]
        subprocess.run([*command, "-ldl"], check=True)
        self._prepare()

    def _prepare(self) -> None:
        store, source = self.good / "store", self.good / "source"
        (source / "sub").mkdir(parents=True)
        for number in range(24):
            (source / f"sub/{number}").write_bytes(os.urandom(60_000))
        (source / "text").write_bytes(b"a line\n" * 50)
        self.at_once(store, "init")
        self.at_once(store, f"import {source}")
        (source / "old").write_bytes(os.urandom(900_000))
        self.old = self.at_once(store, f"import {source} --ref old").strip()
        (source / "old").unlink()
        self.at_once(store, f"import {source} --ref main -m first")
        self.at_once(store, "session create w main")
        upper = Path(json.loads(self.at_once(store, "session show w --json"))["upper"])
        (upper / "here").write_bytes(b"changed in the session\n")
        (self.good / "patch").write_text(_PATCH)
        self.at_once(store, f"apply {self.good}/patch --on main --ref side")
        (source / "here").write_bytes(b"changed beside the other side\n")
        self.at_once(store, f"import {source} --ref main -m second")
        self.at_once(store, f"bundle create {self.good}/all.bundle")
        self.at_once(store, f"export main --tar {self.good}/tree.tar")
        self.at_once(store, "ref rm old")
        (source / "new").write_bytes(os.urandom(700_000))
        self.address_space = int(self._asked(_ADDRESS_SPACE))
        """The bytes of it that a command has when it has loaded what it needs."""

    def _asked(self, text: str) -> str:
        command = [sys.executable, "-P", "-c", text]
        return subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout  # fmt: skip

    def at_once(self, store: Path, text: str) -> str:
        """Runs mountctl in this process, which takes a third of the time."""
        done = CliRunner().invoke(cli, ["--store", str(store), *text.split()])
        if done.exit_code:
            raise BrokenError(f"mountctl {text}: {done.exit_code}, {done.output}")
        return done.stdout

    def words(self, text: str) -> list[str]:
        names = {
            "disk": self.disk, "good": self.good, "source": self.good / "source",
            "mountpoint": self.mountpoint,
        }  # fmt: skip
        words = [word.replace("~", " ") for word in text.format(**names).split()]
        return [self.old if word == "old" else word for word in words]

    def call(
        self, store: Path, words: list[str], fault: str = "", more: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs mountctl, with a fault in its own process if that is where it is made."""
        if "--store" not in words:
            words = ["--store", str(store), *words]
        return subprocess.run(
            [sys.executable, "-P", "-m", "mountctl", *words], cwd=ROOT, text=True, check=False,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, errors="replace",
            env={**os.environ, "HOME": str(self.home), "TMPDIR": str(self.good), **(more or {})},
            preexec_fn=self.limits(fault),
        )  # fmt: skip

    def limits(self, fault: str) -> Limits | None:
        """Returns what a process does to itself before it begins."""
        if fault not in _LIMITS:
            return None
        value = {"fsize": MIB // 2, "nofile": 12}.get(fault, 0)
        value = value or self.address_space + _ROOM[fault]
        return lambda: resource.setrlimit(_LIMITS[fault], (value, value))

    def do(self, store: Path, text: str) -> str:
        """Runs what is to succeed."""
        done = self.call(store, text.split())
        if done.returncode:
            raise BrokenError(f"mountctl {text}: {done.returncode}, {done.stderr.strip()}")
        return done.stdout

    @contextlib.contextmanager
    def placed(self, fault: str) -> Iterator[Path]:
        """Gives a copy of the store on the disk that is to fail."""
        tmpfs = FAULTS[fault].root and os.geteuid() == 0
        if tmpfs:
            options = "size=24m,nr_inodes=2000"
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "failing", self.disk], check=True
            )
        try:
            copy = ["cp", "-a", str(self.good / "store"), str(self.disk / "store")]
            subprocess.run(copy, check=True)
            yield self.disk / "store"
        finally:
            self.switch.unlink(missing_ok=True)
            if tmpfs:
                subprocess.run(["umount", "--lazy", self.disk], check=True)
            else:
                shutil.rmtree(self.disk)
                self.disk.mkdir()

    def shimmed(self) -> dict[str, str]:
        """Returns the environment in which calls below the disk fail while there is the switch."""
        return {
            "LD_PRELOAD": str(self.shim), "FAILING_BELOW": str(self.disk),
            "FAILING_IF": str(self.switch),
        }  # fmt: skip

    @contextlib.contextmanager
    def failing(self, fault: str, *, mounted: bool = False) -> Iterator[dict[str, str]]:
        """Lets the disk fail; gives the environment in which it does."""
        filler = self.disk / "filler"
        if fault in {"full", "inodes"}:
            (_fill if fault == "full" else _fill_inodes)(filler)
            yield {}
            shutil.rmtree(filler)
        elif fault == "read-only" and not mounted:
            subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
            yield {}
            subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)
        elif fault in _ANSWERED:
            only = " meta" if fault == "meta" else ""
            self.switch.write_text(f"{_ANSWERED[fault]}{only}\n")
            yield self.shimmed()
            self.switch.unlink()
        else:
            yield {}

    def leavings(self, store: Path) -> list[str]:
        """Returns what lies about that nothing may leave."""
        found = [
            path
            for path in self.disk.iterdir()
            if path.name.startswith(".") or path.name not in _EXPECTED
        ]
        found += [
            path
            for path in store.glob("sessions/*/work/*")
            if not path.is_char_device() and path.name != "work"
        ]
        found += store.glob("db/new")
        return [str(path.relative_to(self.disk)) for path in found]

    # One command.

    def command(self, name: str, fault: str) -> Verdict:
        """Runs a command on a failing disk, and again when the fault is gone."""
        with self.placed(fault) as store:
            try:
                return self._command(name, fault, store)
            except (BrokenError, subprocess.TimeoutExpired) as error:
                return Verdict("FAILED", f"{name}, {fault}: {error}")
            finally:
                self._end_mount(store)

    def _command(self, name: str, fault: str, store: Path) -> Verdict:
        words = self.words(COMMANDS[name])
        if name == "bundle apply":
            self.do(self.disk / "other", "init")
        with self.failing(fault) as environment:
            done = self.call(store, words, fault, environment)
            self._judge(name, fault, done)
            self._end_mount(store)
        self.at_once(store, "verify")
        left = self.leavings(store)
        if left:
            raise BrokenError(f"left {' '.join(left)}")
        if done.returncode:
            again = self.call(store, words)
            if again.returncode:
                raise BrokenError(f"afterwards: {again.returncode}, {again.stderr.strip()}")
            self._end_mount(store)
            self.at_once(store, "verify")
        return Verdict(str(done.returncode) if done.returncode else "works")

    def _judge(self, name: str, fault: str, done: subprocess.CompletedProcess[str]) -> None:
        said = f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"
        if "Traceback" in done.stderr or done.returncode < 0 or "damaged" in done.stderr:
            raise BrokenError(said)
        if not done.returncode:
            return
        codes = FAULTS[fault].codes | _ALSO.get(name, frozenset())
        if done.returncode not in codes or "\nhint: " not in "\n" + done.stderr:
            raise BrokenError(said)
        if fault in {"full", "inodes"} and name in REMOVALS:
            raise BrokenError(f"nobody could make room: {said}")

    def _end_mount(self, store: Path) -> None:
        if os.path.ismount(self.mountpoint):
            done = self.call(store, ["umount", str(self.mountpoint)])
            if done.returncode:
                subprocess.run(["umount", "--lazy", self.mountpoint], check=False)
                raise BrokenError(f"umount: {done.stderr.strip()}")

    # Programs in a mount.

    def ended(self, fault: str) -> Verdict:
        """Leaves a daemon no memory to read a request with: the mount ends, and nothing is lost."""
        with self.placed(fault) as store:
            session = self.mountpoint / "sessions/w"
            try:
                mounted = self.do(store, f"mount {self.mountpoint} --json")
                (session / "before").write_bytes(b"kept")
                with (
                    _limited(json.loads(mounted)["pid"], fault),
                    contextlib.suppress(OSError),
                ):
                    (session / "large").write_bytes(bytes(2 * MIB))
                until = time.monotonic() + SECONDS
                while os.path.ismount(self.mountpoint) and time.monotonic() < until:
                    time.sleep(0.05)
                if "Traceback" in (store / "log/mount.log").read_text(errors="replace"):
                    raise BrokenError("the log has a traceback")
                self.do(store, f"mount {self.mountpoint}")
                if (session / "before").read_bytes() != b"kept":
                    raise BrokenError("what was written is not there")
                self.do(store, "commit w --ref after")
                self._end_mount(store)
                self.at_once(store, "verify")
            except (BrokenError, OSError, subprocess.TimeoutExpired) as error:
                return Verdict("FAILED", f"a mount, {fault}: {error}")
            finally:
                self._end_mount(store)
        return Verdict("ends")

    def cell(self, name: str, fault: str) -> Verdict:
        """Runs any cell; "mounted" is the programs in a mount."""
        if name != "mounted":
            return self.command(name, fault)
        return self.ended(fault) if fault == "map" else self.mounted(fault)

    def mounted(self, fault: str) -> Verdict:
        """Writes in a session while the disk fails, and goes on when the fault is gone."""
        with self.placed(fault) as store:
            try:
                return self._mounted(fault, store)
            except (BrokenError, OSError, subprocess.TimeoutExpired) as error:
                return Verdict("FAILED", f"a mount, {fault}: {error}")
            finally:
                self._end_mount(store)

    def _mounted(self, fault: str, store: Path) -> Verdict:
        mounted = self.call(store, ["mount", str(self.mountpoint), "--json"], "", self.shimmed())
        if mounted.returncode:
            raise BrokenError(f"mount: {mounted.stderr.strip()}")
        daemon, session = json.loads(mounted.stdout)["pid"], self.mountpoint / "sessions/w"
        (session / "before").write_bytes(b"kept")
        os.listdir(session / "sub")
        seen: set[int] = set()
        with self.failing(fault, mounted=True), _limited(daemon, fault):
            for operation in _operations(session):
                try:
                    operation()
                except OSError as error:
                    if error.errno not in {errno.ENOENT, errno.EEXIST}:  # of an earlier one
                        seen.add(error.errno or 0)
            if fault != "nofile":  # a daemon without a descriptor lets nobody in who asks
                self._judge("commit", fault, self.call(store, ["commit", "w", "-m", "x"]))
            if (session / "before").read_bytes() != b"kept" or "text" not in os.listdir(session):
                raise BrokenError("the mount shows something else")
        told = seen & FAULTS[fault].answers or fault == "meta"  # what they write is in files
        if not told or seen - FAULTS[fault].answers:
            raise BrokenError(
                f"programs were told {sorted(errno.errorcode.get(c, '?') for c in seen)}"
            )
        (session / "after").write_bytes(b"written")
        (session / "sub/2").write_bytes(b"changed")
        self.do(store, "commit w --ref after")
        if (self.mountpoint / "snapshots/after/after").read_bytes() != b"written":
            raise BrokenError("the commit lacks a file")
        log = (store / "log/mount.log").read_text(errors="replace")
        if "Traceback" in log or (
            fault not in {"io", "meta", "nofile", "memory"} and "level=error" in log
        ):
            raise BrokenError(f"the log has errors: {log[-400:]}")
        self._end_mount(store)
        self.at_once(store, "verify")
        left = self.leavings(store)
        if left:
            raise BrokenError(f"left {' '.join(left)}")
        return Verdict(" ".join(sorted(errno.errorcode[code] for code in seen)) or "works")


_ALSO = {"run --mode full": frozenset({4}), "git export": frozenset({4})}
"""Exit codes that are right as well: another mode has the room; libgit2 does not always say why."""
_PATCH = """\
--- a/text
+++ b/text
@@ -1,2 +1,2 @@
-a line
+another line
 a line
"""
_EXPECTED = {"store", "other", "new", "out", "out.tar", "image", "out.bundle", "repository"}


_LIMITS = {
    "fsize": resource.RLIMIT_FSIZE, "nofile": resource.RLIMIT_NOFILE,
    "map": resource.RLIMIT_AS, "memory": resource.RLIMIT_AS,
}  # fmt: skip
_ROOM = {"map": 6 * MIB, "memory": 28 * MIB}
"""Address space beyond what is loaded. The least map has 16 MiB more than the file."""
_ADDRESS_SPACE = """
import resource, mountctl.__main__, mountctl.access, mountctl.invocation, engine
print(int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize())
"""


def _fill(filler: Path) -> None:
    filler.mkdir()
    with (filler / "file").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _fill_inodes(filler: Path) -> None:
    filler.mkdir()
    with contextlib.suppress(OSError):
        for number in range(1 << 20):
            (filler / str(number)).touch()


@contextlib.contextmanager
def _limited(daemon: int, fault: str) -> Iterator[None]:
    """Puts a limit on a daemon for a while."""
    which = _LIMITS.get(fault)
    if which is None:
        yield
        return
    before = resource.prlimit(daemon, which)
    if which == resource.RLIMIT_AS:
        pages = int(Path(f"/proc/{daemon}/statm").read_text().split()[0])
        value = pages * resource.getpagesize() + (_ROOM[fault] - _ROOM["map"]) // 8
    else:
        value = MIB // 2 if fault == "fsize" else len(os.listdir(f"/proc/{daemon}/fd"))
    resource.prlimit(daemon, which, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon, which, before)


def _append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(b"more" * 3000)


def _operations(session: Path) -> list[Callable[[], object]]:
    """Returns what programs do that change something, each of which may be refused."""
    return [
        lambda: (session / "large").write_bytes(bytes(2 * MIB)),
        lambda: (session / "new").write_bytes(b"x" * 10_000),
        lambda: _append(session / "sub/1"),
        (session / "made").mkdir,
        lambda: (session / "link").symlink_to("text"),
        lambda: os.link(session / "text", session / "linked"),
        lambda: (session / "text").rename(session / "moved"),
        lambda: (session / "moved").rename(session / "text"),
        lambda: (session / "sub").chmod(0o700),
        lambda: os.setxattr(session / "sub/3", b"user.note", b"n" * 100),
        lambda: os.truncate(session / "sub/4", 10_000_000),
        (session / "sub/5").unlink,
    ]


def run(
    home: Path, commands: list[str], faults: list[str], said: Callable[[str], None]
) -> list[Verdict]:
    """Runs all cells of some commands and faults."""
    bench, verdicts = Bench(home), []
    for name in commands:
        row = []
        for fault in faults:
            verdict = bench.cell(name, fault)
            row.append(verdict)
        said(f"{name:16}" + "".join(f"{verdict.word:>12}" for verdict in row))
        verdicts += row
    return verdicts


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--command", action="append", help="only this one, or `mounted`")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one")
    options = parser.parse_args()
    faults = options.fault or list(FAULTS)
    if os.geteuid():
        faults = [fault for fault in faults if not FAULTS[fault].root]
    began = time.monotonic()
    print(f"{'':16}" + "".join(f"{fault:>12}" for fault in faults), flush=True)
    with tempfile.TemporaryDirectory(prefix="amalgamfs-failures-") as home:
        verdicts = run(
            Path(home), options.command or [*COMMANDS, "mounted"], faults,
            lambda line: print(line, flush=True),
        )  # fmt: skip
    wrong = [verdict.why for verdict in verdicts if verdict.why]
    print(f"{len(verdicts)} cells, {len(wrong)} do not hold, {time.monotonic() - began:.0f} s")
    for why in wrong:
        print(f"\n{why}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
