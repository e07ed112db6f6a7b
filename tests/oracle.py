"""The oracle for tests: transformers and peft in float32, one text at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

from taskvec.engines.base import TokenIds
from taskvec.engines.packed.device import limit_kernel_cache

PLAIN = {"qwen3": (Qwen3Config, Qwen3Model), "eurobert": (EuroBertConfig, EuroBertModel)}


class Oracle:
    """A checkpoint in transformers and peft.

    transformers does not know Jina's model type without remote code, so the checkpoint is copied
    with a config that names the plain backbone; weights and adapters stay as they are.
    """

    def __init__(
        self, folder: Path, architecture: str, adapters: Sequence[str], working_folder: Path
    ) -> None:
        limit_kernel_cache()  # as the engine does: else kernels of every length are kept
        copy = working_folder / f"plain-{folder.name}"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("adapters"))
        config = json.loads((copy / "config.json").read_text())
        config_class, model_class = PLAIN[architecture]
        config |= {"model_type": architecture, "architectures": [model_class.__name__]}
        config.pop("task_names", None)
        (copy / "config.json").write_text(json.dumps(config))
        self._config = config_class.from_pretrained(copy)
        base = model_class.from_pretrained(copy, config=self._config, dtype=torch.float32).eval()
        self._model: torch.nn.Module = base
        for name in adapters:
            adapter_folder = folder / "adapters" / name
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(adapter_folder, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(base, adapter_folder, adapter_name=name)

    @torch.inference_mode()
    def embed(self, ids: TokenIds, adapter: str | None) -> NDArray[np.float32]:
        """Return the normalised vector of one text."""
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        if not isinstance(self._model, PeftModel):
            hidden = self._model(input_ids=tokens).last_hidden_state
        elif adapter is None:
            with self._model.disable_adapter():
                hidden = self._model(input_ids=tokens).last_hidden_state
        else:
            self._model.set_adapter(adapter)
            hidden = self._model(input_ids=tokens).last_hidden_state
        vector: NDArray[np.float32] = hidden[0, -1].numpy()
        return vector / np.linalg.norm(vector)
