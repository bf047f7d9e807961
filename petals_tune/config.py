"""Configuration: compose it from the command line, check it, and build the objects that it describes.

Hydra composes `conf/` and `recipes/`. Before a server is started every key and value is checked: a section with a
`_target_` against the signature and the type hints of what it builds, all others against the dataclasses below. Each
mistake is one ConfigError of one sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
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
from petals_tune.hydra_errors import HYDRA_KEYS, config_error, first_line, import_target, unknown_option

CONFIG_NAME = "train"

Section = Mapping[str, Any]

# Keys in a section with a `_target_` that the run itself reads, and their types.
_READ_BY_THE_RUN = {"tuning.init_from": str | None, "tuning.usual_lr": float}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen base model of a server."""

    source: str  # `embedded`, a folder in Hugging Face format, or a name on the hub
    revision: str | None = None  # branch, tag or commit on the hub; null: its main branch


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """The base model of a run."""

    source: str | None  # as in Model; null: the model that the adapter of tuning.init_from names
    revision: str | None  # as in Model; null beside a null source: the adapter's


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the jobs of a sweep are compared."""

    metric: str | None  # of the last validation; null: the objective's own metric
    direction: Literal["minimize", "maximize"] | None  # null: known for loss, perplexity and accuracy


@dataclass(frozen=True, kw_only=True)
class Run:
    """All options of a run. A `Section` describes an object with a `_target_`, or several by their names."""

    name: str  # of the run and its output folder; recipes set it
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no more
    output_dir: str
    exit_with_stdin: bool  # end as by Ctrl-C when standard input closes
    ckpt_path: str | None  # resume from this checkpoint
    sweep: Sweep
    instruction: str | None  # the task in words, from which a soft prompt starts; recipes set it
    zero_shot: bool  # also evaluate the base model without an adapter, where that differs from a new adapter
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


# Sections of which a run builds one object.
_BUILT = ("data", "objective", "tuning", "optimizer", "schedule", "swarm", "trainer")

# Keys without a default: what to type.
_MISSING = {
    "name": "choose a recipe, recipe=NAME with one of {recipes}, or name a run of your own",
    "data.source": "choose data, such as data=my_data data.source.path=FILE",
    "objective.words": "classification needs data with label words, such as data=sst2; other data take "
    "objective=causal_lm",
    "swarm.initial_peers": "give the addresses that a running server prints, as in "
    "swarm.initial_peers=[/ip4/10.0.0.5/tcp/31337/p2p/Qm...]",
}


def folder_of(name: str) -> Path:
    """Return the folder `conf` or `recipes`: inside the installed package, or beside it in a checkout."""
    spec = find_spec(f"petals_tune.{name}")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(__file__).resolve().parent.parent / name


def recipe_names() -> list[str]:
    return sorted(path.stem for path in folder_of("recipes").glob("*.yaml"))


@cache
def register_recipes() -> None:
    """Register every recipes/NAME.yaml in Hydra's group `recipe`: the files are outside conf/."""
    for name in recipe_names():
        node = OmegaConf.load(folder_of("recipes") / f"{name}.yaml")
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_", provider="recipes")
    # With a cache, since the jobs of a sweep and all who ask for the folder of a run must get the same.
    OmegaConf.register_new_resolver("new_folder", new_folder, use_cache=True, replace=True)


def new_folder(path: str) -> str:
    """Make a folder that no other process has, `path` or `path` with a number, and return it. Raises ConfigError."""
    for number in count(1):
        folder = Path(path if number == 1 else f"{path}_{number}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}", key="hydra.run.dir") from None
        return str(folder)
    raise AssertionError("count() has no end")


@contextmanager
def _hydra_apart() -> Iterator[None]:
    """Let another configuration be composed where a program runs in hydra.main, which has Hydra's only place."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def composed(overrides: Sequence[str] = (), *, config_name: str = CONFIG_NAME) -> DictConfig:
    """Compose the configuration of these command-line overrides. Raises ConfigError."""
    register_recipes()
    try:
        with _hydra_apart(), initialize_config_dir(config_dir=str(folder_of("conf")), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise config_error(error, overrides, lambda kept: composed(kept, config_name=config_name)) from None


def check_arguments(arguments: Sequence[str], *, config_name: str = CONFIG_NAME, schema: type = Run) -> None:
    """Compose and check the configuration of a command line, of every job of a sweep. Raises ConfigError."""
    args, unknown = get_args_parser().parse_known_args(list(arguments))
    if unknown:
        # argparse takes options in one row alone: KEY=VALUE after a flag that stood behind others is left over.
        hint = "flags stand before all options or behind them" if "=" in unknown[0] else "options are written KEY=VALUE"
        raise ConfigError(f"{unknown[0]} is no option here: {hint}; --help lists them", key=unknown[0])
    if args.multirun and (args.cfg or args.info):
        raise ConfigError("-m runs several jobs, and --cfg and --info show one: leave -m out", key="--multirun")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {args.config_dir}: there is no such folder", key="--config-dir", seen=args.config_dir
        )
    if args.config_name and not args.config_path:
        folders = [folder_of("conf"), *([Path(args.config_dir)] if args.config_dir else [])]
        file = f"{args.config_name.removesuffix('.yaml')}.yaml"
        if not any((folder / file).is_file() for folder in folders):
            raise ConfigError(
                f"--config-name {args.config_name}: there is no {file} in {folders[-1]}; see --config-dir",
                key="--config-name",
                seen=args.config_name,
            )
    if args.help or args.hydra_help or args.info or args.shell_completion or args.config_path or args.config_name:
        return
    search = [f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]"] if args.config_dir else []
    for overrides in _jobs(args.overrides) if args.multirun else [args.overrides]:
        cfg = composed([*search, *overrides], config_name=config_name)
        if not args.cfg:
            if "output_dir" in cfg:
                cfg.output_dir = ""  # Hydra has not made the folder yet
            check(cfg, schema=schema)


def check(cfg: DictConfig, *, schema: type = Run) -> None:
    """Raise ConfigError for the first key of `cfg` that is unknown, missing, or of a type other than in `schema`."""
    if missing := _first_missing(OmegaConf.to_container(cfg)):
        raise _no_value(missing)
    try:
        options: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        if error.full_key in _MISSING:
            raise _no_value(error.full_key) from None
        raise ConfigError(f"{error.full_key}: {first_line(error)}", key=error.full_key) from None
    _check_call(schema, options, where="")
    built = _BUILT if issubclass(schema, Run) else ()
    if empty := [name for name in built if name in options and "_target_" not in options[name]]:
        raise ConfigError(f"{empty[0]} has no _target_: choose one, {empty[0]}=NAME; --help lists them", key=empty[0])
    if absent := [field.name for field in fields(schema) if field.name not in options]:
        raise ConfigError(f"a run needs {absent[0]}, and it was taken out", key=absent[0])


def build(section: DictConfig, *, where: str, **given: Any) -> Any:
    """Build the object that a section describes; one with `_partial_` is called with `given`, if any.

    Raises ConfigError with the section as its key where the class refuses the values.
    """
    try:
        options: Any = OmegaConf.to_container(section, resolve=True)
        kept = {name: value for name, value in options.items() if f"{where}.{name}" not in _READ_BY_THE_RUN}
        made = instantiate(kept, _convert_="all")
        return made(**given) if given and isinstance(made, partial) else made
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, PetalsTuneError):
            raise cause from None
        raise ConfigError(f"{where}: {first_line(cause)}", key=where) from error
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        if isinstance(error, PetalsTuneError):
            raise
        raise ConfigError(f"{where}: {first_line(error)}", key=where) from error


def _no_value(key: str) -> ConfigError:
    hint = _MISSING.get(key, f"give {key}=...").format(recipes=", ".join(recipe_names()))
    return ConfigError(f"{key} has no value: {hint}", key=key)


def _first_missing(section: Any, where: str = "") -> str | None:
    """Return the first key whose value is `???`."""
    for name, value in section.items():
        if value == "???":
            return f"{where}{name}"
        if isinstance(value, dict) and (found := _first_missing(value, f"{where}{name}.")):
            return found
    return None


def _check_call(target: Callable[..., Any], options: Mapping[str, Any], *, where: str) -> None:
    """Check that `target` takes `options` as keywords, with values of the annotated types. Raises ConfigError."""
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    for name, value in options.items():
        if name in HYDRA_KEYS:
            continue
        key = f"{where}.{name}" if where else name
        if key in _READ_BY_THE_RUN:
            _check_value(value, _READ_BY_THE_RUN[key], key)
            continue
        if name not in parameters and not open_ended:
            raise unknown_option(key, list(parameters), set_now=list(options), built=options.get("_target_"))
        hint = hints.get(name, Any)
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
            _check_call(hint, value, where=key)
        elif isinstance(value, dict):
            _check_section(value, where=key)
        else:
            _check_value(value, hint, key)


def _check_section(section: Mapping[str, Any], *, where: str) -> None:
    if "_target_" in section:
        _check_call(import_target(section, where=where), section, where=where)
        return
    for name, value in section.items():
        if isinstance(value, dict):
            _check_section(value, where=f"{where}.{name}")


def _check_value(value: Any, hint: Any, key: str) -> None:
    parts = (hint, *get_args(hint))
    if isinstance(value, str) and str not in parts and any(get_origin(part) is Sequence for part in parts):
        # pydantic takes a text for a sequence of letters.
        raise ConfigError(
            f"{key} is {value!r}: it must be a list in brackets, as in '{key}=[{value}]'", key=key, seen=value
        )
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return  # a hint that only its own library understands: the class itself checks its values
    except ValidationError as error:
        wanted = dict.fromkeys(
            part["msg"].removeprefix("Input should be ").partition(", unable")[0] for part in error.errors()
        )
        a_list = f" in brackets, as in '{key}=[{value}]'" if "a valid list" in wanted and isinstance(value, str) else ""
        raise ConfigError(
            f"{key} is {value!r}: it must be {' or '.join(wanted)}{a_list}", key=key, seen=value
        ) from None


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    # A dataclass may inherit fields whose hints only its parent's module can resolve: ask the class for those.
    function = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return {}


def _jobs(overrides: Sequence[str]) -> Iterable[list[str]]:
    """Return the overrides of each job of a sweep; none for a sweeper that chooses them later."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(override.key_or_group == "hydra/sweeper" for override in parsed):
        return []
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
