"""The student before training: vocabulary, shape, first vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from taskvec.checkpoint.backbone import Backbone
from taskvec_train.backbones import last_states, new_backbone
from taskvec_train.errors import TrainingError
from taskvec_train.student import new_student, with_adapter
from taskvec_train.teacher import load_teacher
from taskvec_train.vocabulary import trimmed_tokenizer
from tinytraining import TOPICS, sentence

SHAPE = Backbone("qwen3", 1, 32, 2, 2, 2, 16, 48, 1e-6, 1e4, 128, causal=True, qk_norm=True)
CPU = torch.device("cpu")


def sentences(count: int) -> list[str]:
    """Return sentences about all topics."""
    random = np.random.default_rng(1)
    return [sentence(random, topic) for topic in [*TOPICS] * (count // len(TOPICS))]


def test_the_vocabulary_is_trimmed_to_the_corpus(teacher: Path) -> None:
    """Unused pieces are removed, letters stay, and known texts are tokenised as before."""
    file = teacher / "tokenizer.json"
    config = trimmed_tokenizer(file, ["snow and ice"], min_count=1)
    vocabulary = config["model"]["vocab"]
    assert "snow" in vocabulary
    assert "never" not in vocabulary
    assert "##z" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    original, trimmed = Tokenizer.from_file(str(file)), Tokenizer.from_str(_json(config))
    text = "snow and ice: glacier"
    assert original.encode("snow and ice").tokens[1:] == trimmed.encode("snow and ice").tokens
    assert trimmed.encode(text).tokens[-1] == "[SEP]"
    assert "[UNK]" not in trimmed.encode(text).tokens


@pytest.mark.parametrize("architecture", ["qwen3", "eurobert"])
def test_an_untrained_student_already_resembles_its_teacher(
    teacher: Path, architecture: str
) -> None:
    """Its projected vectors are clearly similar to the teacher's before any training."""
    loaded = load_teacher(str(teacher), 64, CPU)
    causal = architecture == "qwen3"
    shape = replace(SHAPE, architecture=architecture, causal=causal, qk_norm=causal)
    texts = sentences(60)
    model, psi, tokenizer = new_student(shape, loaded, texts, 1, 0)
    own, given = Tokenizer.from_str(_json(tokenizer)), Tokenizer.from_file(str(loaded.tokenizer))
    cosines = []
    with torch.inference_mode():
        for text in texts:
            ids, theirs = (np.array([t.encode(text).ids]) for t in (own, given))
            z = last_states(
                model, torch.from_numpy(ids), torch.tensor([ids.shape[1]]), causal=causal
            )
            truth = loaded.embed(theirs, np.array([theirs.shape[1]]))
            cosines.append(torch.cosine_similarity(z @ psi.T, truth).item())
    assert np.mean(cosines) > 0.15


@pytest.mark.parametrize("architecture", ["qwen3", "eurobert"])
def test_padding_changes_no_vector(architecture: str) -> None:
    """A text in a padded batch has the vector that it has alone."""
    causal = architecture == "qwen3"
    shape = replace(SHAPE, vocabulary=50, architecture=architecture, causal=causal, qk_norm=causal)
    torch.manual_seed(0)
    model = new_backbone(shape)
    ids = torch.randint(1, 50, (3, 16))
    lengths = torch.tensor([16, 5, 1])
    ids[torch.arange(16) >= lengths[:, None]] = 0
    together = last_states(model, ids, lengths, causal=causal)
    for row, count in enumerate(lengths.tolist()):
        alone = last_states(
            model, ids[row : row + 1, :count], lengths[row : row + 1], causal=causal
        )
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_a_new_adapter_changes_nothing_yet_and_learns_alone(teacher: Path) -> None:
    """A new adapter has B = 0, and only its own weights are trained, in every linear layer."""
    model, _, _ = new_student(SHAPE, load_teacher(str(teacher), 64, CPU), sentences(30), 1, 0)
    ids, lengths = torch.tensor([[5, 6, 7, 3]]), torch.tensor([4])
    before = last_states(model, ids, lengths, causal=True)
    adapted = with_adapter(model, "task", rank=4, alpha=4, seed=0)
    assert torch.equal(last_states(adapted, ids, lengths, causal=True), before)
    learning = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert len(learning) == 2 * 7 * SHAPE.layers
    assert all("lora_" in name for name in learning)


def test_tokenizers_that_cannot_be_trimmed_are_refused(tmp_path: Path) -> None:
    """A BPE tokenizer is refused, since trimming would break its merges."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(TrainingError, match="is a BPE tokenizer"):
        trimmed_tokenizer(file, [], min_count=1)


def _json(config: object) -> str:
    return json.dumps(config)
