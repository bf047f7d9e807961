"""Sessions and steps of generation, by direct calls of an engine."""

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import PetalsTuneError
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan

SPAN = BlockSpan(1, 4)
TOLERANCE = 1e-5
LINEAR = {"bloom": ("self_attention.query_key_value", 96), "llama": ("mlp.gate_proj", 48)}


def hidden(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def session(
    rows: int = 1, *, adapter: Adapter | None = None, version: str | None = None, client: str = "client"
) -> Session:
    return Session(
        client=version or client,
        span=SPAN,
        rows=rows,
        max_length=32,
        adapter=adapter,
        adapter_version=version,
    )


def step(tensor: torch.Tensor, position: int, **fields) -> Step:
    return Step(session=0, hidden=tensor, position=position, **fields)


def lora(family: str, seed: int) -> Adapter:
    module, wide = LINEAR[family]
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(4, 32, generator=generator), torch.randn(wide, 4, generator=generator)]
    return Adapter((AdapterPart(block=2, method="lora", module=module, scaling=1.0, tensors=pair),))


def outputs(engine: Engine, *steps: tuple[Session, Step]) -> list[torch.Tensor]:
    made = engine.step(steps)
    assert not [each for each in made if isinstance(each, PetalsTuneError)], made
    return made  # type: ignore[return-value]
