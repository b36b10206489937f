"""Errors as OpenAI's clients expect them: an object in a body, or an event at the end of a stream."""

from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an answer that says what is wrong."""
    return web.json_response(_error(status, message), status=status, headers=headers)


def error_event(status: int, message: str) -> bytes:
    """Return the event that ends a stream which cannot go on. It begins with the end of the event before it."""
    return b"\n\ndata: " + msgspec.json.encode(_error(status, message)) + b"\n\n"


def _error(status: int, message: str) -> dict[str, Any]:
    kind = _TYPES.get(status, HTTPStatus(status).phrase.replace(" ", "") + "Error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
