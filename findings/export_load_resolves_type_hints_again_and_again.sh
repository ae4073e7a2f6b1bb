#!/usr/bin/env bash
# torch 2.14.1: torch.export.load asks typing.get_type_hints for the annotations of its dataclasses at every object that
# it reads, and keeps no answer: 68 times for each convolution of the program, though there are 21 classes in all.
# Each call resolves annotations that are strings. Seen:
#     1 convolutions: 100 calls for 21 classes
#     200 convolutions: 13632 calls for 21 classes
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q torch==2.14.1 numpy
cd "$folder"
cat > load.py <<'PROGRAM'
import io
import typing

import torch
from torch import nn

real, asked = typing.get_type_hints, []


def counting(of, *arguments, **more):
    asked.append(of)
    return real(of, *arguments, **more)


for convolutions in (1, 200):
    network = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(convolutions))).eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 4, 2, 2),)), file)
    file.seek(0)
    asked.clear()
    typing.get_type_hints = counting
    torch.export.load(file)
    typing.get_type_hints = real
    print(f"{convolutions} convolutions: {len(asked)} calls for {len(set(asked))} classes")
PROGRAM
venv/bin/python -W ignore load.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep 'convolutions:' seen.txt | diff - <(printf '%s\n' '1 convolutions: 100 calls for 21 classes' \
    '200 convolutions: 13632 calls for 21 classes')
