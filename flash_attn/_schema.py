"""The arguments of an op by the names of its schema.

The dispatcher passes arguments by position for the most part, and leaves out those that equal their
defaults. What stands behind it asks for the few that it needs by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

NONE_BY_NAME: Mapping[str, Any] = {}


class Schema:
    """The parameters of one op, each with its default, in their order."""

    def __init__(self, op: Any) -> None:
        arguments = op._opoverload._schema.arguments
        self.defaults = {argument.name: argument.default_value for argument in arguments}

    def by_name(
        self, arguments: tuple[Any, ...], named: Mapping[str, Any] = NONE_BY_NAME
    ) -> dict[str, Any]:
        """Every argument of a call, whichever way it came."""
        return self.defaults | dict(zip(self.defaults, arguments, strict=False)) | dict(named)


def fake_of(*ops: Any) -> Callable[[Function], Function]:
    """Makes a function the fake of ops: what a compiler learns of their results.

    The function gets all arguments by name; ``**_others`` takes those that it does not need.
    """

    def register(fake: Function) -> Function:
        for op in ops:
            op.register_fake(_called_by_name(fake, Schema(op)))
        return fake

    return register


def _called_by_name(fake: Callable[..., Any], schema: Schema) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        return fake(**schema.by_name(arguments, named))

    return call
