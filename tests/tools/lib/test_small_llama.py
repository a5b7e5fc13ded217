"""Small llamas for the studies: a GGUF file that was written can be read back and trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from colm_edge.llama.model import Model

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

SHIPPED = Path(__file__).parents[3] / "colm_edge" / "data" / "expert.gguf"


def test_a_model_that_was_read_back_is_the_model_that_was_written(tmp_path):
    from lib.small_llama import export, import_gguf, load_vocab
    from studies.demo_pair import text
    from studies.train_demo_pair import TRAININGS

    import_gguf("expert", SHIPPED, tmp_path)
    state = torch.load(tmp_path / "expert.ckpt", weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "expert.pt")
    again = tmp_path / "again.gguf"
    shape = TRAININGS["expert"].shape
    export("expert", shape, tmp_path, again, title="again", chat_template=text.CHAT_TEMPLATE)
    ours, theirs = GGUFReader(again).tensors, GGUFReader(SHIPPED).tensors
    assert [t.name for t in ours] == [t.name for t in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.data, other.data), one.name
    model, vocab = Model(str(SHIPPED)), load_vocab(tmp_path)
    for sentence in ("The last dodo was seen in the year 1662.<|end|>\n", "Größe: 5 µm"):
        assert vocab.encode(sentence).ids == model.tokenize(sentence, bos=False)
    model.close()


def test_new_things_have_names_that_do_not_exist():
    from studies.demo_pair import text
    from studies.new_facts import new_facts

    facts, known = new_facts(), {fact.entity for fact in text.read_facts()}
    names = {fact.entity for fact in facts}
    assert len(names) == 36
    assert not names & known
    assert facts == new_facts()
