"""What the GGUF file of a llama says beside its tensors: its shape and its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType

NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """The shape of a llama."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 8192

    @property
    def n_params(self) -> int:
        """Weights in the matrices; embeddings and output rows are counted apart."""
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        layer = 2 * self.n_embd * (self.n_embd + n_kv) + 3 * self.n_embd * self.n_ff
        return 2 * self.n_vocab * self.n_embd + self.n_layer * layer


def describe_llama(
    writer: GGUFWriter,
    shape: Shape,
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    extra_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> None:
    """Write the metadata of a llama with a byte-level BPE.

    tokens[0] ends a text. It and the extra tokens, which follow the others, are control tokens.
    """
    types = [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1)
    types += [TokenType.CONTROL] * len(extra_tokens)
    writer.add_vocab_size(len(types))
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *extra_tokens])
    writer.add_token_types(types)
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
