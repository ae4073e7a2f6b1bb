"""What tests of hostile input share: damaged bytes, odd values, payloads, and what a reader may do with them."""
import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from conas.errors import InputError

fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

def examples(some: int, many: int):
    """A test's argument `examples`: `some` in `make test`, `many` in `make acceptance`."""
    return pytest.mark.parametrize("examples", [some, pytest.param(many, marks=pytest.mark.slow)])


class Payload:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def payloads(target: Path) -> dict[str, bytes]:
    """Files, by kind, that would touch `target` if whatever is pickled in them were loaded."""
    def saved(write, *args, **kwargs) -> bytes:
        file = io.BytesIO()
        write(file, *args, **kwargs)
        return file.getvalue()

    payload, objects = Payload(target), np.array([Payload(target)], dtype=object)
    return {"pickle": pickle.dumps(payload), "old pickle": pickle.dumps(payload, protocol=0),
            "torch": saved(lambda file: torch.save({"format": "conas-checkpoint", "state": payload}, file)),
            "legacy torch": saved(lambda file: torch.save(payload, file, _use_new_zipfile_serialization=False)),
            "npy": saved(np.save, objects),
            "npz": saved(np.savez, **{name: objects for name in ("logits", "labels", "images", "classes")})}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All that is below a folder, by name."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(path: Path, read, *words: str):
    """What `read()` gives, or None if it raises an InputError of one line with all `words`. Either changes no file."""
    before = snapshot(path.parent)
    try:
        result = read()
    except InputError as error:
        result = None
        assert "\n" not in str(error).strip() and all(word in str(error) for word in words), str(error)
    assert snapshot(path.parent) == before
    return result


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """Random bytes, or `good` cut, with flipped bits, a part overwritten, a part taken out, or something put in."""
    at = draw(st.integers(0, len(good) - 1), "position")
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "overwrite", "take out", "put in", "random"]), "damage")
    if kind == "random":
        return draw(st.binary(max_size=300))
    if kind == "cut":
        return good[:at]
    content = bytearray(good)
    if kind == "flip":
        content[at] ^= 1 << draw(st.integers(0, 7), "bit")
        for other in draw(st.lists(st.integers(0, len(good) - 1), max_size=5), "others"):
            content[other] ^= 1 << draw(st.integers(0, 7))
    elif kind == "overwrite":
        new = draw(st.binary(min_size=1, max_size=40))
        content[at:at + len(new)] = new
    elif kind == "take out":
        del content[at:at + draw(st.integers(1, 100))]
    else:
        content[at:at] = draw(st.binary(min_size=1, max_size=40))
    return bytes(content)


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 10**6, 2**31, 2**63, -2**63, 10**400, 0.5, -0.0, 1e308, math.inf, -math.inf,
                           math.nan]) | st.integers() | st.floats()
TEXTS = st.sampled_from(["", "x", "../..", "/", "a\nb", "\x1b[2J", "\0", "é", "\ud800", "none", "<script>", "9" * 5000,
                         "train", "cifar10", "folder"]) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
                      max_leaves=8)


@st.composite
def changed(draw, good, values=VALUES):
    """A copy of lists and dicts in which something has another value, or is gone, or is there twice."""
    if isinstance(good, (dict, list)) and good and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(good) if isinstance(good, dict) else range(len(good))))
        copy = good.copy()
        kind = draw(st.sampled_from(["deeper", "deeper", "deeper", "gone", "more"]))
        if kind == "gone":
            del copy[key]
        elif kind == "more" and isinstance(good, list):
            copy *= draw(st.sampled_from([2, 300]))
        elif kind == "more":
            copy[draw(TEXTS)] = draw(values)
        else:
            copy[key] = draw(changed(good[key], values))
        return copy
    return draw(values)


def hostile_json(good) -> st.SearchStrategy[bytes]:
    """JSON with something changed, damaged JSON, other JSON, and things that parsers stumble over."""
    text = json.dumps(good).encode()
    pairs = ", ".join(f'"{key}": {json.dumps(good[key])}' for key in good)
    return (changed(good).map(lambda value: json.dumps(value).encode()) | damaged(text)
            | VALUES.map(lambda value: json.dumps(value).encode())
            | st.sampled_from([b"[" * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe",
                               b"", b"null", b"NaN", b"[" + b"0," * 200_000 + b"0]", f"{{{pairs}, {pairs}}}".encode(),
                               "﻿{}".encode()]))
