"""POST, GET and DELETE /v1/files: videos uploaded once for many questions."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.serve.errors import ServeError
from runtime.serve.media import FileStore

_MOST_FIELDS = 8


class Uploads:
    """The endpoints of a file store."""

    def __init__(self, files: FileStore) -> None:
        self._files = files

    async def create(self, request: Request) -> Response:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ServeError(400, "invalid_request", "upload a file as multipart/form-data with the field file")
        try:
            form = await request.form(max_files=1, max_fields=_MOST_FIELDS)
        except UnicodeError as error:  # starlette refuses other invalid forms itself
            raise ServeError(400, "invalid_request", f"the form cannot be read: {error}") from None
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ServeError(400, "invalid_request", "the form has no file in the field file", param="file")
            for name in form:
                if name not in ("file", "purpose"):
                    raise ServeError(
                        400, "unsupported_parameter", f"{name[:60]}: this server does not support it", param=name[:60]
                    )
            purpose = form.get("purpose") or "user_data"
            if not isinstance(purpose, str):
                raise ServeError(400, "invalid_request", "purpose: give a text such as user_data", param="purpose")
            name = file.filename or "video"
            stored = await self._files.put(file.read, name=name, key=_key(request), purpose=purpose)
        finally:
            await form.close()
        return JSONResponse(stored.as_dict())

    async def list(self, request: Request) -> Response:
        files = [one.as_dict() for one in self._files.of(_key(request))]
        return JSONResponse({"object": "list", "data": files, "has_more": False})

    async def get(self, request: Request) -> Response:
        return JSONResponse(self._files.get(request.path_params["id"], _key(request)).as_dict())

    async def delete(self, request: Request) -> Response:
        id = request.path_params["id"]
        self._files.delete(id, _key(request))
        return JSONResponse({"id": id, "object": "file", "deleted": True})


def _key(request: Request) -> str:
    key: str = request.scope["state"]["key"]
    return key
