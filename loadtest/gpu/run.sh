#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: random weights of exactly the shapes of jina-embeddings-v5-text,
# parity with transformers and peft first, then tokens a second of the packed engine and, where vllm
# is installed, of vLLM. Writes loadtest/results/gpu.json.
#
#   loadtest/gpu/run.sh [--rounds 5] [--shapes nano small] [--lengths 16 50 512 8192]
#
# Needs torch with CUDA, transformers, peft, tokenizers, safetensors, structlog, numpy: no web
# framework, and no network.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
"$python" - <<'CHECK'
import importlib.util
import sys

needed = ("torch", "transformers", "peft", "tokenizers", "safetensors", "structlog", "numpy")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"Install first: pip install {' '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
CHECK
export PYTHONPATH="service:tests:loadtest${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" loadtest/gpu/measure.py "$@"
