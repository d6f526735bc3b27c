"""Typed JSON without further dependencies: dataclasses to plain values and back, unknown fields kept."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_immunize.errors import RecordError
from hf_immunize.text import printable


T = TypeVar("T")
# Name of the field of every class here that holds what this version does not know.
UNKNOWN = "unknown"
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
# Bounds of all that a record may hold: what lies beyond is damage, or made to take time and memory.
_DEPTH, _TEXT, _NAME, _ITEMS, _WHOLE = 24, 2**16, 256, 2**16, 2**64


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, both ends among them, as in ``Annotated[float, Range(0, 1)]``.

    Attributes:
        least, most: The ends.
    """

    least: float
    most: float


Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0, 2**53)]
Size = Annotated[float, Range(0, math.inf)]
# Of a condition number of float64 matrices, and of quotients of such.
Log10 = Annotated[float, Range(-10_000, 10_000)]
Log10Kappa = Annotated[float, Range(0, 10_000)]
# What numpy, which draws splits by it, takes for one.
Seed = Annotated[int, Range(0, 2**32 - 1)]


def to_plain(value: Any, depth: int = 0) -> Any:
    """Dataclasses as dictionaries, with their unknown fields where they were found.

    Args:
        value: A dataclass, or anything JSON knows.
        depth: In how many others it lies.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None.

    Raises:
        RecordError: If a number is not finite, or a value is of another type or nested too deep.
    """
    if depth > 2 * _DEPTH:  # what lies within is checked by its own measure when the fields are
        raise _unexpected("a value", f"nested less than {2 * _DEPTH} deep", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {
            item.name: to_plain(getattr(value, item.name), depth + 1)
            for item in dataclasses.fields(value)
            if item.name != UNKNOWN
        }
        return {**plain, **to_plain(getattr(value, UNKNOWN, {}), depth + 1)}
    if isinstance(value, dict):
        return {str(key): to_plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, depth + 1) for item in value]
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
        RecordError: If a field is missing, of another type or out of its range; the message names it.

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
    _check_size(value, where)
    hints = {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name != UNKNOWN}
    known = {item.name: item for item in dataclasses.fields(kind) if item.name != UNKNOWN}  # type: ignore[arg-type]
    given = {name: _value(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
    for name, item in known.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if name not in given and not optional:
            raise RecordError(
                f"Expected {_place(where)}.{name} in the record, found none. The record is damaged or not whole."
            )
    further = {_name(name, where): item for name, item in value.items() if name not in known}
    unknown = {name: _anything(item, f"{where}.{name}") for name, item in further.items()}
    return kind(**given, **{UNKNOWN: unknown})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _anything(value, where)
    if origin is Annotated:
        found, span = _value(arguments[0], value, where), arguments[1]
        if not span.least <= found <= span.most:
            raise _unexpected(where, f"between {span.least} and {span.most}", value)
        return found
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
        _check_size(value, where)
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _unexpected(where, "names and values", value)
        _check_size(value, where)
        return {_name(key, where): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    return _plain_value(hint, value, where)


def _plain_value(hint: type, value: Any, where: str) -> Any:
    # For Python, True is an int; for a reader of the record it is not.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and abs(value) > _WHOLE:
        raise _unexpected(where, f"between -{_WHOLE} and {_WHOLE}", value)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is int and number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return _text(value, where)
    raise _unexpected(where, _KINDS[hint], value)


def _anything(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise _unexpected(where, f"nested less than {_DEPTH} deep", value)
    if isinstance(value, dict | list):
        _check_size(value, where)
    if isinstance(value, dict):
        return {_name(key, where): _anything(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_anything(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _plain_value(type(value), value, where)
    return _text(value, where) if isinstance(value, str) else value


def _name(value: str, where: str) -> str:
    if len(value) > _NAME:
        raise _unexpected(where, f"names of at most {_NAME} characters", value)
    return _text(value, where)


def _text(value: str, where: str) -> str:
    if len(value) > _TEXT:
        raise _unexpected(where, f"at most {_TEXT} characters", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(
            f"Expected {_place(where)} to be Unicode text, found half of a surrogate pair. Correct the text."
        )
    return value


def _check_size(value: dict[Any, Any] | list[Any], where: str) -> None:
    if len(value) > _ITEMS:
        raise RecordError(
            f"Expected at most {_ITEMS} items in {_place(where)} of the record, found {len(value)}. The record is "
            "damaged, or was not written by this library."
        )


def _unexpected(where: str, expected: str, value: Any) -> RecordError:
    return RecordError(
        f"Expected {_place(where)} to be {expected}, found {_shown(value)}. The record is damaged, or was not written "
        "by this library."
    )


def _place(where: str) -> str:
    """Names of fields are as foreign as their values."""
    words = printable(where[:1000])
    return words if len(words) <= 120 else words[:117] + "..."


def _shown(value: Any) -> str:
    """The beginning of a value; of one that is nested or has thousands of digits, what it is."""
    if isinstance(value, dict | list) or (isinstance(value, int) and abs(value) > _WHOLE):
        return f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else "a larger number"
    found = repr(value[:100] if isinstance(value, str) else value)
    return found if len(found) <= 60 else found[:57] + "..."
