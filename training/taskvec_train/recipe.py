"""A recipe: everything that decides what a training run makes, read from one TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from taskvec_train.errors import RecipeError

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Paths = tuple[str, ...]


class Part(BaseModel):
    """A table of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Part):
    """What is put before a text, joined to it before tokenising."""

    query: str = "Query: "
    document: str = "Document: "


class Teacher(Part):
    """Whose vectors are followed."""

    model: str = Field(description="A folder, package:NAME/FOLDER, or a hub id.")
    max_tokens: Size = 512
    batch_tokens: Size = 16_384
    query_instruction: str = Field(
        default="", description="Put before queries, for the teacher alone."
    )
    document_instruction: str = ""


class Student(Part):
    """Where the student comes from: a pretrained checkpoint, or a shape filled from the teacher."""

    base: str | None = Field(
        default=None, description="A checkpoint folder or hub id; no shape then."
    )
    architecture: Literal["qwen3", "eurobert"] = "qwen3"
    hidden: Size = 256
    layers: Size = 4
    heads: Size = 4
    kv_heads: Size = 4
    head_dim: Size = 64
    intermediate: Size = 768
    norm_eps: Positive = 1e-6
    rope_theta: Positive = 100_000.0
    max_positions: Size = 2048
    least_count: Size = Field(default=1, description="Pieces seen less often leave the vocabulary.")
    projection: Literal["words", "random"] = Field(
        default="words",
        description="psi starts as the inverse of the words' projection, or at random.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        shape = self.model_fields_set - {"base", "projection"}
        if self.base is not None and shape:
            raise ValueError(f"base is a whole model: leave out {', '.join(sorted(shape))}")
        return self


class Steps(Part):
    """How long and how fast a stage learns."""

    steps: Size
    lr: Positive
    embedding_lr: Positive | None = Field(
        default=None, description="Of the embedding table; lr if none."
    )
    projection_lr: Positive | None = Field(default=None, description="Of psi; lr if none.")
    warmup: Count = Field(default=0, description="Steps in which the rate rises from zero.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Rate = 0.01
    clip: Positive = 1.0
    accumulate: Size = Field(default=1, description="Batches of a step.")
    checkpointing: bool = Field(
        default=False, description="Compute states twice, keep fewer of them."
    )
    compile: bool = Field(default=False, description="torch.compile the backbone.")
    save_every: Size = 500
    keep: Size = Field(default=2, description="States of a run that are kept to go on from.")
    log_every: Size = 10
    sample: Count = Field(
        default=0, description="Most records of each kind of data; 0 for all. See data/sampling.py."
    )


class Phase(Steps):
    """A phase of stage 1: the whole student follows the teacher."""

    name: Name
    texts: Paths = Field(default=(), description="Files or folders of texts, as documents.")
    pairs: Paths = Field(
        default=(), description="Of pairs: anchors as queries, positives as documents."
    )
    held_out: Paths = Field(
        default=(), description="Texts on which the cosine is measured, never learnt."
    )
    batch_tokens: Size = 8192
    max_tokens: Size = 512
    min_tokens: Count = Field(default=0, description="Shorter texts are left out.")
    rope_theta: Positive | None = Field(
        default=None, description="In training; the student's if none."
    )
    distill: Rate = 1.0
    similarity: Rate = 0.0

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.texts and not self.pairs:
            raise ValueError("name texts, pairs or both")
        return self


class Adapter(Steps):
    """Stage 2: one LoRA adapter on the frozen student."""

    name: Name
    rank: Size = 32
    alpha: Size = 32
    batch: Size = Field(description="Records of a batch of one process.")
    max_tokens: Size = 512
    prompts: Prompts | None = Field(
        default=None, description="The adapter's own; the model's if none."
    )
    rope_theta: Positive | None = Field(
        default=None, description="In training; the student's if none."
    )


class Mine(Part):
    """Hard negatives from the positives of other pairs, by the teacher."""

    count: Size = Field(default=20, description="Of each pair, at most.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="Of the positive's teacher cosine: a negative stays below."
    )
    first: Count = Field(default=0, description="First rank looked at.")
    last: Size = Field(default=100, description="Rank at which looking ends.")


class RetrievalAdapter(Adapter):
    """Queries find documents."""

    loss: Literal["retrieval"]
    pairs: Annotated[Paths, Field(min_length=1)]
    temperature: Positive = 0.02
    infonce: Rate = 1.0
    distill: Rate = 2.0
    gor: Rate = 1.0
    hard_negatives: Count = 1
    margin: Positive = Field(
        default=0.95, description="Of the positive's teacher cosine: more is no foe."
    )
    mine: Mine | None = Field(default=None, description="Where the pairs have no negatives.")
    average_with: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5,
        description="Part of the steps whose weights are averaged with the last; 0 for none.",
    )


class TextMatchingAdapter(Adapter):
    """Texts that mean the same lie close."""

    loss: Literal["text-matching"]
    scored: Paths = ()
    pairs: Paths = ()
    score_temperature: Positive = 0.05
    temperature: Positive = 0.02
    cosent: Rate = 1.0
    infonce: Rate = 1.0
    distill: Rate = 2.0
    margin: Positive = 0.95

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.scored and not self.pairs:
            raise ValueError("name scored, pairs or both")
        return self


class ClusteringAdapter(Adapter):
    """Texts on one topic lie close."""

    loss: Literal["clustering"]
    texts: Paths = ()
    labelled: Paths = ()
    instruction: str = Field(default="", description="For the teacher, before every text.")
    centroid: Rate = Field(
        default=0.0, description="Of the label's mean teacher vector, added to each."
    )
    distill: Rate = 1.0
    similarity: Rate = 0.0

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.texts and not self.labelled:
            raise ValueError("name texts, labelled or both")
        if self.centroid and not self.labelled:
            raise ValueError("centroid needs labelled")
        return self


class ClassificationAdapter(Adapter):
    """Texts of a class lie close."""

    loss: Literal["classification"]
    labelled: Annotated[Paths, Field(min_length=1)]
    temperature: Positive = 0.02
    negatives: Size = 7
    infonce: Rate = 1.0
    relational: Rate = 20.0


AnyAdapter = Annotated[
    RetrievalAdapter | TextMatchingAdapter | ClusteringAdapter | ClassificationAdapter,
    Field(discriminator="loss"),
]


class Export(Part):
    """What the checkpoint says of itself."""

    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    rope_theta: Positive | None = Field(
        default=None, description="When serving; the student's if none."
    )
    max_tokens: Size | None = Field(
        default=None, description="Of a text when serving; positions if none."
    )
    default_prompt: Literal["query", "document"] | None = "document"
    licence: str = "apache-2.0"
    language: str = "en"
    summary: str = Field(description="The card's first paragraph.")
    data: str = Field(description="The card's paragraph on text, sources and licences.")


class Recipe(Part):
    """All stages of a model."""

    name: Name
    seed: Count = 0
    dimensions: Annotated[tuple[Size, ...], Field(min_length=1)]
    prompts: Prompts = Prompts()
    teacher: Teacher
    student: Student = Student()
    distill: tuple[Phase, ...] = ()
    adapt: tuple[AnyAdapter, ...] = ()
    export: Export

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for names in ([part.name for part in self.distill], [part.name for part in self.adapt]):
            if len(set(names)) < len(names):
                raise ValueError(f"two stages have one name: {', '.join(names)}")
        return self


def read_recipe(file: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        file: TOML.
        changes: ``key=value``, the key with dots (``distill.0.steps``, or a stage's name for its
            number), the value as TOML; each replaces what the file says.

    Raises:
        RecipeError: it cannot be read; every wrong key is named.
    """
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {file} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{file} is no TOML: {error}.") from None
    for change in changes:
        _change(content, change)
    with _clear_faults(f"{file} is no recipe that can be run"):
        return Recipe.model_validate(content)


def adapter_recipe(
    name: str,
    loss: str,
    data: Sequence[str],
    options: Mapping[str, Any],
    *,
    prompts: Mapping[str, str],
    changes: Sequence[str] = (),
) -> AnyAdapter:
    """The recipe of one adapter from a command line.

    Args:
        name: of the task.
        loss: of ``retrieval``, ``text-matching``, ``clustering``, ``classification``.
        data: paths; pairs, or what the loss learns from (text-matching: scored pairs too).
        options: keys of ``Adapter``.
        prompts: ``query`` and ``document``.
        changes: ``key=value`` over all that.

    Raises:
        RecipeError: a key is unknown, or a value cannot be.
    """
    content = {
        "name": name,
        "loss": loss,
        _DATA_OF[loss]: list(data),
        "prompts": {side: prompts[side] for side in ("query", "document") if side in prompts},
        **options,
    }
    for change in changes:
        _change(content, change)
    with _clear_faults(f"The adapter {name!r} cannot be trained so"):
        return TypeAdapter[AnyAdapter](AnyAdapter).validate_python(content)


_DATA_OF = {
    "retrieval": "pairs",
    "text-matching": "scored",
    "clustering": "labelled",
    "classification": "labelled",
}
"""Where the command line's data goes."""


@contextmanager
def _clear_faults(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise RecipeError("\n".join([f"{what}:", *faults])) from None


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *path, last = key.split(".")
    place: Any = content
    try:
        for step in path:
            place = _inside(place, step)
        place[last] = tomllib.loads(f"value {equals} {value}")["value"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecipeError(
            f"--set {change!r} cannot be applied ({error}): write key=value, for example "
            "distill.0.steps=10 or adapt.retrieval.lr=1e-4, and strings in quotes."
        ) from None


def _inside(place: Any, step: str) -> Any:
    """A table's entry; of a list the one with that number or name."""
    if isinstance(place, list):
        if step.isdecimal():
            return place[int(step)]
        (named,) = [entry for entry in place if entry.get("name") == step]
        return named
    return place[step]
