"""Strict parsing of JSON bodies: a repeated key is an error, because only one of its values could be used."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from tnnlm.serving.schemas import ApiError

Model = TypeVar("Model", bound=BaseModel)


def parse_body(body: bytes, kind: str, model: type[Model]) -> Model:
    """Parse and validate a JSON body, which takes a while for a large one.

    Args:
        body: The body.
        kind: Content-Type of the request. A page of another site may send types other than JSON.
        model: Model that validates it.

    Raises:
        ApiError: 400 if the body is not JSON, or an object in it has a key twice.
        RequestValidationError: If the model refuses it.
    """
    media = kind.partition(";")[0].strip().lower()
    if not body or not (media == "application/json" or media.endswith("+json")):
        message = "the request has no JSON body; send one with Content-Type: application/json"
        raise ApiError(400, message)
    try:
        data = json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas of a model and its parts by name, for the components of an OpenAPI document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = schema.pop("$defs", {})
    return {model.__name__: schema, **parts}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ApiError(400, f"{key[:64]}: is given twice; omit one of the two", key[:64])
            seen.add(key)
    return found
