"""Options of a server as its command makes them."""

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from petals_tune.config import check, composed
from servers.options import Serve


def options_of(*overrides: str) -> Serve:
    cfg = composed(overrides, config_name="serve")
    check(cfg, schema=Serve)
    return TypeAdapter(Serve).validate_python(OmegaConf.to_container(cfg, resolve=True))
