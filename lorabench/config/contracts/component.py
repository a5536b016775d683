"""What models, tasks and methods have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lorabench.config.fields import Section

__all__ = ["Component", "attribute"]

if TYPE_CHECKING:
    from builtins import property as attribute
else:

    class attribute:
        """A read-only attribute whose default a field, a class variable or a property of a subclass may replace.

        A plain `property` would not do: it refuses the value that a dataclass field sets, and a dataclass would take it
        for the field's default. Asked of the class, it raises `AttributeError`: only an instance knows.
        """

        def __init__(self, compute: Any) -> None:
            self.compute, self.__doc__ = compute, compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                raise AttributeError(self.name)
            return self.compute(instance)


@dataclass(frozen=True)
class Component(Section):
    """One section of a run's config, in a file of its own: a frozen dataclass `Config` that inherits a contract.

    The fields of the dataclass are the section's settings. What is not a field there is neither part of a `run_id` nor
    of a record, so a contract has no fields.
    """

    local_file: ClassVar[str | None] = None
    """The user's own Python file that defines the class. None: it is one of the package's own."""

    def replace(self, **settings: Any) -> Self:
        """Return a copy with other settings. Raises `TypeError` for a name that is no setting of the class."""
        return dataclasses.replace(self, **settings)
