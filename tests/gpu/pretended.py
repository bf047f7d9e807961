"""Section of a rehearsal: the requests of `requests` on a pretended GPU."""

from __future__ import annotations

from tests.blocks import device_requests as requests
from tests.gpu.context import Context
from tests.gpu.requests import check_family
from tests.pretend_device import GpuEngine


def run(context: Context) -> None:
    for family in requests.LINEARS:
        with context.trying(family):
            check_family(context, family, GpuEngine)
