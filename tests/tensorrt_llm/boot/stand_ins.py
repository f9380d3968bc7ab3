"""Inert stand-ins for modules that are compiled or need a GPU.

Any attribute of such a module is a class; any attribute of the class is a class again; instances can be
called, are falsy and empty. Classes and instances can be pickled: they are found again by their names.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, ClassVar


class StandInType(type):
    """A class whose unknown attributes are stand-ins too, made on first use."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = make_class(name, cls.__module__, f"{cls.__qualname__}.{name}")
        setattr(cls, name, value)
        return value

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __len__(cls) -> int:
        return 0

    def __getitem__(cls, _key: object) -> StandInType:
        return cls

    def __int__(cls) -> int:
        return 0

    __index__ = __int__


class StandIn(metaclass=StandInType):
    """An object that takes every call and has every attribute."""

    __members__: ClassVar[dict[str, Any]] = {}

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __call__(self, *_args: object, **_kwargs: object) -> StandIn:
        return StandIn()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(type(self), name)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: object, _handler: object) -> dict[str, Any]:
        return {}


class StandInModule(types.ModuleType):
    """A module whose unknown attributes are stand-ins. ``...Error`` is an exception class."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Stands in for a module that is compiled or needs a GPU.")
        self.__path__: list[str] = []
        self.__version__ = "13.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name.endswith("Error"):
            value: Any = type(name, (Exception,), {"__module__": self.__name__})
        else:
            value = make_class(name, self.__name__, name)
        setattr(self, name, value)
        return value


def make_class(name: str, module: str, qualified_name: str) -> type[StandIn]:
    return StandInType(name, (StandIn,), {"__module__": module, "__qualname__": qualified_name})
