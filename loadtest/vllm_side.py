"""Run vLLM for versus_vllm.py, in vLLM's own environment, without imports from this project.

    python loadtest/vllm_side.py WORK.json

WORK.json has the model folder, the texts as token ids, the adapter folder of each text (or null),
and the number of rounds. The last line of standard output has the seconds of each round.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}


async def main(work: dict[str, Any]) -> None:
    from vllm import PoolingParams  # noqa: PLC0415 - after the environment is set
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
    from vllm.inputs import TokensPrompt  # noqa: PLC0415
    from vllm.lora.request import LoRARequest  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    folders = sorted({adapter for adapter in work["adapters"] if adapter})
    loras = {
        folder: LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(folders)
    }
    lora_settings: dict[str, Any] = {}
    if folders:
        lora_settings = {
            "enable_lora": True,
            "max_loras": len(folders) + 1,
            "max_lora_rank": 32,
        }
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=work["model"],
            runner="pooling",
            convert="embed",
            dtype="bfloat16",
            max_model_len=2048,
            enforce_eager=True,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            gpu_memory_utilization=0.3,
            skip_tokenizer_init=True,
            **lora_settings,
        )
    )

    async def embed(name: str, ids: list[int], adapter: str | None) -> int:
        size = 0
        async for out in engine.encode(
            TokensPrompt(prompt_token_ids=ids),
            PoolingParams(task="embed"),
            request_id=name,
            lora_request=loras[adapter] if adapter else None,
        ):
            size = out.outputs.data.numel()
        return size

    seconds = []
    for number in range(work["rounds"] + 1):  # the first one is a warm-up
        started = time.perf_counter()
        sizes = await asyncio.gather(
            *(
                embed(f"{number}-{i}", ids, adapter)
                for i, (ids, adapter) in enumerate(zip(work["ids"], work["adapters"], strict=True))
            )
        )
        assert min(sizes) > 0
        seconds.append(time.perf_counter() - started)
    engine.shutdown()
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
