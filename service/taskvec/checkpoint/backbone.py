"""The backbone's shape, read from config.json and refused where we do not implement it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from taskvec.errors import CheckpointError

JINA_V5_MATRYOSHKA = (32, 64, 128, 256, 512, 768, 1024)
"""Dimensions jina-embeddings-v5-text was trained to be cut at (arXiv 2602.15547)."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A decoder-shaped transformer: RMSNorm, rotary positions, grouped heads, SwiGLU.

    Attributes:
        architecture: ``qwen3`` (causal, per-head q/k norm) or ``eurobert`` (bidirectional, none).
        heads: query heads; ``kv_heads`` of them have keys and values of their own.
        causal: True where a token sees only those before it.
        qk_norm: True where queries and keys pass an RMSNorm per head.
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
        """Every size, each at least 1."""
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
        """Linear layers of one block: name -> (out, in)."""
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
        """Every tensor that the checkpoint must hold, with its shape."""
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
        """Parameters of all linear layers: what a merged adapter copies."""
        return self.layers * sum(out * into for out, into in self.projections.values())

    @property
    def parameters(self) -> int:
        """All parameters, embedding table included."""
        total = 0
        for _, shape in self.tensors():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total


def read_backbone(config: Mapping[str, Any], tensor_names: frozenset[str], where: str) -> Backbone:
    """The backbone that a config.json describes.

    Args:
        config: the parsed config.json.
        tensor_names: names in the weight files; Jina's own model type does not say in its config
            which backbone it wraps, its per-head norms do.
        where: how to call the file in an error.

    Raises:
        CheckpointError: an unknown architecture, or a feature we do not implement.
    """
    architecture = _architecture(config, tensor_names, where)
    _refuse_unimplemented(config, where)
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
            rope_theta=_rope_theta(config, where),
            max_positions=int(config["max_position_embeddings"]),
            causal=architecture == "qwen3",
            qk_norm=architecture == "qwen3",
        )
    except KeyError as missing:
        raise CheckpointError(
            f"{where} has no {missing}: it is not a complete model config; download it again."
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where} has a value of the wrong kind ({error}).") from None
    if min(backbone.extents) < 1:
        raise CheckpointError(f"{where} has a size below 1: {backbone}.")
    if backbone.heads % backbone.kv_heads:
        raise CheckpointError(
            f"{where}: {backbone.heads} attention heads cannot share {backbone.kv_heads} key heads."
        )
    return backbone


def matryoshka_dimensions(config: Mapping[str, Any], hidden: int, where: str) -> tuple[int, ...]:
    """Dimensions the model was trained to be cut at; empty where the config does not say.

    Raises:
        CheckpointError: they are no list of whole numbers.
    """
    listed = config.get("matryoshka_dimensions") or ()
    if not isinstance(listed, list | tuple) or not all(type(d) is int for d in listed):
        raise CheckpointError(f"{where}: matryoshka_dimensions is no list of whole numbers.")
    if not listed and config.get("model_type") == "jina_embeddings_v5":
        listed = JINA_V5_MATRYOSHKA
    return tuple(sorted(d for d in listed if d <= hidden))


def _architecture(config: Mapping[str, Any], tensor_names: frozenset[str], where: str) -> str:
    model_type = config.get("model_type")
    if model_type in ("qwen3", "eurobert"):
        return str(model_type)
    if model_type != "jina_embeddings_v5":
        raise CheckpointError(
            f"{where} names the architecture {model_type!r}, which is not known: taskvec serves "
            "jina_embeddings_v5, qwen3 and eurobert checkpoints."
        )
    has_norm = "layers.0.self_attn.q_norm.weight" in tensor_names
    if has_norm and config.get("is_decoder") is False:
        raise CheckpointError(
            f"{where} says is_decoder false, yet the weights have the per-head norms of the causal "
            "Qwen3 backbone: config and weights are not of one model."
        )
    return "qwen3" if has_norm else "eurobert"


def _refuse_unimplemented(config: Mapping[str, Any], where: str) -> None:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise CheckpointError(f"{where} sets {key}, which taskvec does not implement.")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise CheckpointError(f"{where}: layer_types is no list.")
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if others:
        raise CheckpointError(f"{where} has layers of type {others[:3]}: only full_attention.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where} names the activation {activation!r}: only silu is known.")


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"{where} asks for the rope type {kind!r}: only default is known.")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{where} has no rope_theta.")
    return float(theta)
