"""A field of a settings class: default, help text and limits in one place, for all packages and the command line.

A settings class is a dataclass beside the code that it is for, light to import. Its fields are made by `setting`; the
choices of a field are those of its type, a `Literal`. Standard library alone: this is imported by all packages.
"""

import dataclasses
from typing import Any


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
