"""The suites that no registry has: each is a checkout or a built program, named by its path.

Nothing of them is kept here; how each is built, its own README says.
"""

import glob
import os
import re
import shlex
import sys

from scripts.bench_setting import CannotError
from scripts.posix_scores import Failure, Score
from scripts.posix_setting import Place, say

# ---------------------------------------------------------------- pjdfstest


def prepare_pjdfstest(checkout: str) -> str:
    """Refuses a directory that is not it, or not built. Raises CannotError."""
    _as_root("it changes owners and makes device nodes")
    _must_be_there(os.path.join(checkout, "tests", "misc.sh"))
    _must_be_there(os.path.join(checkout, "pjdfstest"))
    return ""


def pjdfstest(place: Place, checkout: str) -> Score:
    """Runs every file of tests and reads what it says, in the form of TAP."""
    score = Score("pjdfstest", place.side)
    tests = os.path.join(checkout, "tests")
    files = sorted(glob.glob(os.path.join(glob.escape(tests), "**", "*.t"), recursive=True))
    for file in files[::20] if place.short else files:
        name = os.path.relpath(file, tests).removesuffix(".t")
        said = place.say("sh", file)
        promised = re.search(r"^1\.\.(\d+)", said.output, re.MULTILINE)
        results = re.findall(r"^(not )?ok (\d+)(.*)$", said.output, re.MULTILINE)
        score.total += len(results)
        for bad, number, what in results:
            if bad and "# TODO" not in what:
                score.failures.append(Failure(f"{name}:{number}", what.strip(" -")))
        if said.status != 0 or promised is None or int(promised[1]) != len(results):
            why = f"ended with {said.status} after {len(results)} tests: {said.output[-200:]}"
            score.failures.append(Failure(name, why))
    score.unit = f"tests of {len(files)} files"
    return score


# ---------------------------------------------------------------- unionmount-testsuite


def prepare_unionmount(checkout: str) -> str:
    """Refuses a directory that is not it. Raises CannotError."""
    _as_root("it mounts")
    _must_be_there(os.path.join(checkout, "run"))
    if not any(os.path.exists(f"{where}/mount.fuse") for where in ("/sbin", "/usr/sbin")):
        raise CannotError("mount.fuse is not there; as root: apt-get install fuse3")
    return ""


RENAMES = ["rename-dir", "rename-empty-dir", "rename-pop-dir", "rename-move-dir"]
"""Groups of tests that rename directories of the base."""


def unionmount(place: Place, checkout: str) -> Score:
    """Runs its tests on a session whose base is the suite's lower directory.

    On the disk: on that directory itself. In `run` no directory of the base can be renamed; the
    suite has a group of tests for that, which stands for four others. The suite ends at the first
    failure, so it is called again for the groups that have not begun.
    """
    score = Score("unionmount", place.side)
    with open(os.path.join(checkout, "run"), encoding="utf-8") as file:
        groups = re.findall(r'^\s+"([a-z0-9-]+)",?$', file.read(), re.MULTILINE)
    if place.side == "run":
        score.left_out = [f"{' '.join(RENAMES)}: EXDEV there, which rename-exdev tests"]
    unfit = RENAMES if place.side == "run" else ["rename-exdev"]
    groups = [group for group in groups if group not in unfit]
    if place.short:
        groups = groups[::8]
    base = os.path.join(place.scratch, "union")
    lower, union = os.path.join(base, "l"), os.path.join(base, "m")
    os.mkdir(base)
    if place.side == "disk":
        os.mkdir(lower)
        os.mkdir(union)
        arguments = ["--no"]
        environment = {"UNIONMOUNT_LOWERDIR": lower, "UNIONMOUNT_MNTPOINT": union}
    elif place.side == "run":
        # Not --fuse: with the options of the kernel's overlayfs the suite expects what it does.
        helpers = os.path.join(place.scratch, "bin")
        os.mkdir(helpers)
        _write_helper(os.path.join(helpers, "mount"), place)
        arguments = ["--ov"]
        environment = {
            "UNIONMOUNT_BASEDIR": base, "UNIONMOUNT_LOWERDIR": lower,
            "UNIONMOUNT_MNTOPTIONS": "userxattr,xino=on",
            "PATH": f"{helpers}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip
    else:
        helper = os.path.join(place.scratch, "mount")
        if "." in helper:
            score.cannot = f"mount(8) takes no helper with a dot in its path: {helper}"
            return score
        _write_helper(helper, place)
        arguments = ["--ov", f"--fuse={helper}"]  # a path: mount(8) clears PATH
        environment = {"UNIONMOUNT_BASEDIR": base}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    while groups:
        said = say("/usr/bin/python3", "./run", *arguments, *groups, cwd=checkout, seconds=1800,
                   environment=environment)  # fmt: skip
        began = re.findall(r"^\*\*\* \./run .* ([a-z0-9-]+)$", said.output, re.MULTILINE)
        tests = re.findall(r"^TEST (\S+): (.*)$", said.output, re.MULTILINE)
        score.total += len(tests)
        if said.status == 0:
            break
        last = " ".join(said.output.strip().splitlines()[-3:])
        at, what = tests[-1] if tests else ("run", "nothing began")
        score.failures.append(Failure(at, f"{what}: {last}"))
        if not tests:
            break  # the next ones would not begin either
        groups = groups[groups.index(began[-1]) + 1 :]
    say("/usr/bin/python3", "./run", "--clean-up", cwd=checkout, environment=environment)
    return score


def _write_helper(path: str, place: Place) -> None:
    """Writes the program that mount(8) calls by way of mount.fuse; for `run`, one in its stead."""
    command = [sys.executable, "-P", "-m", "scripts.posix_union", place.scratch, place.side]
    other = 'case $2 in overlay) shift 2 ;; *) exec /bin/mount "$@" ;; esac\n'
    with open(path, "w", encoding="utf-8") as file:
        file.write("#!/bin/sh\n" + (other if place.side == "run" else ""))
        file.write(f'exec {shlex.join(command)} "$@"\n')
    os.chmod(path, 0o755)


# ---------------------------------------------------------------- programs


def prepare_program(program: str) -> str:
    """Refuses what cannot be run. Raises CannotError."""
    if not os.access(program, os.X_OK):
        raise CannotError(f"{program} is not a program")
    return ""


def test_syscalls(place: Place, program: str) -> Score:
    """Runs libfuse's own tests of system calls, and again with files unlinked while open."""
    score = Score("test_syscalls", place.side)
    for flags in ([], ["-u"]):
        said = place.say(program, place.path, *flags)
        listed = re.findall(r"^(?:\+ *[\d.]+s)? *(\d+ \[.*?\]) (.*)$", said.output, re.MULTILINE)
        words: dict[str, list[str]] = {}
        for test, word in listed:
            words.setdefault(test, []).append(word)
        for test, spoken in words.items():
            name = " ".join([test.partition("[")[2].rstrip("]"), *flags])
            bad = [word for word in spoken if word not in {"START", "OK", "SKIP"}]
            if bad:
                score.failures.append(Failure(name, bad[0]))
            elif "OK" not in spoken:
                # Of a test that does not apply it tells the start alone; and of its last look
                # at what was unlinked, which is no test of its own.
                if not test.endswith("[check_unlinked_testfile]"):
                    score.left_out.append(name)
                continue
            score.total += 1
        if said.status != 0 and not score.failures:
            score.failures.append(Failure("all", said.output[-300:]))
    return score


def fsx(place: Place, program: str) -> Score:
    """Runs it with several seeds; each run is a test."""
    operations = 2_000 if place.short else 20_000
    score = Score("fsx", place.side, unit=f"runs of {operations:,} operations")
    for seed in range(1, 3 if place.short else 7):
        file = os.path.join(place.path, f"file{seed}")
        said = place.say(program, "-N", str(operations), "-S", str(seed), "-P", place.scratch, file)
        score.total += 1
        if said.status != 0:
            score.failures.append(Failure(f"seed {seed}", said.output[-300:]))
    return score


def _as_root(why: str) -> None:
    if os.geteuid() != 0:
        raise CannotError(f"only root can run it: {why}")


def _must_be_there(path: str) -> None:
    if not os.path.exists(path):
        raise CannotError(f"there is no {path}")
