#!/usr/bin/env bash
# Run on a machine with an NVIDIA GPU. Uses random weights with exactly the shapes of
# jina-embeddings-v5-text. First checks parity with transformers and peft, then measures tokens per
# second of the packed engine and, if vllm is installed, of vLLM. Writes loadtest/results/gpu.json.
#
#   loadtest/gpu/run.sh [--rounds 3] [--tokens 1000000] [--shapes nano small] [--lengths 16 50 512 8192]
#
# Needs torch with CUDA, transformers, peft, tokenizers, safetensors, structlog and numpy. Needs
# neither a web framework nor a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
"$python" - <<'CHECK'
import importlib.util
import sys

needed = ("torch", "transformers", "peft", "tokenizers", "safetensors", "structlog", "numpy")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"Missing packages: pip install {' '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} does not find a CUDA device")
CHECK
export PYTHONPATH="service:tests:loadtest${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" loadtest/gpu/measure.py "$@"
