"""Errors of requests, in OpenAI's form, so that its clients raise the exceptions that their users know."""

from __future__ import annotations

from typing import Any

from petals_tune.errors import (
    ConfigError,
    ConnectionLost,
    DataError,
    Diverged,
    PetalsTuneError,
    RequestRefused,
    Retriable,
    ServerBusy,
    SwarmTimeout,
)


class ServiceError(Exception):
    """An answer of the service that is no result: `status` of HTTP, and what OpenAI's errors say."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.retry_after_s = status, kind, code, param, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


def not_found(model: str, known: list[str]) -> ServiceError:
    return ServiceError(
        404,
        f"there is no model {model!r} here: {', '.join(known)}",
        kind="invalid_request_error",
        code="model_not_found",
        param="model",
    )


def bad_key() -> ServiceError:
    return ServiceError(
        401, "no API key, or one that is not known here", kind="invalid_request_error", code="invalid_api_key"
    )


def too_many(message: str, *, retry_after_s: float) -> ServiceError:
    return ServiceError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def too_large(most: int) -> ServiceError:
    return ServiceError(413, f"the body of a request has {most} bytes at most", kind="invalid_request_error")


def not_from_here() -> ServiceError:
    return ServiceError(
        403,
        "without api_keys, requests are answered that come to 127.0.0.1 by that name, and not from another site",
        kind="invalid_request_error",
    )


def stopping() -> ServiceError:
    return ServiceError(503, "the service is stopping", kind="server_error", code="stopping", retry_after_s=10)


def is_stopping(error: BaseException | None) -> bool:
    """Is this the error of a request that the service ended, or did not begin, since it stops?"""
    return isinstance(error, ServiceError) and error.code == "stopping"


def translated(error: PetalsTuneError) -> ServiceError:
    """An error of our own tree as the service tells it: whose fault it is decides the status."""
    cause = error.last if isinstance(error, SwarmTimeout) else error
    if isinstance(cause, ServerBusy):
        return too_many(str(error), retry_after_s=5)
    if isinstance(error, ConfigError | DataError | Diverged | RequestRefused):
        param = getattr(error, "key", None)
        return ServiceError(400, str(error), kind="invalid_request_error", param=param)
    if isinstance(error, Retriable | SwarmTimeout | ConnectionLost):
        return ServiceError(503, str(error), kind="server_error", code="swarm_unavailable", retry_after_s=10)
    return ServiceError(500, str(error), kind="server_error")
