"""Start a Q-Former from a pre-trained BERT: the paper's initialisation (section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.model.qformer import QFormer

# BERT's name of a layer's tensors -> ours; the query feed-forward starts as a copy of the text's.
LAYER = {
    "attention.self.query": ["attention.query"],
    "attention.self.key": ["attention.key"],
    "attention.self.value": ["attention.value"],
    "attention.output.dense": ["attention.out"],
    "attention.output.LayerNorm": ["attention.norm"],
    "intermediate.dense": ["text_feed_forward.up", "query_feed_forward.up"],
    "output.dense": ["text_feed_forward.down", "query_feed_forward.down"],
    "output.LayerNorm": ["text_feed_forward.norm", "query_feed_forward.norm"],
}
NORM = {"embeddings.LayerNorm.weight": "norm.weight", "embeddings.LayerNorm.bias": "norm.bias"}  # the queries' too
EMBEDDINGS = NORM | {
    "embeddings.word_embeddings.weight": "words.weight",
    "embeddings.position_embeddings.weight": "positions.weight",
}
TOKEN_TYPE = "embeddings.token_type_embeddings.weight"  # the Q-Former has none: the first is added to the positions


@torch.no_grad()
def start_from_bert(qformer: QFormer, bert: Mapping[str, Tensor]) -> None:
    """Copy a BERT into the text side and the queries' feed-forwards; cross-attention and queries stay as drawn.

    Args:
        bert: tensors by BERT's names (`embeddings.*`, `encoder.layer.N.*`); a pooler is ignored.
    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    embeddings = EMBEDDINGS if qformer.config.text else NORM
    sources = {ours: name for name, ours in embeddings.items()}
    for index in range(qformer.config.layers):
        for theirs, names in LAYER.items():
            for name in names:
                if qformer.config.text or not name.startswith("text_"):
                    for kind in ("weight", "bias"):
                        sources[f"layers.{index}.{name}.{kind}"] = f"encoder.layer.{index}.{theirs}.{kind}"
    target = qformer.state_dict()
    for name, source in sources.items():
        if source not in bert:
            raise CheckpointError(f"the text encoder to start from has no {source}")
        tensor = bert[source]
        if name == "positions.weight":
            tensor = tensor + bert[TOKEN_TYPE][0] if TOKEN_TYPE in bert else tensor
        if name in ("positions.weight", "words.weight"):  # fewer positions, or [DEC] beyond BERT's words
            rows = min(len(tensor), len(target[name]))
            target[name][:rows] = tensor[:rows]
            continue
        if tensor.shape != target[name].shape:
            raise CheckpointError(
                f"the text encoder's {source} is {list(tensor.shape)}, not {list(target[name].shape)}"
            )
        target[name].copy_(tensor)
