"""A real server that returns 1.01 times what it computes: python -m tests.faults.lying_server [key=value ...]"""

import dataclasses

from petals_tune.wire.messages import Forward
from servers.__main__ import main
from servers.adapters import Adapter
from servers.engine import Engine, Result

_honest = Engine.forward


def _scaled(engine: Engine, request: Forward, adapter: Adapter | None) -> Result:
    result = _honest(engine, request, adapter)
    return dataclasses.replace(result, output=result.output * 1.01)


if __name__ == "__main__":
    Engine.forward = _scaled  # type: ignore[method-assign]
    main()
