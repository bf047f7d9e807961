"""Records in SQLite: what outlives the service, as dataclasses."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

Record = TypeVar("Record")

_PLAIN = frozenset({str, int, float, bool, bytes, NoneType})  # types of SQLite's own; others are stored as JSON


class Records:
    """Tables of one SQLite file, each of one dataclass, whose fields are its columns.

    Thread-safe; a change is whole or not at all.
    """

    def __init__(self, file: Path, schema: str, tables: Mapping[type, str]):
        """schema: makes the tables where they are not there yet; tables: their names by their records' classes."""
        self._tables = tables
        self._columns: dict[type, dict[str, bool]] = {kind: _columns(kind) for kind in tables}
        self._database = sqlite3.connect(file, check_same_thread=False)
        self._lock = threading.Lock()
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.executescript(schema)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def put(self, *records: object) -> None:
        """Record all of these, in the place of those with the same key."""
        with self._writing():
            for record in records:
                values = {name: _stored(getattr(record, name)) for name in self._columns[type(record)]}
                names, places = ", ".join(values), ", ".join("?" * len(values))
                self._database.execute(
                    f"INSERT OR REPLACE INTO {self._tables[type(record)]} ({names}) VALUES ({places})",
                    tuple(values.values()),
                )

    def all(self, kind: type[Record], order: str = "rowid", /, **equal: object) -> list[Record]:
        """The records of a kind with these values."""
        columns = self._columns[kind]
        where = " AND ".join(f"{name} IS ?" for name in equal) or "TRUE"
        with self._lock:
            rows = self._database.execute(
                f"SELECT {', '.join(columns)} FROM {self._tables[kind]} WHERE {where} ORDER BY {order}",
                tuple(equal.values()),
            ).fetchall()
        return [msgspec.convert(_read(row, columns), kind, strict=False) for row in rows]

    def one(self, kind: type[Record], /, **equal: object) -> Record | None:
        return next(iter(self.all(kind, **equal)), None)

    def change(self, kind: type[Any], values: Mapping[str, object], /, **equal: object) -> None:
        """Set columns of the records with these values."""
        settings, where = (
            ", ".join(f"{name} = ?" for name in values),
            " AND ".join(f"{name} IS ?" for name in equal),
        )
        with self._writing():
            self._database.execute(
                f"UPDATE {self._tables[kind]} SET {settings} WHERE {where}",
                (*map(_stored, values.values()), *equal.values()),
            )

    def remove(self, kind: type[Any], /, **equal: object) -> None:
        where = " AND ".join(f"{name} IS ?" for name in equal) or "TRUE"
        with self._writing():
            self._database.execute(f"DELETE FROM {self._tables[kind]} WHERE {where}", tuple(equal.values()))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._database:
            yield


def _columns(kind: Any) -> dict[str, bool]:
    """Column -> whether it is JSON."""
    hints = get_type_hints(kind)
    return {each.name: not _is_plain(hints[each.name]) for each in fields(kind)}


def _is_plain(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return all(type(value) in _PLAIN for value in get_args(hint))
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return all(part in _PLAIN for part in parts)


def _stored(value: object) -> object:
    if type(value) in _PLAIN:
        return int(value) if isinstance(value, bool) else value
    return msgspec.json.encode(value).decode()


def _read(row: tuple[Any, ...], columns: Mapping[str, bool]) -> dict[str, Any]:
    return {
        name: msgspec.json.decode(value) if is_json and value is not None else value
        for (name, is_json), value in zip(columns.items(), row, strict=True)
    }
