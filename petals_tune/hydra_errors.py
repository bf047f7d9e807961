"""Errors of a configuration as one ConfigError: the key, and what could stand there instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from difflib import get_close_matches
from pydoc import ErrorDuringImport, locate
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petals_tune.errors import ConfigError

# What Hydra's `instantiate` reads itself in a section with a _target_.
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})

_MANY = 20  # options: a longer list is not readable in a sentence


def config_error(
    error: Exception, overrides: Sequence[str], compose_again: Callable[[Sequence[str]], DictConfig]
) -> ConfigError:
    """Return the ConfigError for what Hydra or OmegaConf raised for these overrides.

    `compose_again` composes the configuration without the override that failed, to list what could stand there.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = error.missing_cfg_file
        chosen = next(
            (key for key in map(_key, overrides) if missing.startswith(f"{key}/")), missing.rpartition("/")[0]
        )
        return _unknown_choice(chosen, missing.removeprefix(f"{chosen}/"), error.options or [])
    if found := re.match(r"Could not (?:override|append to config\.?) '?([\w./@]+)", str(error)):
        key = found[1]
        kept = [text for text in overrides if _key(text) != key]
        if len(kept) < len(overrides):
            return _no_option(key, compose_again(kept))
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if found := re.match(r"Ambiguous value for argument '(([^=]+)=.*)'", str(error)):
        values = found[1].partition("=")[2]
        return ConfigError(
            f"{found[1]} has several values: add -m to run each of them, or write '{found[2]}=[{values}]' for a list",
            key=found[2],
            seen=found[1],
        )
    if found := re.match(r"Multiple values for ([\w/@]+)|([\w/@]+) appears more than once", str(error)):
        key = found[1] or found[2]
        return ConfigError(f"{key} is chosen already: write {key}=NAME, once and without a plus sign", key=key)
    if "Config group override must be" in str(error):
        return _no_choice(overrides, compose_again([]))
    return ConfigError(first_line(error.__cause__ or error))


@contextmanager
def explain_start(jobs: Sized) -> Iterator[None]:
    """Raise ConfigError for what Hydra raises before the first of `jobs`, such as for a folder that cannot be made."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, OSError) as error:
        if jobs:  # an error of a job keeps its traceback
            raise
        raise ConfigError(first_line(error), key="hydra") from error


def unknown_option(
    key: str, known: Sequence[str], *, set_now: Sequence[str] = (), built: str | None = None
) -> ConfigError:
    """Return the error for a key that is not among `known`; of many known ones, those in `set_now` are listed.

    `built` names the class that the section of the key builds.
    """
    section, _, name = key.rpartition(".")
    meant = _did_you_mean(name, known, prefix=f"{section}." if section else "")
    listed = known if len(known) <= _MANY else [*(option for option in set_now if option in known), "more"]
    owner = section or ("a run" if "data" in known else "this command")
    owner += f" ({built})" if built else ""
    return ConfigError(f"{key} is no option{meant}; {owner} has {', '.join(listed) or 'none'}", key=key)


def import_target(section: Mapping[str, Any], *, where: str) -> Callable[..., Any]:
    """Import what a section builds. Raises ConfigError."""
    name, key = str(section["_target_"]), f"{where}._target_"
    try:
        target: Any = locate(name)
    except ErrorDuringImport as error:
        raise ConfigError(f"{key}={name} cannot be imported: {error.value}", key=key, seen=name) from error
    if not callable(target):
        raise ConfigError(f"{key}={name} is not there, or is nothing to call", key=key, seen=name)
    return target


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _unreadable(error: OverrideParseException) -> ConfigError:
    argument = str(error.override)
    if "=" not in argument:
        why = "options are written KEY=VALUE; --help lists them"
    elif "=~" in argument:
        why = "no ~ here; write $HOME, or the folder's whole name"
    else:
        why = (
            f"{first_line(error.__cause__ or error)}; "
            "a value with spaces, quotes, commas or brackets wants two pairs of quotes, 'key=\"a value\"'"
        )
    return ConfigError(f"cannot read the argument {argument!r}: {why}", key=argument.partition("=")[0], seen=argument)


def _no_option(key: str, cfg: DictConfig) -> ConfigError:
    """Return the error for a key that is nowhere in `cfg`."""
    if key.startswith("hydra."):
        return ConfigError(f"{key} is no option of Hydra; --cfg hydra lists them", key=key)
    if "/" in key:
        parent = key.partition("/")[0]
        such = ", such as data=my_data" if parent == "data" else ""
        return ConfigError(f"{key} is no group of the chosen {parent}: choose a {parent} that has it{such}", key=key)
    section, where, (name, *below) = cfg, "", key.split(".")
    while below and isinstance(section.get(name), DictConfig):
        section, where, (name, *below) = section[name], f"{where}{name}.", below
    if name in section:
        return ConfigError(f"{key} is no option: {where}{name} is a value, with no keys below it", key=key)
    if "_target_" in section and name in inspect.signature(import_target(section, where=where)).parameters:
        return ConfigError(f"{key} stands in no file: to add it, write a plus sign before it, +{key}=...", key=key)
    known = [str(option) for option in section if option not in HYDRA_KEYS]
    if not where and "data" in known:
        known.append("recipe")  # chosen beside the keys of a run
    sections: Any = OmegaConf.to_container(cfg)
    deeper = [f"{part}.{key}" for part, keys in sections.items() if isinstance(keys, dict) and key in keys]
    if deeper:
        return ConfigError(f"{key} is no option (did you mean {deeper[0]}?)", key=key)
    return unknown_option(f"{where}{name}", known)


def _unknown_choice(group: str, choice: str, known: Sequence[str]) -> ConfigError:
    if group == "model" and "/" in choice:
        return ConfigError(
            f"model={choice} is not there: for a folder or a name on the hub, write model.source={choice}",
            key=group,
            seen=choice,
        )
    meant = _did_you_mean(choice, known, prefix=f"{group}=")
    listed = f"{group} is one of {', '.join(known)}" if known else "--help lists its choices"
    return ConfigError(f"{group}={choice} is not there{meant}; {listed}", key=group, seen=choice)


def _no_choice(overrides: Sequence[str], cfg: DictConfig) -> ConfigError:
    """Return the error for a group that was given a number or null, in a command without its overrides `cfg`."""
    key = next(
        key
        for key, value in map(_key_and_value, overrides)
        if isinstance(cfg.get(key), DictConfig) and not isinstance(value, str | list | dict)
    )
    return ConfigError(
        f"{key} is a group, and takes one of its choices (--help lists them) or, for an empty one, ~{key}", key=key
    )


def _did_you_mean(name: str, known: Sequence[str], *, prefix: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _key(override: str) -> str:
    return str(OverridesParser.create().parse_override(override).key_or_group)


def _key_and_value(override: str) -> tuple[str, Any]:
    parsed = OverridesParser.create().parse_override(override)
    return str(parsed.key_or_group), parsed.value()
