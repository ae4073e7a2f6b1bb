#!/usr/bin/env bash
# ptflops 0.7.5 (backend "pytorch") counts nn.ReLU and pooling modules twice: once by a hook on the module, and once more
# because torch.nn.functional is replaced while it counts, which these modules call. The same operation written as
# torch.nn.functional.relu counts once, as torch.relu not at all. Seen with torch 2.14.1, for 2048 values each:
#     nn.ReLU 4096
#     functional.relu 2048
#     torch.relu 0
#     nn.MaxPool2d 4096
# Exits with 1 if that changes. What one wants of a table, multiply-adds of convolutions and linear layers, is what
# backend="aten" counts of these networks, but for their biases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q torch==2.14.1 numpy ptflops==0.7.5
cd "$folder"
cat > count.py <<'PROGRAM'
import torch
from ptflops import get_model_complexity_info
from torch import nn
from torch.nn import functional


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


for name, part in (("nn.ReLU", nn.ReLU()), ("functional.relu", Function(lambda x: functional.relu(x))),
                   ("torch.relu", Function(torch.relu)), ("nn.MaxPool2d", nn.MaxPool2d(3, 1, 1))):
    network = nn.Sequential(part, nn.Conv2d(8, 1, 1, bias=False))  # one multiply-add for each of the 2048 values
    count, _ = get_model_complexity_info(network, (8, 16, 16), as_strings=False, print_per_layer_stat=False,
                                         backend="pytorch")
    print(f"{name} {count - 8 * 16 * 16:.0f}")
PROGRAM
venv/bin/python -W ignore count.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep -E '^(nn|functional|torch)\.' seen.txt | diff - <(printf '%s\n' 'nn.ReLU 4096' 'functional.relu 2048' \
    'torch.relu 0' 'nn.MaxPool2d 4096')
