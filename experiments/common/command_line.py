"""How the runners read settings and report bad input.

A runner's settings are one dataclass whose fields are sections (`section`), and a section is a settings class that lies
beside the code that it is for: `EnvSettings`, `PolicySource`, `PPOSettings` and so on. A YAML file (`--config`, and the
config.yaml of a run) holds the sections; the command line holds their settings as flat flags, in a group for each
section. argparse is given the fields as they are: trl.TrlParser would spell every flag twice, has no settings for files
alone, and lets `2.5`, `-3` and `true` of a file through for a whole number. Every value is checked for type and range.
Anything wrong ends in one sentence on stderr and exit code 2. Nothing heavy is imported here: `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from manako.bounded import YAML_BYTES, BadText, cut, from_yaml, json_object, read_text, shown
from manako.errors import ManakoError, full_text, is_of_the_disk
from manako.experiments.common import stopping
from manako.experiments.common.outlet import be_utf8, open_outlets
from manako.plain import printable

Command = TypeVar("Command")
# what other frameworks call a setting: the first of the names that a runner has is the one meant
ELSEWHERE = {
    "lr": ("learning_rate",),
    "adapter_lr": ("adapter_learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "batch": ("batch_size", "minibatch_size"),
    "batch_size": ("batch_size", "minibatch_size"),
    "mini_batch_size": ("minibatch_size", "batch_size"),
    "per_device_train_batch_size": ("batch_size", "minibatch_size"),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "n_envs": ("num_envs",),
    "envs": ("num_envs",),
    "env_id": ("env",),
    "env_name": ("env",),
    "environment": ("env",),
    "gym_id": ("env",),
    "task": ("env",),
    "make_kwargs": ("env_kwargs",),
    "timesteps": ("total_steps",),
    "total_timesteps": ("total_steps",),
    "max_steps": ("total_steps",),
    "steps": ("total_steps", "num_steps"),
    "n_steps": ("num_steps",),
    "rollout_length": ("num_steps",),
    "horizon": ("num_steps",),
    "update_epochs": ("num_ppo_epochs",),
    "n_epochs": ("num_ppo_epochs", "epochs"),
    "epochs": ("epochs", "num_ppo_epochs"),
    "num_epochs": ("epochs", "num_ppo_epochs"),
    "num_train_epochs": ("epochs", "num_ppo_epochs"),
    "entropy_coef": ("ent_coef",),
    "value_coef": ("vf_coef",),
    "clip": ("clip_range",),
    "clip_coef": ("clip_range",),
    "clip_epsilon": ("clip_range",),
    "discount": ("gamma",),
    "lam": ("gae_lambda",),
    "lambda": ("gae_lambda",),
    "grad_clip": ("max_grad_norm",),
    "kl_target": ("target_kl",),
    "model": ("policy", "models"),
    "model_path": ("policy",),
    "model_name": ("policy",),
    "model_name_or_path": ("policy",),
    "checkpoint": ("policy",),
    "agent": ("policy",),
    "encoder": ("vision_encoder",),
    "llm": ("language_model",),
    "lm": ("language_model",),
    "rank": ("lora_rank",),
    "lora_r": ("lora_rank",),
    "peft": ("trainable",),
    "workers": ("num_workers",),
    "n_workers": ("num_workers",),
    "backend": ("rollout_backend",),
    "threads": ("torch_threads",),
    "n_episodes": ("episodes", "eval_episodes"),
    "n_eval_episodes": ("eval_episodes", "episodes"),
    "num_episodes": ("episodes", "eval_episodes"),
    "out": ("output", "output_dir"),
    "output": ("output", "output_dir"),
    "output_dir": ("output_dir", "output"),
    "save_dir": ("output_dir", "output"),
    "log_dir": ("output_dir", "output"),
    "logdir": ("output_dir", "output"),
    "data": ("dataset",),
    "dataset_name": ("dataset",),
    "random_seed": ("seed",),
    "save_freq": ("save_every",),
    "success_threshold": ("success_return",),
    "prompt": ("instruction",),
}
LARGEST = 2**53  # of a whole number
LONGEST_NAME = 240  # bytes of a file's name: file systems take 255, and what is being written has a longer one
LONGEST_PATH = 3_000  # bytes; systems take 4,095
MAY_BE_EMPTY = ("system", "instruction")  # texts, in a file, where nobody's unset variable makes them so
EXAMPLE = "expected sections with settings, such as 'environment:' and below it '  num_envs: 64'"


class UsageError(ManakoError):
    """The command line or a configuration file cannot be used; the message says what came and what was expected."""


def section(kind: Callable[..., Any], title: str, without: Sequence[str] = (), **defaults: Any) -> Any:
    """Makes a field of a runner's settings.

    Args:
        kind: the section's settings class.
        title: over its flags in --help.
        without: settings that this runner does not use: no flags, and refused in files.
        defaults: this runner's own.

    Returns:
        The dataclass field.
    """
    return dataclasses.field(
        default_factory=functools.partial(kind, **defaults), metadata={"title": title, "without": tuple(without)}
    )


@dataclass(frozen=True)
class Known:
    """A setting of a runner: where it stands and what it may be."""

    name: str
    section: str
    hint: Any
    default: Any
    help: str
    limits: Mapping[str, float]
    only_in_file: bool
    is_path: bool

    @property
    def plain(self) -> Any:
        """The type without None."""
        if typing.get_origin(self.hint) in (typing.Union, types.UnionType):
            return next(part for part in typing.get_args(self.hint) if part is not type(None))
        return self.hint

    @property
    def optional(self) -> bool:
        """Whether it may be left out."""
        return type(None) in typing.get_args(self.hint)

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, where only a few texts are allowed."""
        return typing.get_args(self.plain) if typing.get_origin(self.plain) is typing.Literal else ()

    @property
    def metavar(self) -> str:
        """What stands for its value in --help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        names = {int: "N", float: "X", bool: "{true,false}", str: "TEXT"}
        return names.get(self.plain) or ("JSON" if typing.get_origin(self.plain) is dict else "A,B,...")

    @property
    def expected(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        what = words.get(self.plain) or (
            "a mapping" if typing.get_origin(self.plain) is dict else "a list of texts such as [left, right]"
        )
        signs = {"ge": "from {} on", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
        return " ".join([what, *(signs[name].format(limit) for name, limit in self.limits.items())])


@dataclass(frozen=True)
class CommandLine(Generic[Command]):
    """What came: the settings, the names of those that flags or --config gave, and the file that was read."""

    settings: Command
    given: frozenset[str]
    file: str | None


def known_settings(kind: type) -> dict[str, Known]:
    """Returns the settings of a runner by their names, which are unique over its sections."""
    table: dict[str, Known] = {}
    for part in dataclasses.fields(kind):
        assert part.default_factory is not dataclasses.MISSING, part.name
        defaults = part.default_factory()
        hints = typing.get_type_hints(type(defaults))
        for field in dataclasses.fields(defaults):
            if field.name in part.metadata["without"]:
                continue
            assert field.name not in table, f"{field.name} is a setting of {table[field.name].section} and {part.name}"
            table[field.name] = Known(
                field.name, part.name, hints[field.name], getattr(defaults, field.name), **field.metadata
            )
    return table


def parse(kind: type[Command], description: str, arguments: Sequence[str] | None = None, **options: Any) -> Command:
    """Returns the settings alone, see `read_command_line`."""
    return read_command_line(kind, description, arguments, **options).settings


def read_command_line(
    kind: type[Command],
    description: str,
    arguments: Sequence[str] | None = None,
    positional: str | None = None,
    file_without: tuple[Path, Sequence[str]] | None = None,
) -> CommandLine[Command]:
    """Reads settings from a YAML file (`--config`) and flags, flags first; checked.

    Args:
        kind: the dataclass of sections.
        description: what the runner does, for --help.
        arguments: the words; by default those of this program.
        positional: a setting that is given without a flag, and has to be; a list of texts, word by word.
        file_without: a file to read where there is no --config and none of these settings came as a flag.

    Returns:
        The settings and where they come from.

    Raises:
        UsageError: an unknown flag or key, a file that cannot be read, a value of the wrong type or out of range.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if any("\ud800" <= char <= "\udfff" for char in word):  # bytes that are no text
            raise UsageError(f"{word!r} is no UTF-8: give a name or text in UTF-8; libraries take no other.")
    known = known_settings(kind)
    parser = _parser(kind, known, description, positional)
    _refuse_unknown_flags(parser, known, words)
    found, rest = parser.parse_known_args(words)
    if rest:
        raise UsageError(f"{shown(rest[0])} belongs to no flag: expected pairs such as --num_envs 64.")
    flags = {
        name: tuple(text) if isinstance(text, list) else _read(known[name], text)
        for name, text in vars(found).items()
        if name in known
    }
    file = getattr(found, "config", None)
    if file is not None and not file.strip():
        raise UsageError(f"--config is {file!r}: expected a YAML file; is a variable of the shell not set?")
    from_file: dict[str, Any] = {}
    given = set(flags)
    if file is not None:
        from_file = flat(read_settings(kind, file))
        given |= set(from_file)
    elif file_without is not None and not given & set(file_without[1]):
        file = str(file_without[0])
        from_file = flat(read_settings(kind, file))
    check(known, flags, source="")
    values = {**from_file, **flags}
    sections = {
        part: {name: value for name, value in values.items() if known[name].section == part}
        for part in {setting.section for setting in known.values()}
    }
    line = CommandLine(build(kind, sections), frozenset(given), file)
    environment = getattr(line.settings, "environment", None)
    if environment is not None:
        from manako.experiments.common.named_modules import check_named, remember  # which raises this file's error

        if file is None or "env" in flags or file.lstrip().startswith("{"):
            remember(environment.env)
        elif "env" in from_file:
            check_named(environment.env, f"The configuration {file!r}")
    return line


def build(kind: type[Command], sections: Mapping[str, Mapping[str, Any]]) -> Command:
    """Returns the settings with these values in place of defaults."""
    start: Any = kind()
    changed = {name: dataclasses.replace(getattr(start, name), **values) for name, values in sections.items()}
    return dataclasses.replace(start, **changed)


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the settings of all sections by their names."""
    return {name: value for values in sections.values() for name, value in values.items()}


def as_sections(settings: Any) -> dict[str, dict[str, Any]]:
    """Returns the settings of a runner as a file holds them, all that the runner uses."""
    known = known_settings(type(settings))
    return {
        part.name: {
            field.name: getattr(getattr(settings, part.name), field.name)
            for field in dataclasses.fields(getattr(settings, part.name))
            if field.name in known and known[field.name].section == part.name
        }
        for part in dataclasses.fields(settings)
    }


def read_settings(kind: type, file: str) -> dict[str, dict[str, Any]]:
    """Returns the settings in a YAML file by sections, checked; those it does not name are left out.

    Args:
        kind: the dataclass of sections.
        file: its path, or its content in braces.

    Raises:
        UsageError: the file cannot be read, an unknown section or key, a value of the wrong type or out of range.
    """
    if file.lstrip().startswith("{"):
        return checked_sections(kind, _mapping(file, "of --config"), "--config")
    return checked_sections(kind, read_yaml(Path(file)), file)


def checked_sections(kind: type, values: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Returns sections as they were read, each value checked.

    Args:
        kind: the dataclass of sections.
        values: what the file holds.
        source: its name.

    Raises:
        UsageError: the first section, key or value that does not fit.
    """
    known, names = known_settings(kind), [part.name for part in dataclasses.fields(kind)]
    sections: dict[str, dict[str, Any]] = {}
    for part, content in values.items():
        if part not in names:
            raise UsageError(f"{source} {_no_section(part, names, known)}")
        if content is None:
            content = {}
        if not isinstance(content, dict):
            if part in known:  # a file from before there were sections may have `policy: tiny`
                raise UsageError(f"{source} has {part!r} as a setting at its top, and not as a section: {EXAMPLE}.")
            raise UsageError(
                f"The section {part} in {source} is {shown(content)}: expected settings, one a line below it."
            )
        for key in content:
            if key not in known or known[key].section != part:
                raise UsageError(f"{source} has the unknown key {shown(key)} in {part}{_hint(key, part, known)}")
        sections[part] = {key: _from_yaml(known[key], value) for key, value in content.items()}
        check(known, sections[part], source)
    return sections


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UsageError: no such file, no YAML, or no mapping.
    """
    try:
        text = read_text(file, YAML_BYTES)
    except (OSError, ValueError) as error:  # ValueError: too long, no text, or a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"The configuration {shown(str(file))} cannot be read ({reason}): give a YAML file."
        ) from error
    return _mapping(text, shown(str(file)))


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        values = from_yaml(text)
    except BadText as error:
        raise UsageError(f"The configuration {source} is no YAML that can be read ({error}): {EXAMPLE}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"The configuration {source} holds no mapping: {EXAMPLE}.")
    return values


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file that a run or ladder has written.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        return json_object(read_text(file))
    except (OSError, BadText) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(file)!r} cannot be read ({reason}): use another copy of the folder.") from error


def check(known: Mapping[str, Known], values: Mapping[str, Any], source: str) -> None:
    """Checks types and limits of the given values.

    Args:
        known: the runner's settings.
        values: some or all of them.
        source: the file that they come from; empty for the command line, whose settings are named as flags.

    Raises:
        UsageError: the first value that does not fit.
    """
    from pydantic import Field, TypeAdapter, ValidationError

    for name, value in values.items():
        setting = known[name]
        options: dict[str, Any] = dict(setting.limits) if setting.choices else {**setting.limits, "strict": True}
        if setting.plain is float:
            options["allow_inf_nan"] = False
        annotated: Any = typing.Annotated[setting.plain, Field(**options)]
        try:
            if not (value is None and setting.optional):
                TypeAdapter(annotated).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{_place(name, source)} is {shown(value)}: expected {setting.expected}.") from error
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(
                f"{_place(name, source)} is {shown(value)}: expected {setting.expected}, and no more than {LARGEST:,}."
            )
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(setting, text, source)


def _check_text(setting: Known, text: str, source: str) -> None:
    """Raises where a text is empty, no file's name where it should be one, or holds what no file's name and prompt can.

    A list's empty entries are said better by whom they are for.
    """
    place, several = _place(setting.name, source), typing.get_origin(setting.plain) is tuple
    if not text.strip() and not several and not (source and setting.name in MAY_BE_EMPTY):
        unset = "" if source else "; is a variable of the shell not set?"
        raise UsageError(f"{place} is {text!r}: expected {setting.expected} that is not empty{unset}.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{place} is {shown(text)}: expected text without halves of characters.") from error
    if "\0" in text:
        raise UsageError(f"{place} is {shown(text)}: expected text without null characters.")
    if setting.is_path:
        check_path(text, place)


def check_path(text: str, place: str) -> None:
    """Raises where no file can have this name.

    Args:
        text: the name.
        place: where it stands, for the sentence.

    Raises:
        UsageError: it is empty, or longer than file systems allow.
    """
    if not text.strip():
        raise UsageError(f"{place} is {text!r}: expected a name; is a variable of the shell not set?")
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(text)) > LONGEST_PATH:
        raise UsageError(
            f"{place} is {shown(text)}, with a name of {longest:,} bytes: expected names of up to {LONGEST_NAME} "
            f"bytes, and {LONGEST_PATH:,} with their folders."
        )


def _place(name: str, source: str) -> str:
    return f"{name} in {source}" if source else f"--{name}"


def check_new_file(file: str | None, flag: str) -> None:
    """Raises where a file of results is there already, or its folder is not; None is no file.

    Raises:
        UsageError: it exists, or its folder does not.
    """
    if file and Path(file).exists():
        raise UsageError(f"{flag} {file!r} exists and is not overwritten: give another file.")
    if file and not Path(file).resolve().parent.is_dir():
        raise UsageError(f"The folder of {flag} {file!r} does not exist: make it or give another file.")


def show_loading(hint: str = "nothing was begun, start it again") -> None:
    """Says why nothing happens for a while: torch and what stands on it take longer to import than all before.

    Ctrl-C ends the process at once then, with `hint`; who goes on calls `stopping.tidy_up_from_here`.
    """
    stopping.answer_signals(hint)
    show("loading", "torch, transformers and the policy, some 10 s")


def show(name: str, text: str) -> None:
    """Prints a line of a runner's header at once, before the heavy libraries are loaded."""
    print(f"{name:<13}{printable(text)}", flush=True)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a runner's main function: bad input is one sentence on stderr and exit code 2, never a traceback.

    A fault, such as a full disk, is a sentence too, and exit code 1. Ctrl-C and SIGTERM end it with exit code 130.
    """
    stopping.tidy_up_from_here()
    be_utf8()
    open_outlets()
    try:
        code = main()
    except ManakoError as error:
        print(f"error: {printable(cut(full_text(error)))}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        print(
            f"error: The disk refused to take a file ({printable(full_text(error))[:200]}): make room, or write "
            "elsewhere; what was written before is whole.",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = stopping.STOPPED
    stopping.forget()
    sys.stdout.flush()
    sys.exit(code or 0)


class _Once(argparse.Action):
    """Stores a flag's value; it may not come twice."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Takes the value."""
        if hasattr(namespace, self.dest):
            raise UsageError(
                f"{option} came twice, with {shown(getattr(namespace, self.dest))} and {shown(values)}: expected one."
            )
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are sentences."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError` in place of argparse's usage text and exit."""
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message).rstrip(".")
        raise UsageError(f"{message[:1].upper()}{message[1:]}; --help lists the flags.")


def _parser(kind: type, known: Mapping[str, Known], description: str, positional: str | None) -> _Parser:
    """Flags whose values stay text; those that do not come are not there."""
    parser = _Parser(
        usage=f"%(prog)s {'' if positional is None else positional.upper() + ' '}[--config FILE] [--FLAG VALUE ...]",
        description=description,
        epilog=_epilog(known.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=_Once,
        metavar="FILE",
        help="YAML file with settings by section, or its content in braces; flags go first",
    )
    for part in dataclasses.fields(kind):
        group = parser.add_argument_group(part.metadata["title"])
        for setting in known.values():
            if setting.section != part.name or setting.only_in_file:
                continue
            text = setting.help.replace("%", "%%")
            if setting.name == positional:
                several: dict[str, Any] = {"nargs": "+"} if typing.get_origin(setting.plain) is tuple else {}
                group.add_argument(setting.name, metavar=setting.name.upper(), help=text, **several)
                continue
            default = "" if setting.default is None else f" (default: {_shown(setting.default)})"
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.plain is bool else {}
            group.add_argument(
                f"--{setting.name}",
                action=_Once,
                metavar=setting.metavar,
                help=text + default.replace("%", "%%"),
                **switch,
            )
    return parser


def _epilog(known: Iterable[Known]) -> str | None:
    """The settings without a flag, by section."""
    lines: list[str] = []
    for setting in known:
        if setting.only_in_file:
            head = f"{setting.section}:"
            if f"  {head}" not in lines:
                lines.append(f"  {head}")
            default = "" if setting.default is None else f" (default: {_shown(setting.default)})"
            lines.append(f"    {setting.name + ':':<22}{setting.help}{default}")
    return "\n".join(["only in a --config file:", *lines]) if lines else None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_unknown_flags(parser: _Parser, known: Mapping[str, Known], words: Sequence[str]) -> None:
    """Says which flag was probably meant."""
    flags = {option for action in parser._actions for option in action.option_strings}
    for word in words:
        name = word.split("=")[0]
        if not name.startswith("--") or name in flags:
            continue
        setting = known.get(name[2:])
        if setting is not None and setting.only_in_file:
            raise UsageError(
                f"There is no flag {name}: {setting.name} stands in the section {setting.section} of a --config file."
            )
        near = nearest(name, [flag[2:] for flag in sorted(flags) if flag.startswith("--")])
        if near is None and (meant := nearest(name, [*known])) is not None and known[meant].only_in_file:
            raise UsageError(
                f"There is no flag {cut(name, 100)}; {meant} stands in the section {known[meant].section} of a "
                "--config file."
            )
        raise UsageError(
            f"There is no flag {cut(name, 100)}"
            + (f", did you mean --{near}?" if near else "; --help lists the flags.")
        )


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Returns which of `names` was probably meant, None where none is near.

    In this order: the same word spelled otherwise (`--Total-Steps`), another framework's word for it (`--lr`), the only
    name that begins so (`--adv`), and the name that shares most letters in their order.
    """
    word = name.lstrip("-").replace("-", "_").lower()
    if word in names:
        return word
    for meant in ELSEWHERE.get(word, ()):
        if meant in names:
            return meant
    begun = [each for each in names if word and each.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    return next(iter(difflib.get_close_matches(word, names, 1)), None)


def _no_section(part: str, names: Sequence[str], known: Mapping[str, Known]) -> str:
    if part in known:
        return (
            f"has the setting {part!r} at its top, which belongs in the section {known[part].section}: files and runs "
            "without sections are no longer read."
        )
    near = difflib.get_close_matches(part, names, 1)
    hint = f", did you mean {near[0]!r}?" if near else f": expected {', '.join(names)}."
    return f"has the unknown section {shown(part)}{hint}"


def _hint(key: str, part: str, known: Mapping[str, Known]) -> str:
    if key in known:
        return f": it belongs in the section {known[key].section}."
    own = [setting.name for setting in known.values() if setting.section == part]
    near = nearest(key, own)
    if near is not None:
        return f", did you mean {near!r}?"
    elsewhere = nearest(key, [*known])
    if elsewhere is not None:
        return f", did you mean {elsewhere!r} in the section {known[elsewhere].section}?"
    return ": --help lists the settings."


def _read(setting: Known, text: str) -> Any:
    """A flag's text to a value; text that is none stays text, which `check` then refuses by name.

    `none` stands for None where a number may be left out.
    """
    if setting.optional and setting.plain is not str and text.lower() == "none":
        return None
    if typing.get_origin(setting.plain) is dict:
        return _json_object(setting.name, text)
    if typing.get_origin(setting.plain) is tuple:
        return tuple(name.strip() for name in text.split(","))
    if setting.plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if setting.plain in (int, float):
        try:
            return setting.plain(text)
        except ValueError:
            return text
    return text


def _from_yaml(setting: Known, value: Any) -> Any:
    """A file's value; YAML 1.1 takes 1e-4 for text, and a list stands for a tuple."""
    if setting.plain is float and isinstance(value, str):
        return _read(setting, value)
    if typing.get_origin(setting.plain) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except BadText as error:
        raise UsageError(
            f"--{name} {shown(text)} is no JSON ({error}): expected a JSON object such as '{{\"size\": 4}}'."
        ) from error
