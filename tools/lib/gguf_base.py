"""A GGUF base as a transformers model, and back: weights and LoRA adapters in llama.cpp's layout.

transformers reads the architecture from the file; the tensors are mapped here, by gguf's own table
of names, so that writing is the exact inverse of reading. `check` compares the model with llama.cpp
to make sure that it is the one in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from colm_edge.errors import ModelError
from colm_edge.files import replacing
from colm_edge.llama.context import ContextOptions
from colm_edge.llama.model import Model
from colm_edge.llama.session import Session

# Architectures whose q and k rows llama.cpp stores with the halves of each head interleaved.
INTERLEAVED = ("llama",)
# Root mean square of the logits' difference from llama.cpp's, in their own deviations. Weights are
# the same; llama.cpp rounds activations (8 bits beside quantised weights) and the cache (float16).
TOLERANCE = 0.1
CHECKED_TOKENS = 24

Array = np.ndarray


class GgufBase:
    """A GGUF file that is read as a transformers model, and written back in the same layout."""

    def __init__(self, path: Path) -> None:
        """Raise ModelError if it is not GGUF, or gguf has no tensor names for its architecture."""
        Model(path).close()  # says what is wrong with a broken file
        self.path = path
        self._reader = gguf.GGUFReader(path)
        self.architecture = str(self._value("general.architecture"))
        arch = next((k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture), None)
        if arch is None:
            self._refuse(f"gguf has no names for the architecture {self.architecture}")
        n_head = self._value(f"{self.architecture}.attention.head_count")
        n_kv = self._value(f"{self.architecture}.attention.head_count_kv", n_head)
        if not isinstance(n_head, int) or not isinstance(n_kv, int):
            self._refuse("its layers have different numbers of heads")
        self._n_head, self._n_head_kv = n_head, n_kv
        self._names = gguf.get_tensor_name_map(
            arch, int(self._value(f"{self.architecture}.block_count"))
        )
        self._tensors = {t.name: t for t in self._reader.tensors}
        if "rope_freqs.weight" in self._tensors:
            self._refuse("it scales rotary frequencies by a tensor (rope_freqs)")

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _refuse(self, why: str) -> NoReturn:
        raise ModelError(f"{self.path}: {why}; fine-tune the Hugging Face folder it was made from")

    def load(self) -> PreTrainedModel:
        """Return the model in float32. Raises ModelError if the tensors do not fit it."""
        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except ValueError as e:
            self._refuse(f"transformers cannot read it ({e})")
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.bos_token_id = self._value("tokenizer.ggml.bos_token_id")
        config.tie_word_embeddings = "output.weight" not in self._tensors
        config.vocab_size = len(self._value("tokenizer.ggml.tokens"))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                array = self._read(name)
                if array.shape != tuple(weight.shape):
                    self._refuse(
                        f"{self.name(name)} has the shape {array.shape}, transformers expects "
                        f"{tuple(weight.shape)}"
                    )
                weight.copy_(torch.from_numpy(array))
        self.check(model)
        return model

    def check(self, model: PreTrainedModel) -> float:
        """Return how far the model's logits are from llama.cpp's, in deviations of the logits.

        Raises ModelError above TOLERANCE: then transformers computes another function.
        """
        n = min(CHECKED_TOKENS, int(model.config.max_position_embeddings))
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, n).tolist()
        with torch.no_grad():
            ours = model(torch.tensor([tokens])).logits[0, -1].double().numpy()
        file = Model(self.path)
        session = Session(file, ContextOptions(n_ctx=64))
        try:
            session.sync(tokens)
            theirs = session.logits.astype(np.float64)
        finally:
            session.close()
            file.close()
        distance = float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())
        if not distance <= TOLERANCE:
            self._refuse(
                f"its logits in transformers are {distance:.2g} deviations from llama.cpp's"
            )
        return distance

    def name(self, parameter: str) -> str:
        """Return GGUF's name of a transformers parameter."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None or found not in self._tensors:
            self._refuse(f"it has no tensor for transformers' {parameter}")
        return str(found)

    def _n_heads(self, name: str) -> int:
        """Return the number of heads whose rows are interleaved in a tensor, or 0."""
        if self.architecture not in INTERLEAVED:
            return 0
        counts = {"attn_q": self._n_head, "attn_k": self._n_head_kv}
        return counts.get(name.split(".")[-2], 0)

    def _read(self, parameter: str) -> Array:
        name = self.name(parameter)
        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = self._n_heads(name)
        if heads:  # (head, pair, half) -> (head, half, pair)
            array = (
                array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        return np.ascontiguousarray(array)

    def arranged(self, name: str, array: Array) -> Array:
        """Return transformers' rows in the order of GGUF's tensor of this name."""
        heads = self._n_heads(name)
        if heads:
            array = (
                array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        return np.ascontiguousarray(array, np.float32)

    def write(self, path: Path, parameters: Mapping[str, torch.Tensor]) -> list[str]:
        """Write this file with other weights, nothing else changed; return what became Q8_0.

        Each tensor keeps its type, or takes Q8_0 where gguf cannot quantise to it.
        """
        new = {self.name(name): weight for name, weight in parameters.items()}
        kinds = {t.name: _writable(t.tensor_type) for t in self._reader.tensors if t.name in new}
        with _writing(path, self.architecture) as writer:
            writer.data_alignment = self._reader.alignment
            for field in self._reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
            for t in self._reader.tensors:
                kind = kinds.get(t.name, t.tensor_type)
                shape, dtype = _stored(tuple(int(n) for n in reversed(t.shape)), kind)
                n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
                writer.add_tensor_info(t.name, shape, np.dtype(dtype), n_bytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t in self._reader.tensors:  # one at a time: the model may be large
                data = t.data
                if t.name in new:
                    array = self.arranged(t.name, new[t.name].detach().cpu().float().numpy())
                    data = quantize(array, kinds[t.name])
                writer.write_tensor_data(data)
        return [
            t.name
            for t in self._reader.tensors
            if kinds.get(t.name, t.tensor_type) != t.tensor_type
        ]

    def write_adapter(
        self, path: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float
    ) -> None:
        """Write a LoRA adapter for llama.cpp.

        pairs: parameter -> (A (rank, columns), B (rows, rank)); the weight gains alpha/rank · B·A.
        """
        with _writing(path, self.architecture) as writer:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            for parameter, (a, b) in pairs.items():
                name = self.name(parameter)
                writer.add_tensor(f"{name}.lora_a", a.detach().cpu().float().numpy())
                rows = self.arranged(name, b.detach().cpu().float().numpy())
                writer.add_tensor(f"{name}.lora_b", rows)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()


def _writable(kind: Type) -> Type:
    try:
        quantize(np.zeros((1, 256), np.float32), kind)
    except NotImplementedError:
        return Type.Q8_0
    return kind


def _stored(shape: tuple[int, ...], kind: Type) -> tuple[tuple[int, ...], type]:
    """Return the shape and numpy type of the array that holds a tensor of a kind."""
    plain = {Type.F32: np.float32, Type.F16: np.float16}
    if kind in plain:
        return shape, plain[kind]
    return gguf.quant_shape_to_byte_shape(shape, kind), np.uint8


@contextmanager
def _writing(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """Give a writer of a GGUF file that appears once it is whole."""
    with replacing(path) as temporary, closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        yield writer
