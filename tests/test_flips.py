"""scripts/flips, in a short form: one flip of each kind that once ended a process."""

import pytest

from scripts import flips_main
from scripts.flips_main import Flipping, choose, make, places

COMMANDS = ["verify", "import"]


@pytest.fixture(scope="module")
def flipping(tmp_path_factory: pytest.TempPathFactory) -> Flipping:
    home = str(tmp_path_factory.mktemp("flips"))
    make(home)
    return Flipping(home, COMMANDS, repair=True)


@pytest.mark.parametrize("kind", ["meta", "header", "pointers"])
def test_no_flip_ends_a_process_or_goes_unseen(flipping: Flipping, kind: str):
    where = places(flipping.data)[kind]
    number = list(flips_main.KINDS).index(kind)
    flipping.flip(kind, where[len(where) // 5], number % 5)
    assert flipping.wrong == []
    assert sum(flipping.table.values()) >= len(COMMANDS)


def test_flips_are_the_same_each_time(flipping: Flipping):
    data = flipping.data
    assert choose(data, 50, 3) == choose(data, 50, 3)
    assert {kind for kind, _, _ in choose(data, 200, 3)} == {*flips_main.KINDS, "anywhere"}
