"""Text: what becomes of strange files, how a text is cut into columns and pieces, and what a reader carries on."""
import itertools
from pathlib import Path

import pytest
import torch

from conas.errors import InputError
from conas.recurrent.model import Masks, RecurrentNetwork, TextBatch
from conas.recurrent.options import DropoutOptions
from conas.recurrent.steps import Reader, Schedule, TextMeter, evaluate, validation_text
from conas.recurrent.text import CORPORA, Text, load_corpus, random_lengths
from rnn import genotypes


def write(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        content = texts.get(split, texts["train"])
        (folder / f"{split}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def words_of(corpus, split) -> list[str]:
    return [corpus.words[i] for i in corpus.ids[split]]


def test_lines_end_with_eos_and_words_are_numbered_as_they_come(tmp_path):
    corpus = load_corpus("x", write(tmp_path / "own", train=" b a  b \n\n a c\r\nb", valid="c\n", test="\n"))
    assert words_of(corpus, "train") == ["b", "a", "b", "<eos>", "<eos>", "a", "c", "<eos>", "b", "<eos>"]
    assert (words_of(corpus, "valid"), words_of(corpus, "test")) == (["c", "<eos>"], ["<eos>"])
    assert (corpus.words, corpus.name) == (("b", "a", "<eos>", "c"), "own")
    assert corpus.ids["train"].dtype == torch.int64


def test_byte_order_mark_one_huge_line_and_rare_characters(tmp_path):
    text = "﻿" + "wörd " * 200_000
    corpus = load_corpus("x", write(tmp_path / "own", train=text, valid="wörd\x0bwörd wörd\n"))
    assert corpus.words == ("wörd", "<eos>")
    assert len(corpus.ids["train"]) == 200_001
    assert words_of(corpus, "valid") == ["wörd", "wörd", "wörd", "<eos>"]


def test_unknown_words(tmp_path):
    with pytest.raises(InputError, match=r"valid.txt: has 2 words that train.txt has not, the first is 'z'.*<unk>"):
        load_corpus("x", write(tmp_path / "a", train="a b\n", valid="a z z\n"))
    corpus = load_corpus("x", write(tmp_path / "b", train="a <unk>\n", valid="a z z\n"))
    assert words_of(corpus, "valid") == ["a", "<unk>", "<unk>", "<eos>"]
    assert any("2 of 4 words" in note for note in corpus.notes)


@pytest.mark.parametrize("content, why", [
    (b"a b\nc \xff d\n", r"line 2 is not UTF-8 \(byte 0xff at position 6"), (b"", "is empty")])
def test_files_that_are_no_text(tmp_path, content, why):
    with pytest.raises(InputError, match=f"test.txt: {why}"):
        load_corpus("x", write(tmp_path, train="a\n", test=content))
    (tmp_path / "test.txt").unlink()
    (tmp_path / "test.txt").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load_corpus("x", tmp_path)


def test_missing_files_say_where_the_right_ones_are(tmp_path):
    with pytest.raises(InputError) as error:
        load_corpus("penn", tmp_path)
    for part in ("penn/train.txt", "5,101,618", "f26c4b92c5fdc7b3f8c7cdcb991d8420", "http"):
        assert part in str(error.value).replace(str(tmp_path) + "/", "")
    corpus = load_corpus("penn", write(tmp_path / "penn", train="a\n").parent)
    assert corpus.name == "penn" and sum("not the published file" in note for note in corpus.notes) == 3


def test_the_projects_own_text():
    corpus = load_corpus("gospels", Path(__file__).parents[2] / "data")
    assert {split: len(ids) for split, ids in corpus.ids.items()} == {"train": 81793, "valid": 11621, "test": 8713}
    assert len(corpus.words) == 1596 and not corpus.notes and set(CORPORA) >= {"penn", "wikitext-2", "gospels"}


def test_columns_hold_the_text_in_order(tmp_path):
    corpus = load_corpus("x", write(tmp_path, train=" ".join(f"w{i}" for i in range(21))))
    text = Text(corpus, "train", 4)
    assert text.columns.t().flatten().tolist() == list(range(20)) and text.steps == 4
    pieces = list(text.pieces(3))
    assert torch.equal(torch.cat([tokens for tokens, _ in pieces]), text.columns[:-1])
    assert torch.equal(torch.cat([targets for _, targets in pieces]), text.columns[1:])
    assert validation_text(corpus, "cpu").columns.shape == (2, 10)
    with pytest.raises(InputError, match="too few for 12 columns"):
        Text(corpus, "train", 12)


def test_lengths_are_a_function_of_seed_and_epoch_and_cover_the_text(tmp_path):
    def lengths(seed, spread=5.0):
        return random_lengths(5000, 35, spread, torch.Generator().manual_seed(seed))

    assert lengths(1) == lengths(1) != lengths(2)
    for seed in range(5):
        assert sum(lengths(seed)) == sum(lengths(seed, 0)) == 5000
        assert all(5 <= n <= 55 for n in lengths(seed)[:-1])
        assert set(lengths(seed, 0)[:-1]) <= {35, 17}
    many = list(itertools.chain(*(lengths(seed, 0)[:-1] for seed in range(50))))
    assert many.count(17) / len(many) == pytest.approx(0.05, abs=0.015)


@pytest.fixture
def small(tmp_path):
    corpus = load_corpus("x", write(tmp_path, train=" ".join("abcdefgh"[i * i % 8] for i in range(120))))
    torch.manual_seed(0)
    return corpus, RecurrentNetwork(len(corpus.words), 5, genotypes.DARTS_V1)


def test_reader_carries_the_hidden_state_without_its_history(small):
    corpus, network = small
    reader = Reader(Text(corpus, "train", 3), network)
    first = reader.next(7, Masks())
    assert not first.hidden.any()
    network.predict(first)
    second = reader.next(7, Masks())
    assert torch.equal(second.hidden, first.after) and not second.hidden.requires_grad and second.hidden.any()
    assert torch.equal(second.tokens[0], first.targets[-1])
    network.predict(second)
    continued = Reader(reader.text, network, reader.state()).next(7, Masks())
    following = reader.next(7, Masks())
    assert torch.equal(continued.hidden, following.hidden) and torch.equal(continued.tokens, following.tokens)
    network.predict(following)
    while reader.row:
        network.predict(reader.next(7, Masks()))
    assert not reader.next(7, Masks()).hidden.any()  # at the top again


def test_masks_are_a_function_of_the_step(small):
    corpus, network = small
    schedule = Schedule(Text(corpus, "train", 3), 7, 0.0, DropoutOptions(), seed=1)
    one, two = (schedule.masks("weights", network, 0, 1) for _ in range(2))
    others = [schedule.masks("weights", network, 0, 2), schedule.masks("weights", network, 1, 1),
              schedule.masks("alphas", network, 0, 1)]
    assert torch.equal(one.outputs, two.outputs)
    assert not any(torch.equal(one.outputs, other.outputs) for other in others)


def test_evaluation_does_not_depend_on_the_pieces(small):
    corpus, network = small
    text = Text(corpus, "valid", 1)
    log_prob, _ = network(text.columns[:-1], network.initial(1))
    loss = -log_prob.gather(2, text.columns[1:, :, None]).mean().item()
    assert evaluate(network, text, 1000) == pytest.approx(loss, rel=1e-5)
    assert evaluate(network, text, 7) == pytest.approx(loss, rel=1e-5)


def test_a_vocabulary_of_one_word_has_perplexity_one(tmp_path):
    corpus = load_corpus("x", write(tmp_path, train="\n" * 50))
    assert corpus.words == ("<eos>",)
    network = RecurrentNetwork(1, 3, genotypes.DARTS_V2)
    assert evaluate(network, Text(corpus, "test", 1), 9) == 0.0


def test_a_loss_that_is_not_finite_names_its_place(small):
    corpus, network = small
    text = Text(corpus, "train", 3)
    meter = TextMeter("x", 2, Schedule(text, 7, 0.0, DropoutOptions(), seed=1), 50)
    with pytest.raises(InputError, match="epoch 2 at batch 1, counted from 0, of the text's rows from 7"):
        for step in meter:
            tokens, targets = text.piece(0, 7)
            meter.add(torch.tensor(float("nan") if step else 1.0), TextBatch(tokens, targets, network.initial(3)))
