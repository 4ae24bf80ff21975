"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ProperFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Names = list[str]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false where a number is meant: they would be read as 1 and 0."""
        held = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in held):
            types = _leaves(cls.model_fields[str(info.field_name)].annotation)
            if not {bool, Any} & types:
                wanted = {"wanted": "a number" if {int, float} & types else "text"}
                message = "true and false are not values here"
                raise PydanticCustomError("not_a_truth_value", message, wanted)
        return value


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _leaves(annotation: Any) -> set[Any]:
    """The types at the ends of an annotation: {int, float} of ``list[int | tuple[float, ...]]``."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation}
    return {leaf for argument in arguments for leaf in _leaves(argument) if leaf is not Ellipsis}
