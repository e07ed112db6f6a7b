"""From the JSON of a dialect that takes texts only to a job."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from taskvec.api import fields
from taskvec.api.request import RequestLimits, request_priority, request_timeout
from taskvec.api.unsupported import is_served
from taskvec.auth.keys import Key
from taskvec.core.job import EmbedJob, TextName, listed
from taskvec.core.tasks import Task
from taskvec.errors import InvalidRequestError

TASK_IN_MODEL = dict.fromkeys(
    ("task", "task_type", "input_type", "prompt_name", "instruction"),
    "name the task after the model, as in model:task",
)
"""Fields of other APIs that name a task, for a dialect that has none of its own: ignored, they
would give vectors of another task than the client expects."""

_TEXTS = ("input", "inputs", "texts", "text", "content", "contents", "prompt", "documents")
_REQUESTS = ("requests", "config", "embedContentConfig")
_TASKS = (*TASK_IN_MODEL, "tasks", "taskType", "inputType", "instructions", "prompts")
_DIMENSIONS = (
    "dimensions",
    "dimension",
    "output_dimension",
    "output_dimensions",
    "outputDimension",
    "outputDimensionality",
    "output_dimensionality",
    "truncate_dim",
)
_TYPES = ("embedding_type", "embedding_types", "output_dtype", "encoding_format", "precision")
_NORMALIZED = ("normalize", "normalized")
_MEDIA = ("image", "images", "image_url", "video", "audio", "input_audio")
_VECTORS = ("late_chunking", "late_interaction", "return_multivector", "multi_vector")


def other_fields(
    own: Collection[str],
    *,
    texts: str,
    task: str,
    dimensions: str = "vectors have all their dimensions",
    types: str = "the answer has floats",
    normalized: str = "vectors have length 1",
) -> dict[str, str]:
    """Return fields of other APIs that a dialect does not read, and what a client should do.

    If they were ignored, the client would get other vectors than it asked for, without noticing.

    Args:
        own: fields that the dialect reads.
        texts: where it reads texts.
        task: where it reads the task.
        dimensions: where it reads the number of dimensions.
        types: where it reads the type of numbers.
        normalized: where it reads whether vectors are normalised.
    """
    groups = {
        _TEXTS: texts,
        _REQUESTS: texts,
        _TASKS: task,
        _DIMENSIONS: dimensions,
        _TYPES: types,
        _NORMALIZED: normalized,
        _MEDIA: "this model embeds texts only",
        _VECTORS: "each text has one vector, which depends on no other text",
    }
    return {
        field: advice for group, advice in groups.items() for field in group if field not in own
    }


def json_object(value: Any, field: str = "The body") -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        InvalidRequestError: something else.
    """
    if isinstance(value, dict):
        return value
    raise InvalidRequestError(f"{field} must be a JSON object, got {fields.type_name(value)}.")


def list_of(value: Any, field: str, most: int) -> list[Any]:
    """Return a list that is neither empty nor too long.

    Raises:
        InvalidRequestError: no list, an empty one, or one of more than ``most`` items.
    """
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{field} must be a list, got {fields.type_name(value)}.",
            code="invalid_input",
            param=field,
        )
    if not value:
        raise InvalidRequestError(
            f"{field} is an empty list: send at least one text.", code="empty_input", param=field
        )
    if len(value) > most:
        advice = f"at most {most} fit in one request" if most > 1 else "send one text in each"
        raise InvalidRequestError(
            f"{field} has {len(value)} items: {advice}.",
            code="too_many_inputs",
            param=field,
        )
    return value


def text(value: Any, field: str) -> str:
    """Return a string that is not empty.

    Raises:
        InvalidRequestError: something else.
    """
    if not isinstance(value, str):
        raise InvalidRequestError(
            f"{field} must be a string, got {fields.type_name(value)}.",
            code="invalid_input",
            param=field,
        )
    if not value:
        raise InvalidRequestError(
            f"{field} is an empty string: send a text.",
            code="empty_input",
            param=field,
        )
    return value


def texts(value: Any, field: str, most: int) -> list[str]:
    """Return a list of strings, neither of which is empty; see ``list_of`` and ``text``."""
    return [
        item if type(item) is str and item else text(item, f"{field}[{i}]")
        for i, item in enumerate(list_of(value, field, most))
    ]


def text_or_texts(value: Any, field: str, most: int) -> tuple[list[str], TextName]:
    """Return the texts of a string or a list of strings, and their names for errors."""
    if isinstance(value, list):
        return texts(value, field, most), listed(field)
    return [text(value, field)], alone(field)


def alone(field: str) -> TextName:
    """Return the name of a text that is the value of a field."""
    return lambda _: field


def two_fields(first: TextName, others: TextName, size: int = 1) -> TextName:
    """Return the names of texts that are the values of two fields.

    Args:
        first: names of the first texts.
        others: names of the others.
        size: number of the first texts.
    """
    return lambda index: first(index) if index < size else others(index - size)


def missing(field: str, remedy: str) -> InvalidRequestError:
    """Return the error of a request without its texts."""
    return InvalidRequestError(
        f"The field {field} is missing: {remedy}.", code="missing_input", param=field
    )


def choice(value: Any, field: str, allowed: Iterable[str], *, code: str) -> str:
    """Return a string that is one of some values.

    Raises:
        InvalidRequestError: something else.
    """
    name = fields.string(value, field, code=code)
    if name is None or name not in allowed:
        got = "null" if name is None else repr(name[:80])
        raise InvalidRequestError(
            f"{field} must be one of {', '.join(allowed)}, got {got}.", code=code, param=field
        )
    return name


def check_max_tokens(body: Mapping[str, Any], field: str, fitting: int) -> None:
    """Check a maximum number of tokens of a text, which has no effect if all that fit are below.

    Raises:
        InvalidRequestError: a smaller number, or none.
    """
    if body.get(field) is None:
        return
    if fields.integer(body[field], field, code="unsupported_field") < fitting:
        raise InvalidRequestError(
            f"{field} below the {fitting} tokens that fit is not served: shorten the texts "
            "yourself.",
            code="unsupported_field",
            param=field,
        )


def refuse_unserved(body: Mapping[str, Any], reasons: Mapping[str, str], at: str = "") -> None:
    """Refuse fields that would change vectors and are not served.

    Values that ask for nothing, or for what is served anyway, are accepted.

    Args:
        body: JSON object.
        reasons: by field, what a client should know or do.
        at: what comes before the names of the object's fields.

    Raises:
        InvalidRequestError: names the field.
    """
    if reasons.keys().isdisjoint(body):
        return
    for field, reason in reasons.items():
        if field in body and not is_served(field, body[field]):
            raise InvalidRequestError(
                f"{at}{field} is not served: {reason}.",
                code="unsupported_field",
                param=f"{at}{field}",
            )


def text_job(
    inputs: Sequence[str],
    task: Task | Sequence[Task],
    headers: Mapping[str, str],
    key: Key | None,
    limits: RequestLimits,
    *,
    truncate: bool,
    text_name: TextName,
    truncation: str,
) -> EmbedJob:
    """Return the job of one request.

    Args:
        inputs: texts.
        task: of all of them, or of each.
        headers: of the request; may set its time and its priority.
        key: API key of the request.
        limits: limits of a request.
        truncate: truncate texts that are too long; if False, refuse them.
        text_name: the client's names of the texts, for errors.
        truncation: what the client sends to have texts truncated, for errors.
    """
    tasks = [task] if isinstance(task, Task) else task
    return EmbedJob(
        inputs=inputs,
        task=tasks[0],
        tasks=tasks if len(set(tasks)) > 1 else None,
        truncate=truncate,
        deadline=time.monotonic() + request_timeout(headers, limits.seconds),
        priority=request_priority(headers, key),
        tenant=key.name if key is not None else None,
        text_name=text_name,
        truncation=truncation,
    )
