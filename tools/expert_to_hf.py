"""Turn a small GGUF llama into a Hugging Face folder, for servers that read no GGUF, such as vLLM.

    python tools/expert_to_hf.py build/expert
    python -m vllm.entrypoints.openai.api_server --model build/expert --dtype float32

Without --model it is the expert that ships with colm-edge. The folder gets config.json,
model.safetensors with the weights in float32, and the tokenizer. What was written is read again:
its logits must be llama.cpp's, and so must the tokens of some texts.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import gguf

from colm_edge.cli import OneLineErrors
from colm_edge.errors import ColmError, ModelError
from colm_edge.llama.model import Model
from colm_edge.references import resolve
from colm_edge.remote.greeting import PROBES

# GGUF's names of an architecture, of a byte-level BPE, and of what cuts the text before it.
KNOWN = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
}


@click.command(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "-m",
    "--model",
    metavar="FILE.gguf",
    default="package:expert.gguf",
    help="A llama with a byte-level BPE.  [default: the expert of the demo pair]",
)
def main(out: Path, model: str) -> None:
    """Write a GGUF llama to OUT, a new folder in Hugging Face's layout."""
    try:
        from lib.gguf_base import GgufBase
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise ColmError(f"{e}; this needs: pip install 'colm-edge[finetune]'") from e

    path = Path(resolve(model, offline=True))
    if out.exists() and any(out.iterdir()):
        raise ColmError(f"{out}: is not empty; give a new folder")
    vocabulary = _Vocabulary(path)
    tokenizer = vocabulary.tokenizer()
    source = GgufBase(path)
    network = source.load()
    network.config.eos_token_id = network.generation_config.eos_token_id = vocabulary.end
    network.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    described = json.dumps(vocabulary.description(), indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(described + "\n", encoding="utf-8")
    distance = source.check(AutoModelForCausalLM.from_pretrained(out))
    click.echo(f"{out}: written; its logits are {distance:.2g} deviations from llama.cpp's")


class _Vocabulary:
    """The vocabulary of a GGUF file with a byte-level BPE."""

    def __init__(self, path: Path) -> None:
        Model(path).close()  # says what is wrong with a broken file
        self._path, self._reader = path, gguf.GGUFReader(path)
        for key, expected in KNOWN.items():
            if (found := self._value(key)) != expected:
                raise ModelError(
                    f"{path}: {key} is {found}, expected {expected}; take the folder that the file "
                    "was made from"
                )
        self._tokens: list[str] = self._value("tokenizer.ggml.tokens")
        self.end = int(self._value("tokenizer.ggml.eos_token_id"))

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def tokenizer(self) -> Any:
        """Return it as a tokenizers.Tokenizer. Raises ModelError if llama.cpp reads some texts
        otherwise."""
        from lib.small_llama import pretokenizer
        from tokenizers import Tokenizer, decoders, models

        ids = {text: i for i, text in enumerate(self._tokens)}
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        found = Tokenizer(models.BPE(vocab=ids, merges=merges))
        found.pre_tokenizer, found.decoder = pretokenizer(), decoders.ByteLevel()
        kinds = zip(self._tokens, self._value("tokenizer.ggml.token_type"), strict=True)
        found.add_special_tokens([text for text, kind in kinds if kind == gguf.TokenType.CONTROL])
        with closing(Model(self._path)) as model:
            for text in (*PROBES, self._tokens[self.end]):
                if found.encode(text).ids != model.tokenize(text, special=True, bos=False):
                    raise ModelError(f"{self._path}: llama.cpp cuts {text!r} into other tokens")
        return found

    def description(self) -> dict[str, Any]:
        """Return what tokenizer_config.json says."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._tokens[self.end],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self._value("tokenizer.chat_template"),
        }


if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
