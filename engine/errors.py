"""Errors that more than one module of the engine raises, and the base of them all.

An error says whose fault it is by its class and carries its facts as fields; the message is
one sentence without a hint. Hints and exit codes belong to the command line, errnos to the
driver: each keeps one table, and a test fails when a class has no row there.
"""

_OF_THE_SYSTEM = ("errno", "strerror", "filename", "filename2")
"""What an OSError keeps beside its fields."""


class EngineError(Exception):
    """Base of every error that the engine raises on purpose.

    Errors can be pickled and copied, with message, fields and notes: other processes report them.
    """

    def __reduce__(self) -> tuple[object, ...]:
        # Python's own way calls the class with the message, which is not what ours are made of.
        system = {name: getattr(self, name, None) for name in _OF_THE_SYSTEM}
        given = {name: value for name, value in system.items() if value is not None}
        return _made_again, (type(self), self.args, vars(self) | given)


def _made_again(
    cls: type[EngineError], args: tuple[object, ...], facts: dict[str, object]
) -> EngineError:
    error = cls.__new__(cls)
    error.args = args
    for name, value in facts.items():
        setattr(error, name, value)
    return error


class InvalidNameError(EngineError):
    """A name that the user gave cannot be used."""

    def __init__(self, kind: str, name: str, why: str) -> None:
        super().__init__(f"{name!r} cannot name a {kind}: {why}")
        self.kind, self.name, self.why = kind, name, why


class NotFoundError(EngineError):
    """Nothing in the store has the name that the user gave."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} is called {name!r}")
        self.kind, self.name = kind, name


class AmbiguousIdError(EngineError):
    """A shortened id fits several snapshots."""

    def __init__(self, prefix: str, candidates: list[str]) -> None:
        super().__init__(
            f"{prefix!r} fits {len(candidates)} snapshots: {', '.join(candidates[:4])}"
        )
        self.prefix, self.candidates = prefix, candidates


class NameTakenError(EngineError):
    """A name is in use already."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"a {kind} called {name!r} exists already")
        self.kind, self.name = kind, name


class InUseError(EngineError):
    """Something cannot be changed or removed because something else needs it."""

    def __init__(self, what: str, by: str) -> None:
        super().__init__(f"{what} is in use by {by}")
        self.what, self.by = what, by


class CorruptObjectError(EngineError):
    """An object's bytes are not what its id or its format promises."""

    def __init__(self, kind: str, identifier: bytes, why: str) -> None:
        super().__init__(f"{kind} {identifier.hex()} is corrupt: {why}")
        self.kind, self.identifier, self.why = kind, identifier, why


class MissingObjectError(CorruptObjectError):
    """An object that something refers to is not in the store."""

    def __init__(self, kind: str, identifier: bytes) -> None:
        super().__init__(kind, identifier, "it is not in the store")
