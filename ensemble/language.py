"""A committee of language models: the mean of their next-word probabilities, word by word.

The probabilities of a test text, words times vocabulary for each member, would fill gigabytes, so all members read the
text side by side and only the probability of each right word is kept.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from conas.errors import InputError
from conas.files import write_json
from conas.places import find_data, remember_data
from conas.recurrent.files import restore
from conas.recurrent.model import LanguageModel, TextBatch
from conas.recurrent.steps import perplexity, right_word_log_probabilities
from conas.recurrent.text import Corpus, Text, load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs.scores import remark


def open_members(paths: Mapping[str, Path], data: str | None) -> tuple[dict[str, LanguageModel], Corpus]:
    """The networks of checkpoints of train.py by name, and the corpus that all of them were trained on.

    Raises InputError naming a member that was trained on another corpus than the first.
    """
    members, first, dataset_info, roots = {}, None, None, {}
    for name, path in paths.items():
        checkpoint = checkpoints.load(path)
        members[name] = restore(path, checkpoint)
        if dataset_info is None:
            first, dataset_info = name, checkpoint["dataset"]
        if checkpoint["dataset"]["fingerprint"] != dataset_info["fingerprint"]:
            raise InputError(f"{first} and {name} were trained on different texts, and cannot be combined; choose "
                             "other members with --members")
        roots[path] = checkpoint["dataset"]["root"]
    corpus = load_corpus(dataset_info["name"], find_data(paths[first], dataset_info["root"], data))
    if corpus.fingerprint != dataset_info["fingerprint"]:
        raise InputError(f"{corpus.folder}: its text is not the one that the members were trained on; restore it, or "
                         "name another folder with --data")
    for path, root in roots.items() if data else ():
        remember_data(path.absolute().parent.parent, root, corpus.folder)
    return members, corpus


def mean_probability(log_probabilities_MN: Tensor) -> Tensor:
    """(N,) float64: the log of the members' mean probability of each of N words, from their logs (M, N)."""
    ordered_MN = log_probabilities_MN.double().sort(dim=0).values  # the same bits in any order of the members
    return ordered_MN.logsumexp(dim=0) - math.log(len(ordered_MN))


@torch.no_grad()
def score(members: Sequence[LanguageModel], text: Text, bptt: int) -> Tensor:
    """Log-probabilities (M, N) float64, on the CPU, that each member gives the N right words of a text.

    NaN where those that it gives to all words are not finite.
    """
    states = [member.eval().initial(text.columns.shape[1]) for member in members]
    found: list[list[Tensor]] = [[] for _ in members]
    for tokens, targets in text.pieces(bptt):
        for m, member in enumerate(members):
            batch = TextBatch(tokens, targets, states[m])
            found[m].append(right_word_log_probabilities(member, batch).double().cpu().flatten())
            states[m] = batch.after
    return torch.stack([torch.cat(parts) for parts in found])


def evaluate(paths: Mapping[str, Path], data: str | None, bptt: int, device: torch.device) -> dict:
    """Loss and perplexity of every member and of their committee on the test text, read word after word.

    Raises InputError naming the file of a member some of whose predictions are not finite.
    """
    if len(paths) < 2:
        raise InputError(f"only {', '.join(paths) or 'none'} is there, and a committee needs two members; start rnn's "
                         "train.py with another --seed and --save, or name checkpoints with --members")
    members, corpus = open_members(paths, data)
    text = Text(corpus, "test", 1, device)
    log_probabilities_MN = score([member.to(device) for member in members.values()], text, bptt)
    for path, own in zip(paths.values(), log_probabilities_MN):
        if bad := remark(int(own.isnan().sum()), len(own)):
            raise InputError(f"{path}: {bad} on the test text; leave it out (--members names the others), or train it "
                             "again with a lower --lr under another --save name")
    losses = dict(zip(members, (-log_probabilities_MN.mean(dim=1)).tolist()))
    committee = -mean_probability(log_probabilities_MN).mean().item()
    return {"task": "language", "dataset": corpus.name, "fingerprint": corpus.fingerprint, "words": text.steps,
            "vocabulary": len(corpus.words),
            "members": {name: {"checkpoint": str(paths[name]), "loss": loss, "perplexity": perplexity(loss)}
                        for name, loss in losses.items()},
            "committee": {"combination": "mean_softmax", "loss": committee, "perplexity": perplexity(committee)}}


def as_text(summary: dict) -> str:
    """The table of a committee of language models."""
    rows = [*((name, member) for name, member in summary["members"].items()), ("committee", summary["committee"])]
    width = max(len(name) for name, _ in rows)
    best = min(member["loss"] for member in summary["members"].values())
    return "\n".join([
        f"Committee of {len(rows) - 1} by mean_softmax: {summary['dataset']}, {summary['words']:,} words of test text, "
        f"vocabulary of {summary['vocabulary']:,}", "", f"{'':{width}}     loss  perplexity",
        *(f"{name:{width}} {row['loss']:8.4f}  {row['perplexity']:10.2f}" for name, row in rows),
        f"loss lower by {best - summary['committee']['loss']:.4f} than that of the best member on this text"])


def write(folder: Path, summary: dict) -> Path:
    """Write the summary as committee.json into `folder`."""
    path = folder / "committee.json"
    write_json(path, summary)
    return path
