"""Recipes: the complete configuration of a training run, read from one TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from taskvec_train.errors import RecipeError

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Paths = tuple[str, ...]


class Table(BaseModel):
    """A table of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Table):
    """Prompts that are put before a text, before it is tokenised."""

    query: str = "Query: "
    document: str = "Document: "


class Teacher(Table):
    """The teacher model."""

    model: str = Field(description="A folder, package:NAME/FOLDER, or a hub id.")
    max_tokens: PositiveInt = 512
    batch_tokens: PositiveInt = 16_384
    query_instruction: str = Field(
        default="", description="Put before queries, only for the teacher."
    )
    document_instruction: str = ""


class Student(Table):
    """The student: a pretrained checkpoint, or a shape that is initialised from the teacher."""

    base: str | None = Field(
        default=None, description="A checkpoint folder or hub id, instead of a shape."
    )
    architecture: Literal["qwen3", "eurobert"] = "qwen3"
    hidden: PositiveInt = 256
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    intermediate: PositiveInt = 768
    norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 100_000.0
    max_positions: PositiveInt = 2048
    least_count: PositiveInt = Field(
        default=1, description="Vocabulary pieces that occur less often are removed."
    )
    projection: Literal["words", "random"] = Field(
        default="words",
        description="Initial psi: the inverse of the embeddings' projection, or random.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        shape = self.model_fields_set - {"base", "projection"}
        if self.base is not None and shape:
            raise ValueError(f"base is a complete model: remove {', '.join(sorted(shape))}")
        return self


class Steps(Table):
    """Steps, learning rates, schedule and saved states of a stage."""

    steps: PositiveInt
    lr: PositiveFloat
    embedding_lr: PositiveFloat | None = Field(
        default=None, description="Learning rate of the embedding table; default: lr."
    )
    projection_lr: PositiveFloat | None = Field(
        default=None, description="Learning rate of psi; default: lr."
    )
    warmup: NonNegativeInt = Field(default=0, description="Steps in which the rate rises from 0.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegativeFloat = 0.01
    clip: PositiveFloat = 1.0
    accumulate: PositiveInt = Field(default=1, description="Batches of one step.")
    checkpointing: bool = Field(
        default=False, description="Gradient checkpointing: less memory, more computation."
    )
    compile: bool = Field(default=False, description="torch.compile the backbone.")
    save_every: PositiveInt = 500
    keep: PositiveInt = Field(default=2, description="Number of saved states that are kept.")
    log_every: PositiveInt = 10
    sample: NonNegativeInt = Field(
        default=0,
        description="Maximum records of each kind of data, see data/sampling.py; 0: all.",
    )


class Phase(Steps):
    """A phase of stage 1, distillation: all weights of the student are trained."""

    name: Name
    texts: Paths = Field(default=(), description="Files or folders of texts, as documents.")
    pairs: Paths = Field(
        default=(),
        description="Files or folders of pairs; anchors are queries, positives documents.",
    )
    held_out: Paths = Field(
        default=(), description="Texts for validation: their cosine to the teacher is measured."
    )
    batch_tokens: PositiveInt = 8192
    max_tokens: PositiveInt = 512
    min_tokens: NonNegativeInt = Field(default=0, description="Shorter texts are dropped.")
    rope_theta: PositiveFloat | None = Field(
        default=None, description="During training; default: the student's."
    )
    distill: NonNegativeFloat = 1.0
    similarity: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.texts and not self.pairs:
            raise ValueError("set texts, pairs or both")
        return self


class Adapter(Steps):
    """Stage 2: one LoRA adapter on the frozen student."""

    name: Name
    rank: PositiveInt = 32
    alpha: PositiveInt = 32
    batch: PositiveInt = Field(description="Records of one batch of one process.")
    max_tokens: PositiveInt = 512
    prompts: Prompts | None = Field(
        default=None, description="The adapter's own prompts; default: the model's."
    )
    rope_theta: PositiveFloat | None = Field(
        default=None, description="During training; default: the student's."
    )


class Mine(Table):
    """Mining of hard negatives, with the teacher, from the positives of other pairs."""

    count: PositiveInt = Field(default=20, description="Maximum negatives of a pair.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95,
        description="Maximum teacher cosine of a negative, as a share of the positive's.",
    )
    first: NonNegativeInt = Field(default=0, description="First rank of the candidates.")
    last: PositiveInt = Field(default=100, description="End rank of the candidates (exclusive).")


class RetrievalAdapter(Adapter):
    """Retrieval: queries and the documents that answer them."""

    loss: Literal["retrieval"]
    pairs: Annotated[Paths, Field(min_length=1)]
    temperature: PositiveFloat = 0.02
    infonce: NonNegativeFloat = 1.0
    distill: NonNegativeFloat = 2.0
    gor: NonNegativeFloat = 1.0
    hard_negatives: NonNegativeInt = 1
    margin: PositiveFloat = Field(
        default=0.95,
        description="Candidates above this share of the positive's teacher cosine are ignored.",
    )
    mine: Mine | None = Field(default=None, description="Mine negatives, if the pairs have none.")
    average_with: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5,
        description="Share of the steps after which weights are averaged with the last; 0: none.",
    )


class TextMatchingAdapter(Adapter):
    """Semantic similarity: texts with the same meaning have similar vectors."""

    loss: Literal["text-matching"]
    scored: Paths = ()
    pairs: Paths = ()
    score_temperature: PositiveFloat = 0.05
    temperature: PositiveFloat = 0.02
    cosent: NonNegativeFloat = 1.0
    infonce: NonNegativeFloat = 1.0
    distill: NonNegativeFloat = 2.0
    margin: PositiveFloat = 0.95

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.scored and not self.pairs:
            raise ValueError("set scored, pairs or both")
        return self


class ClusteringAdapter(Adapter):
    """Clustering: texts on the same topic have similar vectors."""

    loss: Literal["clustering"]
    texts: Paths = ()
    labelled: Paths = ()
    instruction: str = Field(default="", description="Put before every text, only for the teacher.")
    centroid: NonNegativeFloat = Field(
        default=0.0, description="Weight of the label's mean teacher vector, added to each target."
    )
    distill: NonNegativeFloat = 1.0
    similarity: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.texts and not self.labelled:
            raise ValueError("set texts, labelled or both")
        if self.centroid and not self.labelled:
            raise ValueError("centroid needs labelled")
        return self


class ClassificationAdapter(Adapter):
    """Classification: texts of the same class have similar vectors."""

    loss: Literal["classification"]
    labelled: Annotated[Paths, Field(min_length=1)]
    temperature: PositiveFloat = 0.02
    negatives: PositiveInt = 7
    infonce: NonNegativeFloat = 1.0
    relational: NonNegativeFloat = 20.0


AnyAdapter = Annotated[
    RetrievalAdapter | TextMatchingAdapter | ClusteringAdapter | ClassificationAdapter,
    Field(discriminator="loss"),
]


class Export(Table):
    """Configuration and model card of the exported checkpoint."""

    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    rope_theta: PositiveFloat | None = Field(
        default=None, description="When serving; default: the student's."
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="Maximum tokens of a text when serving; default: positions."
    )
    default_prompt: Literal["query", "document"] | None = "document"
    licence: str = "apache-2.0"
    language: str = "en"
    summary: str = Field(description="The card's first paragraph.")
    data: str = Field(description="The card's paragraph on text, sources and licences.")


class Recipe(Table):
    """All stages of a model, from the teacher to the export."""

    name: Name
    seed: NonNegativeInt = 0
    dimensions: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    prompts: Prompts = Prompts()
    teacher: Teacher
    student: Student = Student()
    distill: tuple[Phase, ...] = ()
    adapt: tuple[AnyAdapter, ...] = ()
    export: Export

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for names in ([phase.name for phase in self.distill], [task.name for task in self.adapt]):
            if len(set(names)) < len(names):
                raise ValueError(f"two stages have the same name: {', '.join(names)}")
        return self


def read_recipe(file: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        file: TOML.
        changes: ``key=value`` overrides. The key has dots (``distill.0.steps``; a stage's name may
            replace its number), the value is TOML.

    Raises:
        RecipeError: the file cannot be read or is invalid; the message names every invalid key.
    """
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {file} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{file} is not valid TOML: {error}.") from None
    for change in changes:
        _apply_change(content, change)
    with _readable_validation_errors(f"{file} is not a valid recipe"):
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
    """Build the recipe of one adapter from command-line options.

    Args:
        name: name of the task.
        loss: ``retrieval``, ``text-matching``, ``clustering`` or ``classification``.
        data: paths of the records that the loss needs, see ``_DATA_KEYS``.
        options: keys of ``Adapter``.
        prompts: ``query`` and ``document``.
        changes: ``key=value`` overrides.

    Raises:
        RecipeError: a key is unknown, or a value is invalid.
    """
    content = {
        "name": name,
        "loss": loss,
        _DATA_KEYS[loss]: list(data),
        "prompts": {side: prompts[side] for side in ("query", "document") if side in prompts},
        **options,
    }
    for change in changes:
        _apply_change(content, change)
    with _readable_validation_errors(f"The adapter {name!r} has invalid options"):
        return TypeAdapter[AnyAdapter](AnyAdapter).validate_python(content)


_DATA_KEYS = {
    "retrieval": "pairs",
    "text-matching": "scored",
    "clustering": "labelled",
    "classification": "labelled",
}
"""Recipe key for the data of each loss."""


@contextmanager
def _readable_validation_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, problem['loc'])) or 'recipe'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise RecipeError("\n".join([f"{what}:", *lines])) from None


def _apply_change(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *path, last = key.split(".")
    table: Any = content
    try:
        for step in path:
            table = _child(table, step)
        table[last] = tomllib.loads(f"value {equals} {value}")["value"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecipeError(
            f"--set {change!r} cannot be applied ({error}): write key=value, for example "
            "distill.0.steps=10 or adapt.retrieval.lr=1e-4; strings need quotes."
        ) from None


def _child(table: Any, step: str) -> Any:
    """Return an entry of a table, or of a list by its index or name."""
    if isinstance(table, list):
        if step.isdecimal():
            return table[int(step)]
        (named,) = [entry for entry in table if entry.get("name") == step]
        return named
    return table[step]
