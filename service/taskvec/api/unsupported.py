"""Fields of other embedding APIs that change vectors and are not served.

If they were ignored, the client would get other vectors than it asked for, without noticing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskvec.errors import InvalidRequestError

_ONE_VECTOR = "the answer has one vector for each text"
_TEXT_ONLY = 'this model embeds text only: send {"text": string}, for example a caption, in input'
_PROMPTS = (
    "a prompt belongs to a task: name the task in task or input_type, or write the words before "
    "the text in input"
)
_DIMENSIONS = "send the number of dimensions in dimensions"
_TYPES = "send the output type in embedding_type"
_CUT = "send truncate: true, which cuts the end of a text at the model's limit, or shorten it"

UNSUPPORTED: Mapping[str, str] = {
    "late_chunking": (
        "each text is embedded without the others: send each part with the context that it needs"
    ),
    "return_multivector": _ONE_VECTOR,
    "multi_vector": _ONE_VECTOR,
    "multivector": _ONE_VECTOR,
    "late_interaction": _ONE_VECTOR,
    "return_colbert_vecs": _ONE_VECTOR,
    "return_sparse": f"{_ONE_VECTOR}, and it is dense",
    "sparse": f"{_ONE_VECTOR}, and it is dense",
    "prompt": _PROMPTS,
    "prompts": _PROMPTS,
    "prompt_name": _PROMPTS,
    "instruction": _PROMPTS,
    "instructions": _PROMPTS,
    "query_instruction": _PROMPTS,
    "taskType": "send the task in task",
    "task_name": "send the task in task",
    "image": _TEXT_ONLY,
    "images": _TEXT_ONLY,
    "image_url": _TEXT_ONLY,
    "image_base64": _TEXT_ONLY,
    "video": _TEXT_ONLY,
    "video_url": _TEXT_ONLY,
    "video_base64": _TEXT_ONLY,
    "audio": _TEXT_ONLY,
    "audio_url": _TEXT_ONLY,
    "input_audio": _TEXT_ONLY,
    "pdf": _TEXT_ONLY,
    "modality": _TEXT_ONLY,
    "title": "write the title before the text",
    "messages": "send the texts in input",
    "inputs": "send the texts in input",
    "pooling": "the checkpoint decides how tokens become a vector",
    "add_special_tokens": "the tokenizer's special tokens are always added",
    "truncate_prompt_tokens": _CUT,
    "truncation_direction": _CUT,
    "truncation_side": _CUT,
    "dimension": _DIMENSIONS,
    "dimensionality": _DIMENSIONS,
    "embedding_dimensions": _DIMENSIONS,
    "outputDimensionality": _DIMENSIONS,
    "output_dimensions": _DIMENSIONS,
    "truncate_dim": _DIMENSIONS,
    "precision": _TYPES,
    "embed_dtype": _TYPES,
    "endianness": "the bytes of vectors are little-endian",
}
"""Field -> what to do instead."""

UNSUPPORTED_IN_ITEMS: Mapping[str, str] = {"url": _TEXT_ONLY, "bytes": _TEXT_ONLY}
"""What an item of the input cannot have either: langchain's images for Jina."""

NOTHING: tuple[Any, ...] = (None, False)
"""Values of a field that is not used."""

SERVED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "modality": (None, False, "text"),
    "add_special_tokens": (None, True),
    "truncation_direction": (None, False, "right", "Right"),
    "truncation_side": (None, False, "right"),
    "precision": (None, False, "float32"),
    "embed_dtype": (None, False, "float32"),
    "endianness": (None, False, "native", "little"),
    "encoding_format": (None, False, "float"),
    "embedding_type": (None, False, "float"),
    "embedding_types": (None, False, ["float"]),
    "output_dtype": (None, False, "float"),
    "normalize": (None, True),
    "normalized": (None, True),
}
"""Values that ask for what is served anyway, of the fields that have other ones than NOTHING."""


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Refuse a request body with a field that would change its vectors.

    Raises:
        InvalidRequestError: names the field, and what to do instead.
    """
    if not UNSUPPORTED.keys().isdisjoint(given):
        _refuse(given, UNSUPPORTED, "")


def refuse_unsupported_in_item(
    item: Mapping[str, Any], where: str, of_the_request: Mapping[str, Any]
) -> None:
    """Refuse an item of the input with a field that would change its vector.

    Args:
        item: an object with a text, or something else than a text.
        where: its path in the request.
        of_the_request: fields that a request has beside its input, for all items.

    Raises:
        InvalidRequestError: names the field, and what to do instead.
    """
    _refuse(item, UNSUPPORTED, f"{where}.")
    _refuse(item, UNSUPPORTED_IN_ITEMS, f"{where}.")
    _refuse(item, of_the_request, f"{where}.")


def _refuse(given: Mapping[str, Any], fields: Mapping[str, str], path: str) -> None:
    for name, value in given.items():
        if name in fields and not is_served(name, value):
            raise InvalidRequestError(
                f"{path}{name} is not served: {fields[name]}.",
                code="unsupported_field",
                param=f"{path}{name}",
            )


def unserved_schema(refused: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON schemas of fields that are refused unless their values ask for nothing."""
    return {
        name: {
            "enum": list(SERVED_VALUES.get(name, NOTHING)),
            "description": f"Not served: {instead}.",
        }
        for name, instead in refused.items()
    }


def is_served(name: str, value: Any) -> bool:
    """Return whether a value of a field asks for nothing but what is served; 0 is not false."""
    served = SERVED_VALUES.get(name, NOTHING)
    return any(type(value) is type(other) and value == other for other in served)
