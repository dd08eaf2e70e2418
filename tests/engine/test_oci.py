"""OCI images: states of a tree go out as layers and come back; nothing hostile comes in."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Repository
from engine.archives.oci_reading import ImageChoiceError, ImageDamagedError, read_image
from engine.archives.oci_writing import ImageRefusedError, write_image
from engine.archives.tar_reading import ArchiveDamagedError, TarReader
from engine.storage.nodes import Entry
from engine.storage.objects import Objects
from engine.trees.directory import walk
from engine.trees.drafts import ArchiveRefusedError
from tests.engine.planted import trees
from tests.engine.plants import Garden, Leaf
from tests.engine.test_tar import END, HOSTILE, member
from tests.engine.trees import of_directory, of_entry

many = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def read(path: Path, image: str | None = None) -> tuple[Garden, Entry]:
    garden = Garden()
    reader = TarReader(garden.sink, garden.nodes, layered=True)
    read_image(str(path), reader, image=image)
    root = reader.draft.build(garden.nodes)
    garden.save()
    return garden, root


@given(st.lists(trees(), min_size=1, max_size=3))
@many
def test_states_come_back_as_the_last_one(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("oci") / "image"
    garden = Garden()
    states = [(str(number), tree(garden)) for number, tree in enumerate(drawn)]
    report = write_image(garden.objects, states, str(path))
    assert len(report.layers) == len(states)
    again = write_image(garden.objects, states, str(path) + "2")
    assert again == report
    fresh, root = read(path)
    assert of_entry(fresh.objects, root) == of_entry(garden.objects, states[-1][1])
    assert root == states[-1][1]
    shutil.rmtree(path.parent)


def test_a_layer_has_the_difference_and_whiteouts(tmp_path: Path):
    garden = Garden()
    old = garden.plant({b"a/gone": Leaf(b"1"), b"a/kept": Leaf(b"2"), b"dir/x": Leaf(b"3"),
                        b"same/y": Leaf(b"4")})  # fmt: skip
    new = garden.plant({b"a/kept": Leaf(b"2"), b"a/new": Leaf(b"5"), b"dir": Leaf(b"file"),
                        b"same/y": Leaf(b"4")})  # fmt: skip
    report = write_image(garden.objects, [("0", old), ("1", new)], str(tmp_path / "image"))
    blob = tmp_path / "image/blobs/sha256" / report.layers[1].removeprefix("sha256:")
    with tarfile.open(blob) as archive:
        assert archive.getnames() == [".", "a", "a/.wh.gone", "a/new", "dir"]


def test_a_session_is_a_layer_for_each_of_its_own(repository: Repository, tmp_path: Path):
    ids = []
    for number in range(3):
        tree = tmp_path / f"layer{number}"
        (tree / "shared").mkdir(parents=True)
        (tree / "shared" / str(number)).write_text(str(number))
        (tree / "top").write_text(str(number))
        ids.append(repository.resolve(
            repository.import_directory(str(tree), ref=f"l{number}").snapshot.hex()))  # fmt: skip
    session = repository.sessions.create("s", tuple(ids))
    upper = tmp_path / "store" / "sessions" / session.uid / f"upper.{session.generation}"
    (upper / "new").write_text("new")
    os.setxattr(upper, "user.x", b"1")
    with repository.tree("@s") as root:
        report = repository.export_oci(repository.layers_of("@s"), root, str(tmp_path / "image"))
    assert len(report.layers) == 4
    result = repository.import_oci(str(tmp_path / "image"), ref="back")
    assert result.root == root
    repository.check_out(result.root, str(tmp_path / "out"))
    assert {*of_directory(tmp_path / "out")} == {
        b"", b"new", b"shared", b"shared/0", b"shared/1", b"shared/2", b"top"
    }  # fmt: skip
    repository.collect()
    assert repository.verify().damage == []


# Images that others make.


def blob(path: Path, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (path / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def image(path: Path, *layers: bytes, **index: Any) -> Path:
    manifest = {"layers": [blob(path, layer + END) for layer in layers]}
    made = blob(path, json.dumps(manifest).encode())
    (path / "index.json").write_text(json.dumps({"manifests": [made], **index}))
    return path


def seen(path: Path) -> set[bytes]:
    garden, root = read(path)
    return {path for path, _ in walk(garden.objects, root)}


def test_whiteouts(tmp_path: Path):
    lower = (
        member("d/a") + member("d/b") + member("e/a") + member("e/s/x") + member("f/x")
        + member("g") + member("h", tarfile.SYMTYPE, linkname="/etc")
    )  # fmt: skip
    upper = (
        member("d/.wh.a") + member("d/c")  # one name
        + member("e/new") + member("e/s/y") + member("e/.wh..wh..opq")  # all that is below
        + member("f/y") + member(".wh.f")  # whatever the order
        + member(".wh.nothing") + member("no/.wh.nothing") + member(".wh..wh.plnk")
        + member("g/in") + member("h", tarfile.DIRTYPE) + member("h/in")  # others' place taken
    )  # fmt: skip
    assert seen(image(tmp_path / "i", lower, upper)) == {
        b"d", b"d/b", b"d/c", b"e", b"e/new", b"e/s", b"e/s/y", b"f", b"f/y",
        b"g", b"g/in", b"h", b"h/in",
    }  # fmt: skip


def test_a_file_in_place_of_a_directory_below(tmp_path: Path):
    assert seen(image(tmp_path / "i", member("d/a") + member("d/b/c"), member("d"))) == {b"d"}


def test_a_hard_link_to_what_a_lower_layer_has(tmp_path: Path):
    upper = member("b", tarfile.LNKTYPE, linkname="a")
    garden, root = read(image(tmp_path / "i", member("a", data=b"x"), upper))
    found = of_entry(garden.objects, root)
    assert found[b"b"].names == (b"a", b"b")


BELOW = {"absolute", "absolute directory", "hard link to itself"}


@pytest.mark.parametrize("case", sorted(HOSTILE.keys() - BELOW))
def test_hostile_members(tmp_path: Path, case: str):
    data = HOSTILE[case]
    with pytest.raises(ArchiveRefusedError):
        read(image(tmp_path / "i", member("x"), data))


def test_absolute_names_are_below_the_root(tmp_path: Path):
    """As kaniko and umoci write them; the target of a symbolic link is what it says."""
    lower = (
        member("/", tarfile.DIRTYPE) + member("/etc/passwd", data=b"x") + member("//a/b")
        + member("/same", tarfile.LNKTYPE, linkname="/etc/passwd")
        + member("l", tarfile.SYMTYPE, linkname="/etc/passwd")
    )  # fmt: skip
    garden, root = read(image(tmp_path / "i", lower, member("/a/.wh.b") + member("/a/c")))
    found = of_entry(garden.objects, root)
    assert found.keys() == {b"", b"etc", b"etc/passwd", b"a", b"a/c", b"same", b"l"}
    assert found[b"same"].names == (b"etc/passwd", b"same")
    assert found[b"l"].data == b"/etc/passwd"
    for name in ("/../x", "/a/../../x"):
        with pytest.raises(ArchiveRefusedError, match="leads out"):
            read(image(tmp_path / name.replace("/", "_"), member(name)))


def test_attestations_are_no_images(tmp_path: Path):
    path = image(tmp_path / "i", member("a"))
    (one,) = json.loads((path / "index.json").read_text())["manifests"]
    other = blob(path, json.dumps({"layers": [
        {**blob(path, b"{}"), "mediaType": "application/vnd.in-toto+json"}
    ]}).encode())  # fmt: skip
    unknown = {"os": "unknown", "architecture": "unknown"}
    kind = {"vnd.docker.reference.type": "attestation-manifest"}
    index(path, {"manifests": [
        {**one, "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}},
        {**other, "platform": unknown, "annotations": kind},
        {**other, "artifactType": "application/vnd.dev.cosign.artifact.sig.v1+json"},
    ]})  # fmt: skip
    garden = Garden()
    reader = TarReader(garden.sink, garden.nodes, layered=True)
    read_image(str(path), reader, image="@linux/arm/v7")
    assert reader.report.left_out == {"attestation": 2}
    index(path, {"manifests": [other]})
    with pytest.raises(ImageRefusedError, match=r"in-toto\+json' is no layer of files"):
        read(path)


def test_images_without_names_are_chosen_by_digest(tmp_path: Path):
    path = image(tmp_path / "i", member("a"))
    (one,) = json.loads((path / "index.json").read_text())["manifests"]
    image(path, member("b"))
    (two,) = json.loads((path / "index.json").read_text())["manifests"]
    index(path, {"manifests": [one, two]})
    with pytest.raises(ImageChoiceError, match=one["digest"]):
        read(path)
    assert [each for each, _ in walk(*_tree(path, two["digest"]))] == [b"b"]


def _tree(path: Path, name: str) -> tuple[Objects, Entry]:
    garden, root = read(path, name)
    return garden.objects, root


@pytest.mark.parametrize("name", [".wh..", ".wh...", "../.wh.x", "/.wh.x", "a/../.wh.x"])
def test_hostile_whiteouts(tmp_path: Path, name: str):
    lower = member("a/x")
    try:
        assert seen(image(tmp_path / "i", lower, member(name))) == {b"a", b"a/x"}
    except ArchiveRefusedError:
        pass


def index(path: Path, value: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "index.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


HEX = "0" * 64
WRONG: list[Any] = [
    "", "[]", "{", "[" * 100_000, {}, {"manifests": {}}, {"manifests": []}, {"manifests": [1]},
    {"manifests": [{"digest": 5, "size": 1}]},
    {"manifests": [{"digest": "sha256:../../../../etc/passwd", "size": 1}]},
    {"manifests": [{"digest": f"sha512:{HEX}", "size": 1}]},
    {"manifests": [{"digest": f"sha256:{HEX}", "size": -1}]},
    {"manifests": [{"digest": f"sha256:{HEX}", "size": True}]},
    {"manifests": [{"digest": f"sha256:{HEX}", "size": 1}]},
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_wrong_indexes(tmp_path: Path, value: Any):
    with pytest.raises(ImageRefusedError):
        read(index(tmp_path / "i", value))


def test_no_layout(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ImageRefusedError):
            read(path)


def test_indexes_that_name_each_other_deeply(tmp_path: Path):
    path = image(tmp_path / "i", member("a"))
    inner = json.loads((path / "index.json").read_text())
    for depth in range(8):
        found = blob(path, json.dumps(inner).encode())
        inner = {"manifests": [{**found, "mediaType": "application/vnd.oci.image.index.v1+json"}]}
        index(path, inner)
        if depth < 3:
            assert seen(path) == {b"a"}
    with pytest.raises(ImageRefusedError, match="too deeply"):
        read(path)


def test_one_of_several_images(tmp_path: Path):
    path = image(tmp_path / "i", member("a"))
    (one,) = json.loads((path / "index.json").read_text())["manifests"]
    image(path, member("b"))
    (two,) = json.loads((path / "index.json").read_text())["manifests"]
    name = "org.opencontainers.image.ref.name"
    index(path, {"manifests": [{**one, "annotations": {name: "one"}},
                               {**two, "annotations": {name: "two"}}]})  # fmt: skip
    with pytest.raises(ImageRefusedError, match="there are: one, two"):
        read(path)
    garden, root = read(path, "two")
    assert [each for each, _ in walk(garden.objects, root)] == [b"b"]


SPOILS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"!"),
    "gone": lambda path: path.unlink(),
    "a link": lambda path: (shutil.copy(path, "x" + path.name), path.unlink(),
                            path.symlink_to(os.path.abspath("x" + path.name))),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_blobs_that_are_not_what_they_should_be(tmp_path: Path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    clean = image(tmp_path / "i", member("a", data=b"x" * 1000))
    for number, name in enumerate(sorted(os.listdir(clean / "blobs/sha256"))):
        path = tmp_path / f"i{number}"
        shutil.copytree(clean, path)
        spoil(path / "blobs/sha256" / name)
        with pytest.raises((ImageRefusedError, ImageDamagedError)):
            read(path)


def test_a_layer_that_is_no_archive(tmp_path: Path, repository: Repository):
    path = image(tmp_path / "i", member("a"), b"noise" * 1000)
    with pytest.raises(ArchiveDamagedError):
        repository.import_oci(str(path))
    assert repository.snapshots() == []


def test_what_an_image_cannot_say(tmp_path: Path):
    garden = Garden()
    root = garden.plant({b"d/.wh.x": Leaf(b"")})
    with pytest.raises(ImageRefusedError, match="whiteout"):
        write_image(garden.objects, [("0", root)], str(tmp_path / "image"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ImageRefusedError, match="not an empty directory"):
        write_image(garden.objects, [("0", root)], str(tmp_path / "full"))
    assert sorted(os.listdir(tmp_path)) == ["full"]


def test_a_layer_may_be_plain_or_compressed_by_anything(tmp_path: Path):
    import zstandard

    packed = zstandard.ZstdCompressor().compress(member("a", data=b"x" * 1000) + END)
    manifest = {"layers": [blob(tmp_path, packed)]}
    index(tmp_path, {"manifests": [blob(tmp_path, json.dumps(manifest).encode())]})
    assert seen(tmp_path) == {b"a"}
    assert io.BytesIO(packed).read(4) == b"\x28\xb5\x2f\xfd"
