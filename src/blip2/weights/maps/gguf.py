"""The names of GGUF files."""

from __future__ import annotations

from blip2.config import GemmaConfig
from blip2.weights.rules import Plus, Rule, Stacked, same


def gemma(config: GemmaConfig) -> list[Rule]:
    """Gemma 3: the file's norms multiply by their weight, the model's by 1 + weight."""
    norms = {
        "norm": "output_norm",
        "layers.*.attention_norm": "blk.*.attn_norm",
        "layers.*.query_norm": "blk.*.attn_q_norm",
        "layers.*.key_norm": "blk.*.attn_k_norm",
        "layers.*.attention_end_norm": "blk.*.post_attention_norm",
        "layers.*.mlp_norm": "blk.*.ffn_norm",
        "layers.*.mlp_end_norm": "blk.*.post_ffw_norm",
    }
    return [
        *same(
            {
                "words.weight": "token_embd.weight",
                "layers.*.out.weight": "blk.*.attn_output.weight",
                "layers.*.down.weight": "blk.*.ffn_down.weight",
            }
        ),
        *[Rule((f"{ours}.weight",), (f"{theirs}.weight",), Plus(-1.0)) for ours, theirs in norms.items()],
        Rule(
            ("layers.*.qkv.weight",),
            tuple(f"blk.*.attn_{part}.weight" for part in "qkv"),
            Stacked((config.heads, config.key_heads, config.key_heads)),
        ),
        Rule(("layers.*.gate_up.weight",), ("blk.*.ffn_gate.weight", "blk.*.ffn_up.weight"), Stacked((1, 1))),
    ]
