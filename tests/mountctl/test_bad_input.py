import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.repository import Repository
from engine.storage.store import Db

EVERY = [
    ["import", "{tree}"],
    ["checkout", "main", "{tree}/out"],
    ["gc"],
    ["gc", "--compact"],
    ["gc", "--why", "main"],
    ["verify"],
    ["verify", "--repair"],
    ["stats"],
    ["stats", "main"],
    ["config"],
    ["config", "compression", "off"],
    ["mount", "{tree}/mnt"],
    ["status"],
    ["status", "work"],
    ["log"],
    ["diff", "main", "main"],
    ["commit", "work"],
    ["session", "list"],
    ["session", "create", "work", "main"],
    ["session", "show", "work"],
    ["session", "fork", "work", "w"],
    ["session", "rename", "work", "w"],
    ["session", "reset", "work"],
    ["session", "rm", "work"],
    ["snapshot", "list"],
    ["snapshot", "show", "main"],
    ["snapshot", "rm", "main"],
    ["ref", "list"],
    ["ref", "set", "main", "main"],
    ["ref", "rm", "main"],
]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_no_store(nowhere, tree, words):
    message = nowhere.fails(6, *(word.format(tree=tree) for word in words))
    assert message == f"there is no AmalgamFS store at {nowhere.store}"


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_no_store_under_json(nowhere, tree, words):
    result = nowhere("--json", *(word.format(tree=tree) for word in words), code=6)
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert error["kind"] == "NotAStoreError"
    assert error["exit_code"] == 6
    assert "mountctl init" in error["hint"]


def test_a_folder_that_is_no_store(nowhere, tree):
    assert nowhere("status", "--store", tree, code=6)
    assert nowhere("status", "--store", tree / "data.bin", code=6)


def test_a_store_that_is_damaged(mountctl):
    data = mountctl.store / "db" / "data.mdb"
    data.write_bytes(os.urandom(data.stat().st_size))
    assert "damaged" in mountctl.fails(9, "status")


def test_a_store_of_a_later_version(mountctl):
    with Repository.open(str(mountctl.store)) as repository:
        repository.store.write(lambda writer: writer.put(Db.META, b"format", b"99"))
    assert "has format 99" in mountctl.fails(6, "log")
    assert "has format 99" in mountctl.fails(6, "mount", mountctl.home)


@pytest.mark.unprivileged
def test_a_store_of_somebody_else(public_path, as_user):
    if os.geteuid() == 0 and "AMALGAMFS_TEST_USER" not in os.environ:
        pytest.skip("as root, and AMALGAMFS_TEST_USER names no ordinary user")
    Repository.create(str(public_path / "store")).close()
    (public_path / "store" / "db").chmod(0)
    done = as_user("-m", "mountctl", "status", "--store", str(public_path / "store"))
    (public_path / "store" / "db").chmod(0o700)
    assert done.returncode == 7, done.stderr
    assert "no permission" in done.stderr
    assert "\nhint: " in done.stderr


@pytest.mark.parametrize("name", ["zz", "none", "abcd", "f" * 64, "", "a/b", "\udcff", "x" * 3000])
@pytest.mark.parametrize(
    "words", [["log"], ["snapshot", "show"], ["ref", "set", "x"], ["checkout"], ["diff", "main"]]
)
def test_an_unknown_snapshot(mountctl, first, tmp_path, words, name):
    if name and first.startswith(name):
        pytest.skip("that is the snapshot's id")
    more = [str(tmp_path / "out")] if words == ["checkout"] else []
    assert "is called" in mountctl.fails(3, *words, name, *more)


@pytest.mark.parametrize("name", ["@" + "x" * 3000, "@\udcff", "@", "@a\nb"])
def test_an_unknown_session_as_a_snapshot(mountctl, first, name):
    mountctl.fails(3, "log", name)


def test_an_ambiguous_id(mountctl, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with Repository.open(str(mountctl.store)) as repository:
        made = repository.import_directory(str(source)).snapshot
        raw = repository.store
        with raw.read() as reader:
            record = bytes(reader.get(Db.SNAPSHOTS, made) or b"")
        twin = made[:3] + bytes([made[3] ^ 0xFF]) + made[4:]
        raw.write(lambda writer: writer.put(Db.SNAPSHOTS, twin, record))
    message = mountctl.fails(3, "log", made.hex()[:5])
    assert made.hex() in message
    assert twin.hex() in message
    assert "more digits" in mountctl("log", made.hex()[:5], code=3).stderr
    assert mountctl("log", made.hex()[:8])


def test_import_of_what_cannot_be_imported(mountctl, tree):
    assert "the store itself" in mountctl.fails(4, "import", mountctl.store)
    assert "the store itself" in mountctl.fails(4, "import", mountctl.store / "db")
    assert "no directory" in mountctl.fails(4, "import", tree / "data.bin")
    assert "No such file" in mountctl.fails(4, "import", tree / "nothing")
    assert mountctl.json("snapshot", "list") == []


def test_import_leaves_out_a_store_inside(mountctl, tree, tmp_path):
    mountctl("import", tmp_path)
    names = [
        c["path"]
        for c in mountctl.json(
            "diff",
            mountctl.json("import", tree)["snapshot"],
            mountctl.json("import", tmp_path)["snapshot"],
        )["entries"]
    ]
    assert not [name for name in names if name.startswith("store")]


def test_import_with_impossible_names(mountctl, tree):
    mountctl.fails(2, "import", tree, "--ref", "a/b")
    mountctl.fails(3, "import", tree, "--parent", "none")
    mountctl.fails(2, "import", tree, "-m", "\udcff")
    mountctl.fails(2, "import", tree, "--meta", "\udcff=1")
    assert mountctl.json("snapshot", "list") == []


def test_names_that_are_not_utf8(mountctl, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a\udcff").write_text("x")
    odd = tmp_path / "odd\udcfe"
    source.rename(odd)
    identifier = mountctl.json("import", odd)["snapshot"]
    out = tmp_path / "out\udcfd"
    assert mountctl("checkout", identifier, out).stdout == f'"{tmp_path}/out\\375"\n'
    assert os.listdir(os.fsencode(out)) == [b"a\xff"]
    assert mountctl.json("snapshot", "show", identifier)["metadata"]["source"].endswith(
        "odd\\udcfe"
    )


@pytest.mark.parametrize("kind", ["directory", "file", "link", "inside", "nowhere"])
def test_checkout_onto_what_is_there(mountctl, first, tree, tmp_path, kind):
    target = {
        "directory": tree,
        "file": tree / "data.bin",
        "link": tmp_path / "link",
        "inside": mountctl.store / "out",
        "nowhere": tmp_path / "not" / "there",
    }[kind]
    if kind == "link":
        target.symlink_to(tmp_path / "target")
    before = sorted(tmp_path.rglob("*"))
    assert "cannot check out" in mountctl.fails(4, "checkout", "main", target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_on_a_full_disk(nowhere, tmp_path):
    """The limit on a file's size stands in for the disk: LMDB gets EFBIG or ENOSPC."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(os.urandom(4 << 20))
    nowhere("init")
    program = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'mountctl', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "import", str(source)], env=nowhere.environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in {8, 9, 11}, done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert nowhere.json("verify")["ok"] is True
    assert nowhere.json("import", source)["changed"] is True


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("nowhere", "no such directory"),
        ("file", "not a directory"),
        ("full", "not empty"),
        ("link", "symbolic link"),
        ("store/locks", "the directory is not empty"),
        ("store/inner", "inside of the store"),
    ],
)
def test_mounting_where_it_cannot_be(mountctl, first, tmp_path, place, why):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (mountctl.store / "inner").mkdir()
    assert why in mountctl.fails(4, "mount", tmp_path / place)


def test_umount_of_what_is_not_mounted(mountctl, tmp_path):
    assert "is not mounted" in mountctl.fails(3, "umount")
    assert "is not mounted" in mountctl.fails(3, "umount", tmp_path)
    assert "is not mounted" in mountctl.fails(3, "umount", Path("/"))


def test_umount_without_a_store(nowhere):
    assert "is not mounted" in nowhere.fails(3, "umount")
