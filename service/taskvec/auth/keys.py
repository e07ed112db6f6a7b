"""API keys: known by the SHA-256 of their secrets, read from a TOML file and the environment."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taskvec.errors import StartError
from taskvec.priority import Priority

NO_KEY = "none"
"""What logs and metrics call requests without a valid key; no key may have this name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = 8
"""Bytes of a digest by which a key is found; the whole digest then decides."""


class KeyLimits(NamedTuple):
    """What a key may have; 0 for no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """A key that may ask.

    Attributes:
        name: what logs and metrics call it.
        digest: SHA-256 of its secret, 32 bytes.
    """

    name: str
    digest: bytes = field(repr=False)
    limits: KeyLimits
    priority: Priority = Priority.INTERACTIVE


class KeyRing:
    """The keys in force."""

    def __init__(self, keys: Iterable[Key]) -> None:
        """Collect the keys.

        Raises:
            StartError: two keys share a name or a secret.
        """
        self._by_prefix: dict[bytes, Key] = {}
        names: set[str] = set()
        for key in keys:
            if key.name in names:
                raise StartError(f"Two API keys have the name {key.name}: rename one.")
            names.add(key.name)
            twin = self._by_prefix.setdefault(key.digest[:_PREFIX], key)
            if twin is not key:
                raise StartError(
                    f"The API keys {twin.name} and {key.name} have the same secret: make a new one "
                    f"with `taskvec key {key.name}`."
                )
        self.names = frozenset(names)

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret; None where there is none."""
        digest = hashlib.sha256(secret).digest()
        key = self._by_prefix.get(digest[:_PREFIX])
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None


class KeySource(NamedTuple):
    """Where the keys are.

    Attributes:
        file: TOML with a [[keys]] entry each; None for no file.
        pairs: ``name=secret`` pairs, separated by commas; empty for none.
        defaults: the limits of keys that state none.
    """

    file: Path | None
    pairs: str
    defaults: KeyLimits

    def read(self) -> KeyRing:
        """All keys.

        Raises:
            StartError: the file cannot be read, or an entry is wrong: it names the line or entry.
        """
        keys = [
            Key(name, hashlib.sha256(secret.encode()).digest(), self.defaults)
            for name, secret in read_pairs(self.pairs)
        ]
        return KeyRing(
            keys if self.file is None else [*keys, *_read_file(self.file, self.defaults)]
        )

    def stamp(self) -> tuple[int, ...] | None:
        """Changes when the file does, also where a link to it is swapped; None while it is gone."""
        if self.file is None:
            return None
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Names and secrets out of ``name=secret,name=secret``.

    Raises:
        ValueError: an entry is no such pair; says which, and never what it holds.
    """
    pairs = []
    for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        name, _, secret = entry.partition("=")
        if not is_name(name) or not secret.isascii() or not secret.isprintable() or not secret:
            raise ValueError(
                f"entry {number} is not name=secret, with a name of letters, digits, dots, dashes "
                "and underscores and a secret of visible characters"
            )
        pairs.append((name, secret))
    return pairs


def is_name(text: str) -> bool:
    """Whether a key may be called so."""
    return _NAME.fullmatch(text) is not None and text != NO_KEY


class _Entry(BaseModel):
    """One [[keys]] of the file."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{64}$")]
    requests_per_minute: Annotated[int | None, Field(ge=0, strict=True)] = None
    tokens_per_minute: Annotated[int | None, Field(ge=0, strict=True)] = None
    concurrency: Annotated[int | None, Field(ge=0, strict=True)] = None
    priority: Priority = Priority.INTERACTIVE


def _read_file(file: Path, defaults: KeyLimits) -> list[Key]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartError(f"The keys file {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise StartError(f"The keys file {file} is not valid TOML: {error}.") from None
    entries = content.get("keys")
    if set(content) != {"keys"} or not isinstance(entries, list) or not entries:
        raise StartError(
            f"The keys file {file} must have [[keys]] entries and nothing else: `taskvec key NAME` "
            "prints one."
        )
    return [_key(file, n, entry, defaults) for n, entry in enumerate(entries, start=1)]


def _key(file: Path, number: int, content: Any, defaults: KeyLimits) -> Key:
    try:
        entry = _Entry.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "it"
        raise StartError(
            f"The keys file {file}, entry {number}: {place}: {fault['msg']}; `taskvec key NAME` "
            "prints an entry."
        ) from None
    if not is_name(entry.name):
        raise StartError(
            f"The keys file {file}, entry {number}: name must be 1 to 64 letters, digits, dots, "
            f"dashes and underscores, and not {NO_KEY}."
        )
    stated = [entry.requests_per_minute, entry.tokens_per_minute, entry.concurrency]
    limits = [
        default if own is None else own for own, default in zip(stated, defaults, strict=True)
    ]
    return Key(entry.name, bytes.fromhex(entry.sha256), KeyLimits(*limits), entry.priority)


LOOK_EVERY = 2.0
"""Seconds between two looks at the file."""

log = structlog.get_logger(__name__)


class WatchedKeys:
    """The keys in force; of a file that turned bad, those that it had before."""

    def __init__(self, source: KeySource, on_change: Callable[[frozenset[str]], None]) -> None:
        """Read the keys.

        Args:
            source: where they are.
            on_change: told the names of the keys, now and whenever they change.

        Raises:
            StartError: they cannot be read.
        """
        self._source = source
        self._on_change = on_change
        self._stamp = source.stamp()
        self._ring = source.read()
        on_change(self._ring.names)

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret; None where there is none."""
        return self._ring.find(secret)

    async def watch(self) -> None:
        """Look at the file every now and then; until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        stamp = self._source.stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            ring: KeyRing = self._source.read()
        except StartError as error:
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 - one sentence says it
            return
        self._ring = ring
        self._on_change(ring.names)
        log.info("keys_reloaded", keys=len(ring.names))
