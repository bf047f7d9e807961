"""Pages of lists, as OpenAI's clients ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse

from petals_tune.errors import ConfigError

T = TypeVar("T")


def page(
    request: Request, found: Sequence[T], describe: Callable[[T], dict[str, Any]], *, default: int, most: int
) -> JSONResponse:
    """Answer with a part of a list: `limit` members behind the one with the id `after`.

    Raises ConfigError for a limit that is none, or an id that is not in the list.
    """
    given, after = request.query_params.get("limit", str(default)), request.query_params.get("after")
    if not given.isdecimal() or not 1 <= int(given) <= most:
        raise ConfigError(f"limit is {given}: a number from 1 to {most} is needed", key="limit", seen=given)
    described = [describe(each) for each in found]
    ids = [each["id"] for each in described]
    if after is not None and after not in ids:
        raise ConfigError(f"after is {after!r}, which is not in this list", key="after", seen=after)
    start = 0 if after is None else ids.index(after) + 1
    part = described[start : start + int(given)]
    return JSONResponse(
        {
            "object": "list",
            "data": part,
            "first_id": part[0]["id"] if part else None,
            "last_id": part[-1]["id"] if part else None,
            "has_more": start + len(part) < len(described),
        }
    )
