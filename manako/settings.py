"""A field of a settings class: default, help text and limits in one place, for all packages and the command line.

A settings class is a dataclass beside the code that it is for, light to import. Its fields are made by `setting`; the
choices of a field are those of its type, a `Literal`. Light: this is imported by all packages.
"""

import dataclasses
import typing
from typing import Any

from manako.bounded import shown


def setting(default: Any, help: str, *, only_in_file: bool = False, is_path: bool = False, **limits: float) -> Any:
    """Makes the field of a settings class.

    Args:
        default: its default, in Python, in files and on the command line.
        help: what it is, in half a line.
        only_in_file: it is rarely turned: a --config file has it, the command line has no flag for it.
        is_path: it names a file or folder, or may.
        limits: ge, gt, le, lt.

    Returns:
        The dataclass field.
    """
    about = {"help": help, "limits": limits, "only_in_file": only_in_file, "is_path": is_path}
    return dataclasses.field(default=default, metadata=about)


def check_settings(settings: Any) -> None:
    """Checks the types and limits of all settings of a section that a file has brought.

    Raises:
        ValueError: the first that does not fit, in words.
    """
    from pydantic import Field, TypeAdapter, ValidationError

    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if value is None and type(None) in typing.get_args(hint):
            continue
        options: dict[str, Any] = dict(field.metadata["limits"])
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
            TypeAdapter(typing.Annotated[Any, Field(**options)]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{field.name} is {shown(value)}") from error
