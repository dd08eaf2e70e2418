import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import lmdb
import pytest

from engine.repository import Repository
from engine.storage.chunking import LARGEST_CHUNK
from engine.storage.store import Db


def same_trees(one: Path, other: Path) -> None:
    """Compares two real directories: names, kinds, modes, times, contents."""
    left, right = (
        sorted(p.relative_to(one) for p in one.rglob("*")),
        sorted(p.relative_to(other) for p in other.rglob("*")),
    )
    assert left == right
    for path in left:
        a, b = (one / path).lstat(), (other / path).lstat()
        assert (a.st_mode, a.st_mtime_ns) == (b.st_mode, b.st_mtime_ns), path
        if stat.S_ISREG(a.st_mode):
            assert (one / path).read_bytes() == (other / path).read_bytes()
        elif stat.S_ISLNK(a.st_mode):
            assert (one / path).readlink() == (other / path).readlink()


def test_init_makes_a_store_once(nowhere):
    result = nowhere("init")
    assert result.stdout == f"{nowhere.store}\n"
    assert "mountctl import" in result.stderr
    assert "there is a store already" in nowhere.fails(4, "init")


def test_init_under_json(nowhere):
    assert nowhere.json("init") == {"store": str(nowhere.store), "owners": False}


def test_init_refuses_a_folder_with_other_things(nowhere):
    nowhere.store.mkdir()
    (nowhere.store / "letters").mkdir()
    assert "letters" in nowhere.fails(4, "init")


def test_import_writes_the_id(mountctl, tree):
    result = mountctl("import", tree)
    identifier = result.stdout.strip()
    assert len(identifier) == 12
    assert "7 entries" in result.stderr
    assert mountctl.json("snapshot", "show", identifier)["snapshot"].startswith(identifier)


def test_what_an_unchanged_tree_does_not_keep_is_said(mountctl, tree):
    mountctl("import", tree)
    words = ("import", tree, "-m", "again", "--meta", "a=b")
    assert "no snapshot was made, so --message and --meta went nowhere" in mountctl(*words).stderr
    (warning,) = mountctl.json(*words)["warnings"]
    assert "--message" in warning
    assert mountctl.json("import", tree)["warnings"] == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("export", "main", "--tar", "-", "--image", "x"), "--image goes with --oci"),
        (("diff", "main", "--copies", "--no-renames"), "exclude each other"),
        (("checkout", "--list", "--outside-links"), "--outside-links is for"),
        (("merge", "main", "main", "--diff3"), "--diff3 goes with --write-conflicts"),
        (("run", "--history", "main", "--", "true"), "--history takes"),
        (("run", "main", "--explain", "--commit", "--", "true"), "--explain runs nothing"),
        (("git", "export", "out", "main", "-m", "x"), "none is named"),
    ],
)
def test_options_that_would_do_nothing_are_refused(mountctl, words, why):
    assert why in mountctl.fails(2, *words)


def test_import_under_json(mountctl, tree):
    made = mountctl.json("import", tree, "--ref", "main")
    assert made["changed"] is True
    assert made["ref"] == "main"
    assert made["entries"] == 7
    assert made["read_files"] == 3
    assert len(made["snapshot"]) == 64
    assert made["warnings"] == []


def test_import_again_reads_nothing_and_gives_the_same_snapshot(mountctl, tree):
    before = mountctl.json("import", tree)
    again = mountctl.json("import", tree)
    assert again["changed"] is False
    assert again["snapshot"] == before["snapshot"]
    assert "nothing has changed" in mountctl("import", tree).stderr
    assert mountctl.json("import", tree, "--no-cache")["read_files"] == 3


def test_import_takes_parents_message_and_facts(mountctl, tree, first):
    (tree / "more").write_text("more")
    second = mountctl.json("import", tree, "--parent", "main", "-m", "two\nlines")["snapshot"]
    words = ("--parent", first[:8], "--parent", second[:8], "--meta", "a=b=c", "--meta", "d=")
    third = mountctl.json("import", tree, "-m", "third", *words)["snapshot"]
    shown = mountctl.json("snapshot", "show", third)
    assert shown["parents"] == [first, second]
    assert shown["message"] == "third"
    assert shown["metadata"] == {"a": "b=c", "d": "", "source": str(tree)}
    assert mountctl.json("snapshot", "show", second)["message"] == "two\nlines"


@pytest.mark.parametrize("fact", ["novalue", "=x"])
def test_import_wants_facts_with_a_key_and_a_value(mountctl, tree, fact):
    assert "KEY=VALUE" in mountctl.fails(2, "import", tree, "--meta", fact)


def test_import_names_what_it_leaves_out(mountctl, tree):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "talk"))
        result = mountctl("import", tree)
    assert f"warning: left out '{tree}/talk': it is a socket" in result.stderr
    assert "socket" in mountctl.json("import", tree)["warnings"][0]


def test_import_tells_a_slow_chunker(mountctl, tree, monkeypatch):
    import engine.storage.chunking

    monkeypatch.setattr(engine.storage.chunking, "compiled", lambda: False)
    assert "warning: fastcdc is not compiled" in mountctl("import", tree).stderr


def test_checkout_makes_the_same_tree(mountctl, tree, first, tmp_path):
    result = mountctl("checkout", "main", tmp_path / "out")
    assert result.stdout == f"{tmp_path}/out\n"
    same_trees(tree, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    made = mountctl.json("checkout", first[:6], tmp_path / "empty")
    assert made == {
        "directory": f"{tmp_path}/empty", "entries": 7, "bytes": 51241, "tracked": True,
        "set_id_dropped": 0,
    }  # fmt: skip


def test_checkout_of_a_session_is_as_it_is_now(mountctl, upper, tmp_path):
    (upper / "new").write_text("new")
    mountctl("checkout", "@work", tmp_path / "out")
    assert (tmp_path / "out" / "new").read_text() == "new"


def test_checkout_refuses_what_would_lead_out(mountctl, tree, tmp_path):
    (tree / "passwd").symlink_to("/etc/passwd")
    mountctl("import", tree, "--ref", "bad")
    assert "'passwd' leads out" in mountctl.fails(4, "checkout", "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mountctl("checkout", "bad", tmp_path / "out", "--outside-links")
    assert (tmp_path / "out" / "passwd").readlink() == Path("/etc/passwd")


def test_gc_removes_what_nothing_refers_to(mountctl, tree, first):
    (tree / "data.bin").write_bytes(os.urandom(3 * LARGEST_CHUNK))
    second = mountctl.json("import", tree)["snapshot"]
    mountctl("snapshot", "rm", second)
    planned = mountctl.json("gc", "--dry-run")
    assert planned["dry_run"] is True
    assert planned["chunks"] > 1
    assert "would remove" in mountctl("gc", "--dry-run").stdout
    done = mountctl.json("gc")
    assert {**done, "dry_run": True} == planned
    assert mountctl("gc").stdout == "removed 0 chunks and 0 nodes, 0 B\n"
    assert mountctl.json("verify")["ok"] is True


def test_gc_compacts(mountctl, tree, first):
    (tree / "data.bin").write_bytes(os.urandom(20 * LARGEST_CHUNK))
    mountctl("snapshot", "rm", mountctl.json("import", tree)["snapshot"])
    file = mountctl.store / "db/data.mdb"
    before = file.stat().st_size
    done = mountctl.json("gc", "--compact")
    assert done["complete"] is True
    assert done["file_bytes_before"] >= before
    assert done["file_bytes"] == file.stat().st_size < before - 10 * LARGEST_CHUNK
    assert "the store's file had" in mountctl("gc", "--compact").stdout
    assert mountctl.json("verify")["ok"] is True
    for words in [("--dry-run", "--compact"), ("--why", "main:", "--dry-run")]:
        assert "exclude each other" in mountctl.fails(2, "gc", *words)


def test_gc_says_why(mountctl, first):
    mountctl("session", "create", "work", "main")
    result = mountctl("gc", "--why", "main:data.bin").stdout.splitlines()
    assert result[0].startswith("chunk ")
    assert [line.split() for line in result[1:]] == [
        ["KEPT", "BY", "NAME", "PATH"],
        ["ref", "main", "data.bin"],
        ["snapshot", first[:12], "data.bin"],
        ["session", "work", "data.bin"],
    ]
    found = mountctl.json("gc", "--why", result[0].split()[1][:20])
    assert found["kind"] == "chunk"
    assert found["id"] == result[0].split()[1]
    assert [holder["kind"] for holder in found["holders"]] == ["ref", "snapshot", "session"]
    assert found["holders"][0] == {"kind": "ref", "name": "main", "path": "data.bin"}
    assert "snapshot rm" in mountctl("gc", "--why", first).stderr
    assert "no path is called" in mountctl.fails(3, "gc", "--why", "main:nothing")
    assert "no object is called" in mountctl.fails(3, "gc", "--why", "nothing")


def test_stats(mountctl, tree, first):
    (tree / "data.bin").write_bytes(os.urandom(3 * LARGEST_CHUNK))
    second = mountctl.json("import", tree)["snapshot"]
    everything = mountctl.json("stats")
    assert everything["compression"] == "zstd:3"
    assert [t["name"] for t in everything["trees"]] == sorted([first, second])
    own = {t["name"]: t["own"]["unique"] for t in everything["trees"]}
    assert own[second] == 3 * LARGEST_CHUNK
    assert everything["total"]["unique"] - everything["shared"]["unique"] == sum(own.values())
    assert "2 snapshots" in mountctl("stats").stdout
    (chosen,) = mountctl.json("stats", "main")["trees"]
    assert chosen["name"] == first
    assert chosen["all"]["unique"] + 3 * LARGEST_CHUNK == everything["total"]["unique"]
    assert mountctl("stats", "main", second[:8]).stdout.count("\n") == 3
    assert mountctl.fails(3, "stats", "nothing")


def test_compression_is_a_setting(nowhere, tree, tmp_path):
    (tree / "text").write_text("a line that repeats\n" * 20_000)
    sizes = []
    for number, how in enumerate(["off", "zstd:1", "zstd:19"]):
        store = tmp_path / f"store-{number}"
        nowhere("init", "--compression", how, "--store", store)
        assert nowhere("config", "compression", "--store", store).stdout == f"{how}\n"
        nowhere("import", tree, "--ref", "main", "--store", store)
        sizes.append(nowhere.json("stats", "--store", store)["total"]["stored"])
    assert sizes[0] > sizes[1] + 300_000
    assert nowhere.json("config", "compression", "off", "--store", store) == {"compression": "off"}
    assert "compression  off" in nowhere("config", "--store", store).stdout
    for wrong in ["zstd", "zstd:0", "zstd:20", "gzip", "3", ""]:
        assert "no compression" in nowhere.fails(
            2, "config", "compression", wrong, "--store", store
        )
    assert "no compression" in nowhere.fails(
        2, "init", "--compression", "x", "--store", tmp_path / "n"
    )
    assert not (tmp_path / "n").exists()
    assert nowhere.json("verify", "--store", store)["ok"] is True


def test_verify_repairs(mountctl, tree, first, tmp_path):
    mountctl("init", "--store", tmp_path / "other")
    mountctl("import", tree, "--store", tmp_path / "other")
    with Repository.open(str(mountctl.store)) as repository:
        with repository.store.read() as reader:
            keys = list(reader.keys(Db.CHUNKS))
        wrong = [(key, b"\0wrong") for key in keys]
        repository.store.write(lambda writer: writer.put_many(Db.CHUNKS, wrong))
    assert mountctl.json("verify", "--repair", code=9)["repaired"] == 0
    (tmp_path / "empty").mkdir()
    left = mountctl.json("verify", "--repair", "--from", tmp_path / "empty", code=9)
    assert left["damage"][0]["id"] in {key.hex() for key in keys}
    done = mountctl.json("verify", "--repair", "--from", tmp_path / "other")
    assert (done["ok"], done["repaired"], done["dropped"]) == (True, len(keys), 0)
    assert "repaired 0 objects" in mountctl("verify", "--repair", "--from", tree).stderr
    assert "--from goes with --repair" in mountctl.fails(2, "verify", "--from", tree)


def test_verify_names_damaged_paths(mountctl, first):
    assert mountctl("verify").stdout == ""
    with Repository.open(str(mountctl.store)) as repository:
        with repository.store.read() as reader:
            key = max(reader.items(Db.CHUNKS), key=lambda item: len(item[1]))[0]
        repository.store.write(lambda writer: writer.put(Db.CHUNKS, key, b"\0wrong"))
    result = mountctl("verify", code=9)
    assert f"{first[:12]}  data.bin" in result.stdout
    assert "1 damaged" in result.stderr
    report = mountctl.json("verify", code=9)
    assert report["ok"] is False
    assert report["damage"][0]["where"] == first
    assert report["damage"][0]["path"] == "data.bin"
    assert "corrupt" in mountctl.fails(9, "checkout", "main", mountctl.home / "out")


def test_doctor_checks_this_machine(nowhere):
    result = nowhere("doctor", code=nowhere("doctor", "--json").exit_code)
    assert result.stdout.startswith("ok    python")
    report = nowhere.json("doctor", code=0 if "fail  " not in result.stdout else 1)
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks) == {
        "python", "fastcdc", "pyfuse3", "fuse device", "fusermount3", "user namespaces",
        "other users", "open files", "dead mounts", "mount", "store", "free space", "free inodes",
        "attributes", "whiteouts", "overlayfs",
    }  # fmt: skip
    assert checks["store"]["status"] == "warn"
    assert "mountctl init" in checks["store"]["hint"]
    assert all((check["status"] == "ok") == (check["hint"] is None) for check in checks.values())
    assert not nowhere.store.exists()


def test_doctor_leaves_nothing_behind(mountctl, upper):
    before = sorted(mountctl.store.rglob("*"))
    checks = mountctl.json("doctor")["checks"]
    assert {"name": "store", "status": "ok"}.items() <= next(
        check.items() for check in checks if check["name"] == "store"
    )
    assert sorted(mountctl.store.rglob("*")) == before


def test_doctor_tries_what_run_would_mount(tmp_path, nowhere):
    full = nowhere.json("doctor")["checks"][-1]
    assert full["name"] == "overlayfs"
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "overlay", "overlay", "-o",
         "userxattr,lowerdir=lower,upperdir=upper,workdir=work", "merged"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert (full["status"] == "ok") == (tried.returncode == 0)


def test_doctor_fails_for_a_store_that_cannot_be_used(mountctl):
    with Repository.open(str(mountctl.store)) as repository:
        repository.store.write(lambda writer: writer.put(Db.META, b"format", b"99"))
    result = mountctl("doctor", code=1)
    assert "fail  store" in result.stdout
    assert "later version" in result.stdout


def test_ctrl_c_ends_an_import_with_130_and_nothing_is_lost(mountctl, tree, tmp_path):
    for number in range(40):
        (tree / f"large{number}").write_bytes(os.urandom(4 << 20))
    child = subprocess.Popen(
        mountctl.command("import", tree), env=mountctl.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    data = mountctl.store / "db" / "data.mdb"
    size = data.stat().st_size
    deadline = time.monotonic() + 120
    while data.stat().st_size < size + (8 << 20) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert mountctl.json("snapshot", "list") == []
    assert mountctl.json("import", tree)["changed"] is True


@pytest.mark.parametrize("words", [("ref", "set", "new", "main"), ("gc",)], ids=" ".join)
def test_ctrl_c_ends_what_waits_for_another_writer(mountctl, first, words):
    """LMDB waits in C, where no handler of Python runs."""
    with lmdb.open(str(mountctl.store / "db"), max_dbs=1) as other, other.begin(write=True):
        child = subprocess.Popen(
            mountctl.command(*words), env=mountctl.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not waits_for_the_turn(child.pid):
                assert time.monotonic() < deadline
                assert child.poll() is None
                time.sleep(0.01)
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == -signal.SIGINT
        finally:
            child.kill()
            child.communicate()
    mountctl("verify")
    mountctl(*words)


def waits_for_the_turn(pid: int) -> bool:
    """By what it has mapped, and that SIGINT would end it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    maps = Path(f"/proc/{pid}/maps").read_text()
    return "/lock.mdb" in maps and not caught >> (signal.SIGINT - 1) & 1


def test_a_ref_that_moves_tells_where_it_was(mountctl, first, tree):
    """So that it can be put back, without looking for it."""
    short = first[:12]
    (tree / "more").write_text("x")
    done = mountctl("import", tree, "--ref", "main")
    assert f"main was {short}" in done.stderr
    second = mountctl.json("snapshot", "show", "main")["snapshot"]
    back = mountctl("ref", "set", "main", first)
    assert f"main was {second[:12]}" in back.stderr
    assert "was" not in mountctl("ref", "set", "main", first).stderr
    assert "was" not in mountctl("ref", "set", "other", first).stderr
    assert mountctl.json("ref", "set", "other", second)["was"] == first
    assert f"main was {short}" in mountctl("ref", "rm", "main").stderr
    assert mountctl.json("ref", "rm", "other")["was"] == second
    mountctl("ref", "set", "main", first)
    mountctl("session", "create", "work", "main")
    upper = Path(mountctl.json("session", "show", "work")["upper"])
    (upper / "new").write_text("x")
    assert f"main was {short}" in mountctl("commit", "work", "--ref", "main").stderr
    merged = mountctl.json("merge", first, second, "--ref", "main")
    assert merged["ref_was"] != merged["snapshot"] == second
    made = mountctl.json("import", tree, "--ref", "new")
    assert (made["ref"], made["ref_was"]) == ("new", None)
    patch = mountctl.home / "p"
    patch.write_text(mountctl("diff", first, second, "--patch").stdout)
    assert (
        f"main was {second[:12]}" in mountctl("apply", patch, "--on", first, "--ref", "main").stderr
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_store_that_keeps_owners_and_one_that_says_what_it_loses(nowhere, tree):
    os.chown(tree / "data.bin", 4711, 4712)
    assert nowhere.json("init", "--owners")["owners"] is True
    kept = nowhere.json("import", tree)
    assert kept["lost_owners"] == 0
    nowhere("checkout", kept["snapshot"], nowhere.home / "out")
    status = (nowhere.home / "out/data.bin").stat()
    assert (status.st_uid, status.st_gid) == (4711, 4712)
    shutil.rmtree(nowhere.store)
    nowhere("init")
    done = nowhere("import", tree)
    assert "1 file has another owner or group; the snapshot does not keep that" in done.stderr
    assert "init --owners" in done.stderr
    assert nowhere.json("import", tree)["lost_owners"] == 1
    assert nowhere.json("import", tree, "--owners")["lost_owners"] == 0
