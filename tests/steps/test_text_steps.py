"""Text on its way to a model, by a real tokenizer that is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from hasten.errors import BadRequest, InvalidSetting, StoreError, TooLarge
from hasten.steps.pipeline import Pipeline, open_pipeline
from hasten.steps.step import Around
from hasten.tensors import Array, Signature, TensorSpec

WORDS = ["the cat sat on the mat", "a dog ran over the hill", "cats and dogs and hills"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer as BERT's are."""
    made = Tokenizer(WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    made.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(WORDS, WordPieceTrainer(vocab_size=80, special_tokens=special))
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    home = tmp_path_factory.mktemp("bundle")
    made.save(str(home / "tokenizer.json"))
    return home


def opened(folder: Path, *, length: int | str = "length", names: tuple[str, ...] = (), **more: Any) -> Pipeline:
    names = names or ("input_ids", "attention_mask")
    shape = ("batch", length)
    model = Signature(
        tuple(TensorSpec(name, "int64", shape) for name in names), (TensorSpec("y", "float32", ("batch", 2)),)
    )
    pipeline = open_pipeline({"pre": ({"step": "tokenise", **more},)}, model, Around(folder=folder), where="it")
    assert pipeline is not None
    return pipeline


def prepared(pipeline: Pipeline, *texts: bytes, **more: list[bytes]) -> dict[str, Array]:
    feed = {}
    for name, column in {"text": list(texts), **more}.items():
        feed[name] = np.empty(len(column), object)
        feed[name][:] = column
    return pipeline.prepare(feed, lambda: False, 1 << 20)


def test_tokens_are_the_librarys_own_and_rows_are_filled_up_to_the_longest(folder: Path) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = [own.encode(text).ids for text in WORDS]
    got = prepared(opened(folder), *(text.encode() for text in WORDS))
    longest = max(map(len, wanted))
    assert got["input_ids"].shape == got["attention_mask"].shape == (3, longest)
    assert got["input_ids"].dtype == np.int64
    for ids, row, mask in zip(wanted, got["input_ids"], got["attention_mask"], strict=True):
        assert row[: len(ids)].tolist() == ids
        assert (row[len(ids) :] == 0).all()
        assert mask.tolist() == [1] * len(ids) + [0] * (longest - len(ids))


def test_all_rows_have_the_models_length_where_it_is_fixed(folder: Path) -> None:
    got = prepared(opened(folder, length=12, padding="max", max_length=12, pad=7), b"cat", b"dog " * 40)
    assert got["input_ids"].shape == (2, 12)
    assert got["input_ids"][0, 3:].tolist() == [7] * 9
    assert got["attention_mask"].sum(axis=1).tolist() == [3, 12]
    assert got["input_ids"][1, -1] == 3, "what is cut still ends in [SEP]"


def saved(folder: Path, home: Path, change: Any) -> Path:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(own)
    own.save(str(home / "tokenizer.json"))
    return home


def test_a_tokenizer_that_cuts_at_the_start_cuts_there(folder: Path, tmp_path: Path) -> None:
    home = saved(folder, tmp_path, lambda own: own.enable_truncation(9, direction="left"))
    wanted = Tokenizer.from_file(str(home / "tokenizer.json"))
    wanted.enable_truncation(5, direction="left")
    got = prepared(opened(home, length=5, padding="max", max_length=5), b"the cat sat on the mat")
    assert got["input_ids"].tolist() == [wanted.encode("the cat sat on the mat").ids]


def test_a_tokenizer_that_fills_up_on_the_left_does(folder: Path, tmp_path: Path) -> None:
    home = saved(folder, tmp_path, lambda own: own.enable_padding(direction="left"))
    got = prepared(opened(home, length=8, padding="max", max_length=8), b"cat")
    assert got["input_ids"][0, :5].tolist() == [0] * 5
    assert got["attention_mask"].tolist() == [[0] * 5 + [1] * 3]
    with pytest.raises(StoreError, match='use padding = "max"'):
        opened(home)


def test_a_pair_of_texts_has_types(folder: Path) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    pipeline = opened(folder, names=names, pair="other", types="token_type_ids")
    assert [spec.name for spec in pipeline.signature.inputs] == ["text", "other"]
    got = prepared(pipeline, b"the cat", other=[b"a dog"])
    assert got["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_text_that_is_too_long_too_large_or_no_text_is_refused(folder: Path) -> None:
    strict = opened(folder, truncate=False, max_length=4, max_bytes=40)
    for data, says in (
        (b"the cat sat on", "6 tokens; at most 4"),
        (b"\xff\xfe", "no UTF-8: invalid start byte at byte 0"),
        (b"a" * 41, "41 bytes; at most 40"),
    ):
        with pytest.raises(BadRequest, match=f"row 1: the text .*{says}"):
            prepared(strict, b"cat", data)
    with pytest.raises(BadRequest, match="no token at all"):
        prepared(opened(folder, special=False), b"")


def test_how_far_a_tokenizers_pieces_overlap_does_not_matter(folder: Path, tmp_path: Path) -> None:
    home = saved(folder, tmp_path, lambda own: own.enable_truncation(384, stride=128))
    text = b"the cat sat on the mat"
    got = prepared(opened(home, max_length=5), text)
    assert got["input_ids"].tolist() == prepared(opened(folder, max_length=5), text)["input_ids"].tolist()


def test_a_tokenizer_that_cuts_the_second_text_alone_needs_one(folder: Path, tmp_path: Path) -> None:
    home = saved(folder, tmp_path, lambda own: own.enable_truncation(384, strategy="only_second"))
    with pytest.raises(StoreError, match=r"only_second.*name a pair, set truncate = false"):
        opened(home)
    pair = opened(home, pair="other", max_length=12)
    assert prepared(pair, b"the cat", other=[b"a dog " * 50])["input_ids"].shape == (1, 12)
    with pytest.raises(BadRequest, match=r"row 1: the text cannot be tokenised: .*too short"):
        prepared(pair, b"cat", b"the cat " * 50, other=[b"a dog", b"a dog"])


def test_a_new_name_leaves_rows_filled_up(folder: Path) -> None:
    model = Signature(
        tuple(TensorSpec(name, "int64", ("batch", "n")) for name in ("tokens", "attention_mask")),
        (TensorSpec("y", "float32", ("batch", 2)),),
    )
    steps = ({"step": "tokenise", "pad": 7}, {"step": "rename", "input": "input_ids", "to": "tokens"})
    pipeline = open_pipeline({"pre": steps}, model, Around(folder=folder), where="it")
    assert pipeline is not None
    got = prepared(pipeline, b"cat", b"a dog ran over the hill")
    assert got["tokens"].shape == got["attention_mask"].shape
    assert got["tokens"][0, -1] == 7


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"file": "other.json"}, "there is no file"),
        ({"file": "../tokenizer.json"}, "lies outside of"),
        ({"file": "junk.json"}, r"junk.json is no tokenizer.json that can be read"),
        ({"max_length": 2}, "leaves no room beside the tokenizer's own 2 tokens"),
        ({"ids": "a", "mask": "a"}, "names must differ"),
        ({"mask": "mask"}, "leaves mask: .* which the model does not take"),
        ({"dtype": "int32"}, "int32.*takes input_ids: int64"),
        ({"padding": "longest"}, r"give input_ids: int64\[length\] .* takes input_ids: int64\[12\]"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_told_at_load(folder: Path, told: dict[str, Any], says: str) -> None:
    (folder / "junk.json").write_text("{}")
    with pytest.raises((StoreError, InvalidSetting), match=says):
        opened(folder, length=12, **{"padding": "max", "max_length": 12, **told})


def test_what_no_step_reads_goes_to_the_model_as_it_is(folder: Path) -> None:
    model = Signature(
        (
            TensorSpec("input_ids", "int64", ("batch", "n")),
            TensorSpec("attention_mask", "int64", ("batch", "n")),
            TensorSpec("age", "float32", ("batch", 1)),
        ),
        (TensorSpec("y", "float32", ("batch", 2)),),
    )
    pipeline = open_pipeline({"pre": ({"step": "tokenise"},)}, model, Around(folder=folder), where="it")
    assert pipeline is not None
    assert [str(spec) for spec in pipeline.signature.inputs] == ["text: string[rows]", "age: float32[rows, 1]"]
    age = np.ones((2, 1), np.float32)
    texts = np.array([b"cat", b"dog"], object)
    got = pipeline.prepare({"text": texts, "age": age}, lambda: False, 1 << 20)
    assert got["age"] is age


def test_rows_are_bounded_as_they_are_padded_and_not_as_they_came(folder: Path) -> None:
    pipeline = opened(folder, max_length=400)
    texts = np.array([b"cat " * 398, *[b"cat"] * 63], object)
    row_bytes = 2 * 400 * 8  # ids and mask, int64
    with pytest.raises(TooLarge, match="take more than"):
        pipeline.prepare({"text": texts}, lambda: False, 10 * row_bytes)
    assert pipeline.prepare({"text": texts}, lambda: False, 64 * row_bytes)["input_ids"].shape == (64, 400)
