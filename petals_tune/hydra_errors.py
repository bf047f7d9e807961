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
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return _unknown_choice(group, choice, error.options)
    if found := re.match(r"Could not (?:override|append to config\.?) '?([\w./@]+)", str(error)):
        key = found[1]
        kept = [text for text in overrides if _key(text) != key]
        if len(kept) < len(overrides):
            return _no_option(key, compose_again(kept))
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
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


def unknown_option(key: str, known: Sequence[str], *, set_now: Sequence[str] = ()) -> ConfigError:
    """Return the error for a key that is not among `known`; of many known ones, those in `set_now` are listed."""
    section, _, name = key.rpartition(".")
    meant = _did_you_mean(name, known, prefix=f"{section}." if section else "")
    listed = known if len(known) <= _MANY else [*(option for option in set_now if option in known), "more"]
    owner = section or ("a run" if "data" in known else "this command")
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
    meant = _did_you_mean(choice, known, prefix=f"{group}=")
    return ConfigError(
        f"{group}={choice} is not there{meant}; {group} is one of {', '.join(known)}", key=group, seen=choice
    )


def _did_you_mean(name: str, known: Sequence[str], *, prefix: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _key(override: str) -> str:
    return str(OverridesParser.create().parse_override(override).key_or_group)
