"""The context of a run: its folder, accelerator and teacher, and the recipe of each stage."""

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

from taskvec_train.batch_sources import VectorLookup
from taskvec_train.batches import BatchPlan, Rows
from taskvec_train.data.readers import data_files
from taskvec_train.data.sampling import Record, sample
from taskvec_train.errors import TrainingError
from taskvec_train.files import atomic_file
from taskvec_train.teacher_cache import TeacherCache
from taskvec_train.tokens import Texts, TokenStore, tokens_of


@dataclass(frozen=True)
class RunContext:
    """Settings and resources that all stages of a run share.

    Attributes:
        folder: of the run.
        data: folder that the recipe's paths are relative to.
        seed: of the recipe.
        dimensions: the Matryoshka dimensions.
        teacher_cache: the teacher's vectors.
        accelerator: device and processes.
        bfloat16: True for matrix products in bfloat16.
    """

    folder: Path
    data: Path
    seed: int
    dimensions: tuple[int, ...]
    teacher_cache: TeacherCache
    accelerator: Accelerator
    bfloat16: bool

    def read(
        self, paths: Iterable[str], reader: Callable[[Path], list[Record]], max_records: int = 0
    ) -> list[Record]:
        """Read the records of several paths, or a sample of them.

        Args:
            paths: files and folders.
            reader: reads one path.
            max_records: size of the sample; 0 for all records.

        Raises:
            DataError: a file is invalid; the message names file and line.
        """
        resolved = [self.data / path for path in paths]
        if not max_records:
            return list(chain.from_iterable(map(reader, resolved)))
        return sample([reader(file) for path in resolved for file in data_files(path)], max_records)

    def tokens(self, texts: Texts, tokenizer: Path, limit: int) -> TokenStore:
        """Tokenise texts, once for all processes."""
        with self.accelerator.main_process_first():
            return tokens_of(self.folder / "tokens", texts, tokenizer, limit)

    def teacher_vectors(self, texts: Texts) -> VectorLookup:
        """Return the teacher's vectors of (instruction, text), computed once for all processes."""
        with self.accelerator.main_process_first():
            return self.teacher_cache.vectors(texts)

    def plan(self, lengths: Rows, *, tokens: int = 0, items: int = 0) -> BatchPlan:
        """Return this process's batch plan for rows of these lengths; see ``BatchPlan``."""
        return BatchPlan(
            np.asarray(lengths, dtype=np.int64),
            self.seed,
            tokens=tokens,
            items=items,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )

    def claim(self, folder: Path, *values: Any) -> str:
        """Record that these recipe values make the stage in a folder.

        Args:
            folder: of the stage.
            values: JSON-serialisable; include the digest of the stage that this one builds on.

        Returns:
            A digest of the values.

        Raises:
            TrainingError: the folder has a stage of another recipe.
        """
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        file = folder / "recipe-digest"
        with self.accelerator.main_process_first():
            if not file.is_file():
                with atomic_file(file) as unfinished:
                    unfinished.write_text(digest)
        if file.read_text() != digest:
            raise TrainingError(
                f"{folder} was started with another recipe, seed or data folder: choose another "
                "folder for this run, or remove that one."
            )
        return digest
