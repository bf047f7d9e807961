"""Open a swarm to clients of other interfaces: python -m petals_tune.serve [key=value ...]"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import hydra
from omegaconf import DictConfig
from pydantic import Field

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import Section, TunedModel, build, check, check_arguments, folder_of

CONFIG_NAME = "service"

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class TinkerLimits:
    """What Tinker's interface keeps, and for how long."""

    runs_in_memory: Count
    samplers_in_memory: Count
    session_hours: Positive
    unnamed_hours: Positive
    autosave_minutes: Positive | None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Options of tuning jobs."""

    recipe: str
    at_once: Count
    jobs_a_key: Count
    file_mb: Count
    files_mb_a_key: Count
    tokens: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Service:
    """All options of the service; conf/service.yaml documents them."""

    model: TunedModel
    swarm: Section
    name: str | None
    aliases: Sequence[str]
    adapters: str | None
    folder: str
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    api_keys: str | None
    most_at_once: Count
    most_waiting: Count
    requests_a_key: Count
    tokens_a_minute: Count | None
    stop_s: Annotated[float, Field(ge=0)]
    max_length: Count
    tinker: TinkerLimits
    tuning: Tuning
    outputs: str | None


def main() -> None:
    """python -m petals_tune.serve [key=value ...]"""
    quiet_libraries()
    with report_errors():
        check_arguments(sys.argv[1:], config_name=CONFIG_NAME, schema=Service)
        serve()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def serve(cfg: DictConfig) -> None:
    """Serve until interrupted."""
    with report_errors():
        check(cfg, schema=Service)  # again: --config-name may have named another file than ours
        from petals_tune.service.run import run_service  # slow; a mistyped key should not wait for it

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        run_service(cfg, build(cfg.swarm, where="swarm"))


if __name__ == "__main__":
    main()
