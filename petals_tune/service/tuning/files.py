"""OpenAI's paths of uploaded files, which are chats to tune on."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.files import replacing
from petals_tune.service.errors import ServiceError, too_many
from petals_tune.service.tuning.chats import check_chats
from petals_tune.service.tuning.paging import page
from petals_tune.service.tuning.store import FileRecord, Store

PURPOSE = "fine-tune"
MB = 10**6
_AROUND = 2**16  # bytes of a request beside its file: headers of parts, other fields


class Files:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, store: Store, folder: Path, *, most_mb: int, most_mb_a_key: int):
        """folder: of the files; most_mb: of one file; most_mb_a_key: of all files of an owner."""
        self._store, self._folder = store, folder
        self._most, self._most_a_key = most_mb * MB, most_mb_a_key * MB
        self._uploading: set[str] = set()  # owners

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._list),
            Route("/v1/files/{id}", self._retrieve),
            Route("/v1/files/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self._content),
        ]

    def path(self, id: str) -> Path:
        return self._folder / f"{id}.jsonl"

    def find(self, id: str, owner: str, *, param: str | None = None) -> FileRecord:
        """Raises ServiceError (404) for a file that this owner does not have."""
        file = self._store.one(FileRecord, id=id)
        if file is None or file.owner != owner:
            raise ServiceError(
                404, f"there is no file {id!r} here", kind="invalid_request_error", code="not_found", param=param
            )
        return file

    async def _upload(self, request: Request) -> Response:
        owner = request.state.owner
        if owner in self._uploading:  # what is uploaded is on the disk before it is counted
            raise too_many("a file of this key is being uploaded: one at a time", retry_after_s=1)
        self._uploading.add(owner)
        try:
            return JSONResponse(_described(await self._received(request, owner)))
        finally:
            self._uploading.remove(owner)

    async def _received(self, request: Request, owner: str) -> FileRecord:
        try:
            form = await MultiPartParser(request.headers, self._limited(request), max_files=1).parse()
        except ClientDisconnect:
            raise ConfigError("the upload was given up", key="file") from None
        except (MultiPartException, KeyError) as error:
            raise ConfigError(f"the body is no form with a file: {error}", key="file") from None
        try:
            return await self._taken(form, owner)
        finally:
            await form.close()

    async def _taken(self, form: FormData, owner: str) -> FileRecord:
        """Store the file of a form, whole or not at all."""
        given = form.get("file")
        if not isinstance(given, UploadFile):
            raise ConfigError("file: a file is needed", key="file")
        if (purpose := form.get("purpose")) != PURPOSE:
            raise ConfigError(f"purpose is {purpose!r}: files are for {PURPOSE} alone", key="purpose", seen=purpose)
        if other := sorted(form.keys() - {"file", "purpose"}):
            raise ConfigError(f"{other[0]} is not honoured here: leave it out", key=other[0])
        size = given.size or 0
        if size + sum(file.bytes for file in self._store.files(owner)) > self._most_a_key:
            raise _too_large(f"the files of a key may have {self._most_a_key // MB} MB in all: delete one")
        id = f"file-{secrets.token_hex(12)}"

        def write() -> None:
            with replacing(self.path(id), key="folder") as partial:
                with partial.open("wb") as file:
                    shutil.copyfileobj(given.file, file)
                check_chats(partial)

        await asyncio.to_thread(write)
        record = FileRecord(id=id, owner=owner, name=given.filename or id, bytes=size, created_s=time.time())
        self._store.put(record)
        return record

    async def _limited(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The bytes of a request. Raises ServiceError (413) where they are too many."""
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            if count > self._most + _AROUND:
                raise _too_large(f"a file may have {self._most // MB} MB")
            yield chunk

    async def _list(self, request: Request) -> Response:
        files = self._store.files(request.state.owner)
        if request.query_params.get("order", "desc") == "asc":
            files.reverse()
        if request.query_params.get("purpose", PURPOSE) != PURPOSE:
            files = []
        return page(request, files, _described, default=10000, most=10000)

    async def _retrieve(self, request: Request) -> Response:
        return JSONResponse(_described(self._found(request)))

    async def _content(self, request: Request) -> Response:
        # As a download, whatever stands in it: it is a stranger's.
        return FileResponse(self.path(self._found(request).id), media_type="application/octet-stream")

    async def _delete(self, request: Request) -> Response:
        id = self._found(request).id
        self._store.remove(FileRecord, id=id)  # first: a file that nobody names is none any more
        self.path(id).unlink(missing_ok=True)
        return JSONResponse({"id": id, "object": "file", "deleted": True})

    def _found(self, request: Request) -> FileRecord:
        return self.find(request.path_params["id"], request.state.owner)


def _described(file: FileRecord) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_s),
        "filename": file.name,
        "purpose": PURPOSE,
        "status": "processed",
    }


def _too_large(message: str) -> ServiceError:
    return ServiceError(413, message, kind="invalid_request_error", code="file_too_large", param="file")
