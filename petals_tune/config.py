"""From the command line to a checked configuration: every mistake is one sentence, before a server is started.

Hydra composes `conf/` and `recipes/`; here its errors become ours, and what it cannot know is checked: each section
with a `_target_` against the signature and the type hints of what it builds, all others against the classes below.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Annotated, Any, Literal, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationError,
)
from yaml import YAMLError

from petals_tune.errors import ConfigError, PetalsTuneError

CONFIG_NAME = "train"

_MANY = 20  # names, and a sentence no longer reads

# What Hydra's instantiate keeps for itself in a section with a _target_.
_HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})

Section = Mapping[str, Any]

# Keys that the run itself reads from a section, beside those of what the section builds.
_BESIDE = {"tuning.init_from": str | None}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model, which nobody changes."""

    source: str  # `embedded`, a folder in Hugging Face format, or a name on the hub


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """The base model of a run."""

    source: str | None  # as Model's; null: the one that the adapter of tuning.init_from names


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the jobs of a sweep are compared by."""

    metric: str | None  # of the last validation; null: the one that the objective is judged by
    direction: Literal["minimize", "maximize"] | None  # which way is better; null: known of loss, perplexity, accuracy


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run can be told. A `Section` is an object by `_target_` (or several, by name)."""

    name: str  # of the run and its output folder; a recipe gives its own
    seed: Annotated[int, Field(ge=0)]
    output_dir: str
    ckpt_path: str | None  # go on from this checkpoint
    sweep: Sweep
    zero_shot: bool  # also measure the base model with nothing trained, where that differs from a fresh adapter
    model: TunedModel
    data: Section
    objective: Section
    tuning: Section
    optimizer: Section
    schedule: Section
    swarm: Section
    trainer: Section
    callbacks: Section
    logger: Section


# What to type where a value has no default.
_MISSING = {
    "name": "choose a recipe, recipe=NAME with one of {recipes}, or name a run of your own",
    "swarm.initial_peers": "give the addresses that a running server prints, as in "
    "swarm.initial_peers=[/ip4/10.0.0.5/tcp/31337/p2p/Qm...]",
}


def folder_of(name: str) -> Path:
    """The folder of `conf` or `recipes`: inside the installed package, or beside it in a bare checkout."""
    spec = find_spec(f"petals_tune.{name}")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(__file__).resolve().parent.parent / name


def recipe_names() -> list[str]:
    return sorted(path.stem for path in folder_of("recipes").glob("*.yaml"))


def register_recipes() -> None:
    """Make every recipes/NAME.yaml an option of Hydra's group `recipe`; its file lies outside conf/."""
    for name in recipe_names():
        node = OmegaConf.load(folder_of("recipes") / f"{name}.yaml")
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_", provider="recipes")


def composed(overrides: Sequence[str] = (), *, config_name: str = CONFIG_NAME) -> DictConfig:
    """The configuration that these command-line arguments make. Raises ConfigError."""
    register_recipes()
    try:
        with initialize_config_dir(config_dir=str(folder_of("conf")), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explained(error, overrides, config_name)) from None


def check_arguments(arguments: Sequence[str], *, config_name: str = CONFIG_NAME, schema: type = Run) -> None:
    """Compose and check what a command line asks for, every job of a sweep included. Raises ConfigError."""
    args, unknown = get_args_parser().parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(f"{unknown[0]} is no option: options are written KEY=VALUE; --help lists them")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise ConfigError(f"--config-dir {args.config_dir}: there is no such folder")
    if args.config_name and not args.config_path:
        folders = [folder_of("conf"), *([Path(args.config_dir)] if args.config_dir else [])]
        file = f"{args.config_name.removesuffix('.yaml')}.yaml"
        if not any((folder / file).is_file() for folder in folders):
            raise ConfigError(
                f"--config-name {args.config_name}: there is no {file} in {folders[-1]}; see --config-dir"
            )
    if args.help or args.hydra_help or args.info or args.shell_completion or args.config_path or args.config_name:
        return
    search = [f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]"] if args.config_dir else []
    for overrides in _jobs(args.overrides) if args.multirun else [args.overrides]:
        cfg = composed([*search, *overrides], config_name=config_name)
        if not args.cfg:
            if "output_dir" in cfg:
                cfg.output_dir = ""  # known once Hydra has made the folder
            check(cfg, schema=schema)


def check(cfg: DictConfig, *, schema: type = Run) -> None:
    """Every key is known and every value is of its type, as the dataclass `schema` says.

    Raises ConfigError with the first one that is not.
    """
    if missing := _first_missing(OmegaConf.to_container(cfg)):
        hint = _MISSING.get(missing, f"give {missing}=...").format(recipes=", ".join(recipe_names()))
        raise ConfigError(f"{missing} has no value: {hint}")
    try:
        options: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    _check_call(schema, options, where="")
    if absent := [field.name for field in fields(schema) if field.name not in options]:
        raise ConfigError(f"a run needs {absent[0]}, and it was taken out")


def build(section: DictConfig, *, where: str, **given: Any) -> Any:
    """The object that a section describes; a `_partial_` one is completed with `given` where there is any.

    Raises ConfigError naming the section where its class refuses the values.
    """
    try:
        options: Any = OmegaConf.to_container(section, resolve=True)
        kept = {name: value for name, value in options.items() if f"{where}.{name}" not in _BESIDE}
        made = instantiate(kept, _convert_="all")
        return made(**given) if given and isinstance(made, partial) else made
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, PetalsTuneError):
            raise cause from None
        raise ConfigError(f"{where}: {_first_line(cause)}") from error
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        if isinstance(error, PetalsTuneError):
            raise
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def _first_missing(section: Any, where: str = "") -> str | None:
    """The first key that still says `???`."""
    for name, value in section.items():
        if value == "???":
            return f"{where}{name}"
        if isinstance(value, dict) and (found := _first_missing(value, f"{where}{name}.")):
            return found
    return None


def _check_call(target: Callable[..., Any], options: Mapping[str, Any], *, where: str) -> None:
    """`options` are keywords that `target` takes, with values of the annotated types."""
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    for name, value in options.items():
        if name in _HYDRA_KEYS:
            continue
        key = f"{where}.{name}" if where else name
        if key in _BESIDE:
            _check_value(value, _BESIDE[key], key)
            continue
        if name not in parameters and not open_ended:
            raise ConfigError(_unknown(key, list(parameters), set_now=list(options)))
        hint = hints.get(name, Any)
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
            _check_call(hint, value, where=key)
        elif isinstance(value, dict):
            _check_section(value, where=key)
        else:
            _check_value(value, hint, key)


def _check_section(section: Mapping[str, Any], *, where: str) -> None:
    if "_target_" in section:
        _check_call(_target(section, where=where), section, where=where)
        return
    for name, value in section.items():
        if isinstance(value, dict):
            _check_section(value, where=f"{where}.{name}")


def _target(section: Section, *, where: str) -> Callable[..., Any]:
    name = str(section["_target_"])
    try:
        target: Any = locate(name)
    except ErrorDuringImport as error:
        raise ConfigError(f"{where}._target_={name} cannot be imported: {error.value}") from error
    if not callable(target):
        raise ConfigError(f"{where}._target_={name} is not there, or is nothing to call")
    return target


def _check_value(value: Any, hint: Any, key: str) -> None:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return  # a hint that only its own library understands: the class itself will judge
    except ValidationError as error:
        wanted = dict.fromkeys(
            part["msg"].removeprefix("Input should be ").partition(", unable")[0] for part in error.errors()
        )
        a_list = f" in brackets, as in '{key}=[{value}]'" if "a valid list" in wanted and isinstance(value, str) else ""
        raise ConfigError(f"{key} is {value!r}: it must be {' or '.join(wanted)}{a_list}") from None


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    # A dataclass may inherit fields whose hints only its parent's module can resolve: ask the class for those.
    function = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return {}


def _jobs(overrides: Sequence[str]) -> Iterable[list[str]]:
    """The overrides of every job of a sweep. Another sweeper than Hydra's own chooses its values as it goes."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(override.key_or_group == "hydra/sweeper" for override in parsed):
        return []
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _explained(error: Exception, overrides: Sequence[str], config_name: str) -> str:
    """One sentence on what Hydra or OmegaConf could not do with the arguments."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return _unknown_choice(group, choice, error.options)
    if found := re.match(r"Could not (?:override|append to config\.?) '?([\w./@]+)", str(error)):
        key = found[1]
        kept = [text for text in overrides if _key(text) != key]
        if len(kept) < len(overrides):
            return _no_option(key, composed(kept, config_name=config_name))
    if isinstance(error, OverrideParseException) and "=" not in str(error.override):
        return f"cannot read the argument {error.override!r}: options are written KEY=VALUE; --help lists them"
    if isinstance(error, OverrideParseException) and "=~" in str(error.override):
        return f"cannot read the argument {error.override!r}: no ~ here; write $HOME, or the folder's whole name"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the argument {error.override!r}: {_first_line(error.__cause__ or error)}; "
            "a value with spaces, quotes, commas or brackets wants two pairs of quotes, 'key=\"a value\"'"
        )
    return _first_line(error.__cause__ or error)


def _no_option(key: str, cfg: DictConfig) -> str:
    """What is wrong with a key that stands nowhere in `cfg`, and what stands there instead."""
    section, where, (name, *below) = cfg, "", key.split(".")
    while below and isinstance(section.get(name), DictConfig):
        section, where, (name, *below) = section[name], f"{where}{name}.", below
    if name in section:
        return f"{where}{name} is a value: nothing stands below it"
    if "_target_" in section and name in inspect.signature(_target(section, where=where)).parameters:
        return f"{key} stands in no file: to add it, write a plus sign before it, +{key}=..."
    known = [str(option) for option in section if option not in _HYDRA_KEYS]
    if not where and "data" in known:
        known.append("recipe")  # what a run is described by
    sections: Any = OmegaConf.to_container(cfg)
    deeper = [f"{part}.{key}" for part, keys in sections.items() if isinstance(keys, dict) and key in keys]
    if deeper:
        return f"{key} is no option (did you mean {deeper[0]}?)"
    return _unknown(f"{where}{name}", known)


def _key(override: str) -> str:
    parsed: Override = OverridesParser.create().parse_override(override)
    return str(parsed.key_or_group)


def _unknown(key: str, known: Sequence[str], *, set_now: Sequence[str] = ()) -> str:
    """`known` is what could stand there; where that is long, only what is `set_now` is listed."""
    section, _, name = key.rpartition(".")
    meant = _meant(name, known, prefix=f"{section}." if section else "")
    listed = known if len(known) <= _MANY else [*(option for option in set_now if option in known), "more"]
    owner = section or ("a run" if "data" in known else "this command")
    return f"{key} is no option{meant}; {owner} has {', '.join(listed) or 'none'}"


def _unknown_choice(group: str, choice: str, known: Sequence[str]) -> str:
    meant = _meant(choice, known, prefix=f"{group}=")
    return f"{group}={choice} is not there{meant}; {group} is one of {', '.join(known)}"


def _meant(name: str, known: Sequence[str], *, prefix: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
