"""What a benchmark stands on: child processes, a run's own directory, packages, the big tree.

Used by the other bench modules only.
"""

import contextlib
import fcntl
import glob
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from fsdriver.launch import wait_until_ended
from fsdriver.mountpoint import UnmountError, mounts, unmount

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {
    **{key: os.environ[key] for key in ("PATH", "HOME", "XDG_CACHE_HOME") if key in os.environ},
    "LC_ALL": "C",
    "NO_COLOR": "1",
    # git as it is without anybody's configuration, but for one thing: the repacking that it
    # starts in the background after a commit would disturb what is measured next.
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "gc.auto",
    "GIT_CONFIG_VALUE_0": "0",
    **{f"GIT_{who}_NAME": "bench" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "bench@localhost" for who in ("AUTHOR", "COMMITTER")},
}


class CannotError(Exception):
    """Something that is needed failed or is not there; the text says what."""


class Ran(NamedTuple):
    """What a child process took and said. `peak` is its largest resident set in MB."""

    seconds: float
    peak: float
    output: str


def note(text: str) -> None:
    """Tells the person who waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(*command: str, cwd: str | None = None, patient: bool = False, strict: bool = False) -> Ran:
    """Runs a command to its end; raises CannotError if it fails, or if `strict` and it complains.

    When we are interrupted it is killed with its children, unless `patient`: what starts a
    daemon must get to where the daemon can be found.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            process_group=0,
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            if not patient:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        complaint = err.read().decode(errors="replace").strip()
        if child.returncode or (strict and complaint):
            text = " ".join(command)
            raise CannotError(f"{text}: exit code {child.returncode}\n{complaint[-2000:]}")
        return Ran(seconds, usage.ru_maxrss / 1024, out.read().decode(errors="replace"))


def shell(script: str, *arguments: str, cwd: str | None = None, strict: bool = False) -> Ran:
    """Runs a line of shell with positional arguments, as `run`."""
    return run("sh", "-ec", script, "sh", *arguments, cwd=cwd, strict=strict)


def mountctl(store: str, *arguments: str, patient: bool = False) -> Ran:
    """Runs the command line as a person does, its start included."""
    program = os.path.join(os.path.dirname(sys.executable), "mountctl")
    return run(program, "--store", store, *arguments, patient=patient)


@contextlib.contextmanager
def workplace(cache: str) -> Iterator[str]:
    """Gives a directory of this run's own; nothing of it or mounted below it is left afterwards.

    The same place each time, under a lock, so that what a killed run left goes as well.
    """
    os.makedirs(cache, exist_ok=True)
    place = os.path.join(os.path.realpath(cache), "run")
    with open(os.path.join(cache, "lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotError(f"another run of bench is using {cache}") from None
        clear(place)
        try:
            os.mkdir(place, 0o700)
            yield place
        finally:
            ignore_signals()
            os.chdir("/")
            clear(place)


def ignore_signals(*_: object) -> None:
    """Lets nothing interrupt what follows: it is the way out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def clear(place: str) -> None:
    """Removes a directory with all that is mounted below it; never deletes through a mount."""
    for mount in reversed(mounts()):
        if mount.path.startswith(place + os.sep):
            with contextlib.suppress(UnmountError):
                unmount(mount.path, lazy=True)
    if any(mount.path.startswith(place + os.sep) for mount in mounts()):
        raise CannotError(f"still mounted, so kept: {place}")
    for store in glob.glob(os.path.join(place, "store*", "")):
        wait_until_ended(store, 10)
    if os.path.isdir(place):
        # A build may have made directories that cannot be written.
        subprocess.run(["chmod", "-R", "u+rwX", place], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(place)


def install(packages: list[str]) -> None:
    """Installs Debian packages if this user may. Raises CannotError."""
    hint = f"as root: apt-get install {' '.join(packages)}"
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") is None or (sudo and shutil.which("sudo") is None):
        raise CannotError(f"not installed; {hint}")
    note(f"installing with apt: {' '.join(packages)}")
    quietly = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]
    try:
        run(*sudo, *quietly, "update", patient=True)
        run(*sudo, *quietly, "--no-install-recommends", "install", *packages, patient=True)
    except CannotError as error:
        raise CannotError(f"cannot be installed; {hint}\n{error}") from error


def kernel_source(cache: str) -> str:
    """Returns the unpacked source of Linux as Debian packages it, kept for the next run.

    Needs no root where apt knows its packages already.
    """
    kept = glob.glob(os.path.join(cache, "linux-source-*", ""))
    if kept:
        return os.path.abspath(kept[0])
    hint = "or name a tree of your own: --tree DIR"
    if shutil.which("apt-get") is None:
        raise CannotError(f"there is no apt to fetch a linux-source package with; {hint}")
    names = _source_packages()
    if not names and os.geteuid() == 0:
        run("apt-get", "-qq", "update", patient=True)
        names = _source_packages()
    if not names:
        raise CannotError(f"apt knows no linux-source package; apt-get update as root, {hint}")
    name = "linux-source-6.1" if "linux-source-6.1" in names else names[0]
    note(f"fetching {name}")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch.") as scratch:
        run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name, cwd=scratch)
        shell(
            "dpkg-deb --fsys-tarfile *.deb | tar -x --wildcards '*/linux-source-*.tar.*'; rm *.deb;"
            "mkdir tree; find . -name 'linux-source-*.tar.*' -exec"
            " tar -C tree --strip-components=1 --no-same-owner -xf {} ';'",
            cwd=scratch,
        )
        os.rename(os.path.join(scratch, "tree"), os.path.join(cache, name))
    return os.path.join(os.path.abspath(cache), name)


def _source_packages() -> list[str]:
    found = run("apt-cache", "search", "--names-only", r"^linux-source-[0-9.]+$").output
    return sorted(line.split()[0] for line in found.splitlines())


def size_of(tree: str) -> tuple[int, int, int]:
    """Returns how many entries a directory has, their bytes, and their bytes on the disk."""
    entries = apparent = used = 0
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            entries += 1
            used += status.st_blocks * 512
            if name in files:
                apparent += status.st_size
    return entries, apparent, used


def filesystem_of(path: str) -> str:
    """Returns the kind of the filesystem that a directory is on."""
    return run("stat", "--file-system", "--format=%T", path).output.strip().replace("ext2/ext3", "ext4")


def _first(path: str, pattern: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        found = re.search(pattern, file.read(), re.MULTILINE)
        if found:
            return found[1].strip().strip('"')
    return "unknown"


def machine(place: str) -> dict[str, str]:
    """Returns what a reader must know of the machine to compare figures."""
    memory = _first("/proc/meminfo", r"^MemTotal:\s*(\d+)")
    return {
        "processor": f"{_first('/proc/cpuinfo', r'^model name\s*:(.*)')}, {os.cpu_count()} cores",
        "memory": f"{int(memory) / 2**20:.0f} GiB" if memory.isdigit() else memory,
        "system": f"{_first('/etc/os-release', r'^PRETTY_NAME=(.*)')}, Linux {platform.release()}",
        "disk": filesystem_of(place),
        "Python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "an ordinary user",
    }
