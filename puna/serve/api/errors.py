"""Errors in the shape of OpenAI's API."""

import json
from typing import Any

from fastapi import Response


class Json(Response):
    """A JSON answer; escaped to ASCII, so that any text at all can be in it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class ApiError(Exception):
    """A request that cannot be answered. `param` names the field at fault, `code` the kind of fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        """The whole answer."""
        return Json(self.body(), self.status)
