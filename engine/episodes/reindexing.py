"""Reindexing of episodes: their indexes are made to say what the records say.

A part of repair. An index has nothing that its episode's records do not say, so it needs no other
store. Only episodes are touched whose own record and whose steps can all be read.
"""

from engine.episodes.auditing import EpisodeAudit, episode_names
from engine.episodes.steps import episode_key, holder_in, is_hold, is_sealed, number_at
from engine.storage.store import Db, Store, Writer


def reindex(store: Store) -> int:
    """Puts rows that are missing, removes those that are wrong; returns how many both are."""

    def change(writer: Writer) -> int:
        changed = _put_back(writer)
        held: dict[str, set[bytes]] = {}
        for key in writer.keys(Db.EPISODES, b"\0"):
            if not is_hold(key):
                break
            held.setdefault(holder_in(key)[1], set()).add(key)
        for name in list(episode_names(writer)):
            episode = EpisodeAudit(writer, name)
            for _ in episode.problems(0):
                pass
            if not episode.readable:
                continue
            there = held.get(name, set()) | set(_rows(writer, name))
            for key in sorted(episode.rows - there):
                writer.put(Db.EPISODES, key, b"")
                changed += 1
            for key in sorted(there - episode.rows):
                number = holder_in(key)[2] if is_hold(key) else number_at(key)
                if number is None or _is_wrong(episode, number):
                    changed += writer.delete(Db.EPISODES, key)
        return changed

    return store.write(change)


def _put_back(writer: Writer) -> int:
    """Puts records under the key that their seal fits, if it is one bit from where they stand."""
    moved = 0
    broken = [
        (key, bytes(raw))
        for key, raw in writer.items(Db.EPISODES)
        if len(raw) and not is_sealed(key, raw)
    ]
    for key, raw in broken:
        number = int.from_bytes(key, "big")
        for bit in range(8 * len(key)):
            right = (number ^ 1 << bit).to_bytes(len(key), "big")
            if is_sealed(right, raw):
                writer.delete(Db.EPISODES, key)
                writer.put(Db.EPISODES, right, raw)
                moved += 1
                break
    return moved


def _rows(writer: Writer, name: str) -> list[bytes]:
    prefix = episode_key(name)
    rows = []
    for key in writer.keys(Db.EPISODES, prefix):
        if not key.startswith(prefix):
            break
        if len(key) - len(prefix) == 17 and key[len(prefix)] in b"cr":
            rows.append(key)
    return rows


def _is_wrong(episode: EpisodeAudit, number: int) -> bool:
    """True unless the row may be all that is left of a step that is lost."""
    last = max(episode.numbers, default=0)
    if number < last:
        return number in episode.numbers or last - len(episode.numbers) == episode.removed
    return number != last + 1
