#!/usr/bin/env bash
# torch 2.14.1: torch.export.save and torch.onnx.export(dynamo=True) write, for every operation, the stack trace of the
# Python code that it came from. So a file that is handed on holds the full path of that code on the machine that wrote
# it, and that can be most of the file. Seen:
#     the .pt2 file holds the path of the program: True
#     the .onnx file holds the path of the program: True
# Exits with 1 if that changes. Deleting `stack_trace` from node.meta of program.graph before writing helps both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q torch==2.14.1 numpy onnx==1.23.2 onnxscript==0.7.2
cd "$folder"
cat > write.py <<'PROGRAM'
import os
import zipfile

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).relu()


program = torch.export.export(Network(), (torch.zeros(1, 3, 8, 8),))
torch.export.save(program, "network.pt2")
torch.onnx.export(program, dynamo=True, verbose=False).save("network.onnx")
here = os.path.abspath(__file__).encode()
with zipfile.ZipFile("network.pt2") as archive:
    print("the .pt2 file holds the path of the program:", any(here in archive.read(n) for n in archive.namelist()))
with open("network.onnx", "rb") as file:
    print("the .onnx file holds the path of the program:", here in file.read())
PROGRAM
venv/bin/python -W ignore write.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep '^the .*holds' seen.txt | diff - <(printf '%s\n' 'the .pt2 file holds the path of the program: True' \
    'the .onnx file holds the path of the program: True')
