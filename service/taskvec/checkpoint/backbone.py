"""The shape of the backbone, read from config.json, and the card of the served model.

A config with a feature that is not implemented is rejected: it would give wrong vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from taskvec.errors import CheckpointError

JINA_V5_MATRYOSHKA = (32, 64, 128, 256, 512, 768, 1024)
"""Matryoshka dimensions that jina-embeddings-v5-text was trained with (arXiv 2602.15547)."""


class Architecture(NamedTuple):
    """The facts in which the supported architectures differ; see ``Backbone``."""

    causal: bool
    qk_norm: bool


ARCHITECTURES = {
    "qwen3": Architecture(causal=True, qk_norm=True),
    "eurobert": Architecture(causal=False, qk_norm=False),
}
"""Supported architectures, by the name that config.json uses for ``model_type``."""


_CLASSES = frozenset(
    {
        "EuroBertForMaskedLM",
        "EuroBertModel",
        "JinaEmbeddingsV5Model",
        "Qwen3ForCausalLM",
        "Qwen3Model",
    }
)
"""Values of ``architectures`` whose last hidden states are those of the backbone."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """Shape of a decoder-style transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
        architecture: a key of ``ARCHITECTURES``.
        vocabulary: rows of the embedding table.
        hidden: width of the residual stream, and of the vectors.
        layers: number of transformer layers.
        heads: query heads.
        kv_heads: key and value heads; divides ``heads``.
        head_dim: width of one head.
        intermediate: width of the MLP.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary position frequencies.
        max_positions: positions that the model was trained on.
        causal: True if a token attends only to itself and the tokens before it.
        qk_norm: True if queries and keys pass an RMSNorm per head.
    """

    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    causal: bool
    qk_norm: bool

    @property
    def extents(self) -> tuple[int, ...]:
        """Return every size; each must be at least 1."""
        return (
            self.vocabulary,
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate,
            self.max_positions,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one transformer layer: name -> (out, in)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every tensor that the checkpoint must contain."""
        yield "embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "norm.weight", (self.hidden,)
        for layer in range(self.layers):
            prefix = f"layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            for name, shape in self.projections.items():
                yield f"{prefix}.{name}.weight", shape
            if self.qk_norm:
                yield f"{prefix}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{prefix}.self_attn.k_norm.weight", (self.head_dim,)

    @property
    def linear_parameters(self) -> int:
        """Return the parameters of all linear layers, which a merged adapter copies."""
        return self.layers * sum(out * into for out, into in self.projections.values())

    @property
    def parameters(self) -> int:
        """Return the number of parameters, including the embedding table."""
        total = 0
        for _, shape in self.tensors():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the callers of an engine know about the served model.

    Attributes:
        name: model name in the API.
        revision: commit on the Hugging Face Hub; None for a local folder.
        architecture: ``qwen3`` or ``eurobert``.
        dimension: width of the vectors.
        max_tokens: longest accepted text in tokens, including special tokens.
        vocabulary: number of token ids; valid ids are smaller.
        matryoshka: dimensions that the model was trained to be truncated to; empty if unknown.
        adapters: adapter names; empty if the checkpoint has no adapters.
        parameters: parameters of the backbone, including the embedding table.
    """

    name: str
    revision: str | None
    architecture: str
    dimension: int
    max_tokens: int
    vocabulary: int
    matryoshka: tuple[int, ...]
    adapters: tuple[str, ...]
    parameters: int


def read_backbone(config: Mapping[str, Any], tensor_names: frozenset[str], source: str) -> Backbone:
    """Return the backbone that a config.json describes.

    Args:
        config: the parsed config.json.
        tensor_names: names in the weight files. The config of ``jina_embeddings_v5`` does not
            name its backbone; the presence of per-head norms in the weights identifies it.
        source: name of the file in error messages.

    Raises:
        CheckpointError: the architecture is unknown, or a feature is not implemented.
    """
    architecture = _architecture(config, tensor_names, source)
    _reject_unimplemented(config, source)
    _check_classes(config, source)
    _check_causality(config, ARCHITECTURES[architecture], source)
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        backbone = Backbone(
            architecture=architecture,
            vocabulary=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // max(heads, 1)),
            intermediate=int(config["intermediate_size"]),
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=_rope_theta(config, source),
            max_positions=int(config["max_position_embeddings"]),
            causal=ARCHITECTURES[architecture].causal,
            qk_norm=ARCHITECTURES[architecture].qk_norm,
        )
    except KeyError as missing:
        raise CheckpointError(
            f"{source} has no {missing}: the model config is incomplete; download it again."
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source} has a value of the wrong type ({error}).") from None
    if min(backbone.extents) < 1:
        raise CheckpointError(f"{source} has a size below 1: {backbone}.")
    if backbone.heads % backbone.kv_heads:
        raise CheckpointError(
            f"{source}: {backbone.heads} attention heads cannot share {backbone.kv_heads} key "
            "heads."
        )
    return backbone


def matryoshka_dimensions(config: Mapping[str, Any], hidden: int, source: str) -> tuple[int, ...]:
    """Return the dimensions that the model was trained to be truncated to; empty if not stated.

    Raises:
        CheckpointError: the field is not a list of integers.
    """
    listed = config.get("matryoshka_dimensions") or ()
    if not isinstance(listed, list | tuple) or not all(type(d) is int for d in listed):
        raise CheckpointError(f"{source}: matryoshka_dimensions must be a list of integers.")
    if not listed and config.get("model_type") == "jina_embeddings_v5":
        listed = JINA_V5_MATRYOSHKA
    return tuple(sorted(d for d in listed if d <= hidden))


def _architecture(config: Mapping[str, Any], tensor_names: frozenset[str], source: str) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return model_type
    if model_type != "jina_embeddings_v5":
        raise CheckpointError(
            f"{source} has the unknown architecture {model_type!r}: taskvec serves "
            "jina_embeddings_v5, qwen3 and eurobert checkpoints."
        )
    has_norm = "layers.0.self_attn.q_norm.weight" in tensor_names
    if has_norm and config.get("is_decoder") is False:
        raise CheckpointError(
            f"{source} sets is_decoder to false, but the weights have the per-head norms of the "
            "causal Qwen3 backbone: config and weights belong to different models."
        )
    return "qwen3" if has_norm else "eurobert"


def _reject_unimplemented(config: Mapping[str, Any], source: str) -> None:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise CheckpointError(f"{source} sets {key}, which taskvec does not implement.")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise CheckpointError(f"{source}: layer_types must be a list.")
    unknown = sorted({str(layer_type) for layer_type in layer_types} - {"full_attention"})
    if unknown:
        raise CheckpointError(
            f"{source} has layers of type {unknown[:3]}: only full_attention is implemented."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(
            f"{source} has the activation {activation!r}: only silu is implemented."
        )


def _check_classes(config: Mapping[str, Any], source: str) -> None:
    """Reject another class for a known model type: its code may pool or mask in another way."""
    listed = config.get("architectures") or []
    if not isinstance(listed, list):
        raise CheckpointError(f"{source}: architectures must be a list.")
    unknown = sorted({str(name) for name in listed} - _CLASSES)
    if unknown:
        raise CheckpointError(
            f"{source} has the architecture {unknown[0]!r}: taskvec implements "
            f"{', '.join(sorted(_CLASSES))}."
        )


def _check_causality(config: Mapping[str, Any], known: Architecture, source: str) -> None:
    if config.get("is_causal") in (None, known.causal) and not (
        known.causal and config.get("use_bidirectional_attention")
    ):
        return
    field = "is_causal" if config.get("is_causal") is not None else "use_bidirectional_attention"
    raise CheckpointError(
        f"{source} sets {field} to {config[field]!r}, but taskvec computes this architecture "
        f"{'causally' if known.causal else 'bidirectionally'}."
    )


def _rope_theta(config: Mapping[str, Any], source: str) -> float:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        raise CheckpointError(
            f"{source} has the rope type {rope_type!r}: only default is implemented."
        )
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise CheckpointError(
            f"{source} sets partial_rotary_factor to {rotated!r}, which taskvec does not implement."
        )
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{source} has no rope_theta.")
    return float(theta)
