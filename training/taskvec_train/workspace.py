"""The folder of a run: what was computed once, and which recipe each stage in it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from taskvec_train.batches import BatchPlan, Rows
from taskvec_train.data.readers import data_files
from taskvec_train.data.sampling import Record, sample
from taskvec_train.errors import TrainingError
from taskvec_train.files import whole_file
from taskvec_train.pool import TeacherPool
from taskvec_train.sources import Vectors
from taskvec_train.tokens import Texts, TokenStore, tokens_of


@dataclass(frozen=True)
class Workspace:
    """Where a run keeps its things.

    Attributes:
        folder: of the run.
        data: what the recipe's paths are relative to.
        seed: of the recipe.
        dimensions: the nested ones.
        pool: the teacher's vectors.
        bfloat16: how stages multiply.
    """

    folder: Path
    data: Path
    seed: int
    dimensions: tuple[int, ...]
    pool: TeacherPool
    accelerator: Accelerator
    bfloat16: bool

    def read(
        self, paths: Iterable[str], reader: Callable[[Path], list[Record]], most: int = 0
    ) -> list[Record]:
        """The records of several paths, or a sample of them.

        Args:
            paths: files and folders.
            reader: of one of them.
            most: how many records are sampled; 0 for all.

        Raises:
            DataError: one of them cannot be read; file and line are named.
        """
        places = [self.data / path for path in paths]
        if not most:
            return list(chain.from_iterable(map(reader, places)))
        return sample([reader(file) for place in places for file in data_files(place)], most)

    def tokens(self, texts: Texts, tokenizer: Path, limit: int) -> TokenStore:
        """Texts tokenised, once for all processes."""
        with self.accelerator.main_process_first():
            return tokens_of(self.folder / "tokens", texts, tokenizer, limit)

    def teach(self, texts: Texts) -> Vectors:
        """The teacher's vectors of (instruction, text), computed once for all processes."""
        with self.accelerator.main_process_first():
            return self.pool.vectors(texts)

    def plan(self, lengths: Rows, *, tokens: int = 0, items: int = 0) -> BatchPlan:
        """This process's batches over rows of these lengths."""
        return BatchPlan(
            np.asarray(lengths, dtype=np.int64),
            self.seed,
            tokens=tokens,
            items=items,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )

    def claim(self, folder: Path, *parts: Any) -> str:
        """Mark a stage's folder as made by these parts of a recipe.

        Returns:
            A digest of the parts, to be a part of the stages that build on it.

        Raises:
            TrainingError: the folder holds a stage of another recipe.
        """
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        file = folder / "recipe-digest"
        with self.accelerator.main_process_first():
            if not file.is_file():
                with whole_file(file) as unfinished:
                    unfinished.write_text(digest)
        if file.read_text() != digest:
            raise TrainingError(
                f"{folder} was begun with another recipe, seed or data folder: name another "
                "folder for this run, or remove that one."
            )
        return digest
