"""API keys, identified by the SHA-256 of their secrets; read from a TOML file and the environment.

From the parts to the whole: ``Key``, ``KeySet`` (look-up by secret), ``KeySource`` (reads a set),
``WatchedKeys`` (the current set, read again when the file changes).
"""

from __future__ import annotations

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
from taskvec.file_watch import FileWatch
from taskvec.permissions import read_failure
from taskvec.priority import Priority

NO_KEY = "none"
"""Name in logs and metrics of requests without a valid key; reserved, so no key may have it."""

PREFIX_BYTES = 8
"""Bytes of a digest that index the keys; the whole digest is then compared in constant time."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_EMPTY_DIGEST = hashlib.sha256(b"").digest()

log = structlog.get_logger(__name__)


class KeyLimits(NamedTuple):
    """Limits of a key; 0 means unlimited."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """One API key.

    Attributes:
        name: its name in logs and metrics.
        digest: SHA-256 of its secret, 32 bytes.
        limits: its limits.
        priority: priority class of its requests.
    """

    name: str
    digest: bytes = field(repr=False)
    limits: KeyLimits
    priority: Priority = Priority.INTERACTIVE


class KeySet:
    """Set of keys, searched by secret."""

    def __init__(self, keys: Iterable[Key]) -> None:
        """Index the keys.

        Raises:
            StartError: two keys have the same name or the same secret.
        """
        self._by_prefix: dict[bytes, Key] = {}
        names: set[str] = set()
        for key in keys:
            if key.name in names:
                raise StartError(f"Two API keys have the name {key.name}: rename one.")
            names.add(key.name)
            other = self._by_prefix.setdefault(key.digest[:PREFIX_BYTES], key)
            if other is not key:
                raise StartError(
                    f"The API keys {other.name} and {key.name} have the same secret: make a new "
                    f"one with `taskvec key {key.name}`."
                )
        self.names = frozenset(names)

    def find(self, secret: bytes) -> Key | None:
        """Return the key with this secret, or None."""
        digest = hashlib.sha256(secret).digest()
        key = self._by_prefix.get(digest[:PREFIX_BYTES])
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None


class KeySource(NamedTuple):
    """Where keys are configured.

    Attributes:
        file: TOML file with one [[keys]] entry per key; None if not configured.
        pairs: ``name=secret`` pairs, separated by commas; may be empty.
        defaults: limits of keys that state none.
    """

    file: Path | None
    pairs: str
    defaults: KeyLimits

    def read(self) -> KeySet:
        """Read all keys.

        Raises:
            StartError: the file cannot be read or an entry is invalid; the message names the line
                or the entry.
        """
        keys = [
            Key(name, hashlib.sha256(secret.encode()).digest(), self.defaults)
            for name, secret in read_pairs(self.pairs)
        ]
        return KeySet(keys if self.file is None else [*keys, *_read_file(self.file, self.defaults)])


class WatchedKeys:
    """The current keys, read again when the file changes.

    If the changed file is invalid, the previous keys stay in force.
    """

    def __init__(self, source: KeySource, on_change: Callable[[frozenset[str]], None]) -> None:
        """Read the keys.

        Args:
            source: where the keys are configured.
            on_change: called with the names of the keys, now and after each change.

        Raises:
            StartError: the keys cannot be read.
        """
        self._source = source
        self._on_change = on_change
        self._files = FileWatch([] if source.file is None else [source.file], self._read_again)
        self._keys = source.read()
        on_change(self._keys.names)

    def find(self, secret: bytes) -> Key | None:
        """Return the key with this secret, or None."""
        return self._keys.find(secret)

    async def watch(self) -> None:
        """Read the keys again whenever the file changes, until cancelled."""
        await self._files.watch()

    def ask(self) -> None:
        """Let ``watch`` read the keys at once."""
        self._files.ask()

    def reload(self) -> None:
        """Read the keys again if the file has changed."""
        self._files.check()

    def _read_again(self) -> None:
        try:
            keys = self._source.read()
        except StartError as error:
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 - the reason suffices
            return
        except Exception as error:
            log.exception("keys_not_reloaded", reason=f"unexpected {type(error).__name__}")
            return
        self._keys = keys
        self._on_change(keys.names)
        log.info("keys_reloaded", keys=len(keys.names))


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Parse ``name=secret,name=secret`` into names and secrets.

    Raises:
        ValueError: an entry is invalid; the message has its number and never its content.
    """
    pairs = []
    for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        name, _, secret = entry.partition("=")
        if not is_name(name) or not secret.isascii() or not secret.isprintable() or not secret:
            raise ValueError(
                f"entry {number} is not name=secret, with a name of letters, digits, dots, dashes "
                "and underscores and a secret of printable ASCII characters"
            )
        pairs.append((name, secret))
    return pairs


def is_name(text: str) -> bool:
    """Return whether the text is a valid name for a key."""
    return _NAME.fullmatch(text) is not None and text != NO_KEY


class _Entry(BaseModel):
    """Schema of a [[keys]] entry."""

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
        reason = read_failure(file, error)
        raise StartError(f"The keys file {file} cannot be read: {reason}.") from None
    except ValueError as error:
        raise StartError(f"The keys file {file} is not valid TOML: {error}.") from None
    except RecursionError:
        raise StartError(f"The keys file {file} is nested too deeply.") from None
    entries = content.get("keys")
    if set(content) != {"keys"} or not isinstance(entries, list) or not entries:
        raise StartError(
            f"The keys file {file} must have [[keys]] entries and nothing else: `taskvec key NAME` "
            "prints one."
        )
    return [_read_entry(file, n, entry, defaults) for n, entry in enumerate(entries, start=1)]


def _read_entry(file: Path, number: int, content: Any, defaults: KeyLimits) -> Key:
    try:
        entry = _Entry.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "the entry"
        raise StartError(
            f"The keys file {file}, entry {number}: {field_name}: {first['msg']}; `taskvec key "
            "NAME` prints an entry."
        ) from None
    if not is_name(entry.name):
        raise StartError(
            f"The keys file {file}, entry {number}: name must be 1 to 64 letters, digits, dots, "
            f"dashes and underscores, and not {NO_KEY}."
        )
    if bytes.fromhex(entry.sha256) == _EMPTY_DIGEST:
        raise StartError(
            f"The keys file {file}, entry {number}: sha256 is that of an empty secret, with which "
            "everybody would have access; `taskvec key NAME` prints an entry."
        )
    stated = [entry.requests_per_minute, entry.tokens_per_minute, entry.concurrency]
    limits = [
        default if own is None else own for own, default in zip(stated, defaults, strict=True)
    ]
    return Key(entry.name, bytes.fromhex(entry.sha256), KeyLimits(*limits), entry.priority)
