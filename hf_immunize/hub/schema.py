"""Typed JSON without further dependencies: dataclasses to plain values and back, unknown fields kept."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_immunize.errors import RecordError


T = TypeVar("T")
# Name of the field of every class here that holds what this version does not know.
UNKNOWN = "unknown"
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def to_plain(value: Any) -> Any:
    """Dataclasses as dictionaries, with their unknown fields where they were found.

    Args:
        value: A dataclass, or anything JSON knows.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None.

    Raises:
        RecordError: If a number is not finite, or a value is of another type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {
            item.name: to_plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.name != UNKNOWN
        }
        return {**plain, **to_plain(getattr(value, UNKNOWN, {}))}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value, "a text")
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise RecordError(f"Expected text, finite numbers and lists of them in a record, found {value!r}. Leave it out.")


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """Read a dataclass from a dictionary, checking the type of every field.

    Args:
        kind: The dataclass.
        value: What was read from JSON.
        where: What to call it in an error.

    Returns:
        The dataclass; fields it does not know are in its field ``unknown``.

    Raises:
        RecordError: If a field is missing or of another type; the message names it.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: float
        ...     name: str | None = None
        ...     unknown: dict[str, Any] = dataclasses.field(default_factory=dict)
        >>> point = from_plain(Point, {"x": 1, "colour": "red"}, "point")
        >>> point, to_plain(point)
        (Point(x=1.0, name=None, unknown={'colour': 'red'}), {'x': 1.0, 'name': None, 'colour': 'red'})
    """
    if not isinstance(value, dict):
        raise _unexpected(where, "names and values", value)
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name != UNKNOWN}
    known = {item.name: item for item in dataclasses.fields(kind) if item.name != UNKNOWN}  # type: ignore[arg-type]
    given = {name: _value(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
    for name, item in known.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if name not in given and not optional:
            raise RecordError(
                f"Expected {where}.{name} in the record, found none. The record is damaged or not whole."
            )
    unknown = {name: _value(Any, item, f"{where}.{name}") for name, item in value.items() if name not in known}
    return kind(**given, **{UNKNOWN: unknown})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _anything(value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, where)
            except RecordError:
                continue
        return _value(options[-1], value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _unexpected(where, "a list", value)
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _unexpected(where, "names and values", value)
        return {_text(key, where): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    return _plain_value(hint, value, where)


def _plain_value(hint: type, value: Any, where: str) -> Any:
    # For Python, True is an int; for a reader of the record it is not.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is int and number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return _text(value, where)
    raise _unexpected(where, _KINDS[hint], value)


def _anything(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {_text(key, where): _anything(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_anything(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _unexpected(where, "a finite number", value)
    return _text(value, where) if isinstance(value, str) else value


def _text(value: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(f"Expected {where} to be Unicode text, found half of a surrogate pair. Correct the text.")
    return value


def _unexpected(where: str, expected: str, value: Any) -> RecordError:
    found = repr(value)
    return RecordError(
        f"Expected {where} to be {expected}, found {found if len(found) <= 60 else found[:57] + '...'}. The record is "
        "damaged, or was not written by this library."
    )
