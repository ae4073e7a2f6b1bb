#!/usr/bin/env bash
# torch 2.14.1 on x86-64, images channels last: the gradient of a depthwise 3x3 convolution w.r.t. its weights takes two
# to three times as long as the convolution. With dilation 2, which is the same number of multiplications, the
# convolution takes no longer, but its gradient more than ten times as long as it (seen: 24 and 42 times, for 32x32 and
# 16x16 pixels, on one thread of an AMD EPYC). Seen:
#     dilation 1: gradient more than 10 times the convolution: False
#     dilation 2: gradient more than 10 times the convolution: True
# Exits with 1 if that changes. The sum over pixels of gradient times shifted image, one product for each of the nine
# weights, is the same number and does not have this cost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q torch==2.14.1 numpy
cd "$folder"
cat > gradient.py <<'PROGRAM'
import time

import torch
from torch import nn

torch.set_num_threads(1)


def seconds(run, repeats):
    """Of one run: the least of seven means, in processor time, which other processes on the machine disturb little."""
    times = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(repeats):
            run()
        times.append((time.process_time() - start) / repeats)
    return min(times)


for dilation in (1, 2):
    conv = nn.Conv2d(64, 64, 3, padding=dilation, dilation=dilation, groups=64, bias=False)
    x = torch.randn(32, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    y = conv(x)
    ones = torch.ones_like(y)
    forward = seconds(lambda: conv(x), 10)
    backward = seconds(lambda: torch.autograd.grad(y, conv.weight, ones, retain_graph=True), 3)
    print(f"dilation {dilation}: {backward / forward:.1f}")
    print(f"dilation {dilation}: gradient more than 10 times the convolution: {backward > 10 * forward}")
PROGRAM
venv/bin/python -W ignore gradient.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep 'more than' seen.txt | diff - <(printf '%s\n' \
    'dilation 1: gradient more than 10 times the convolution: False' \
    'dilation 2: gradient more than 10 times the convolution: True') || { cat seen.txt >&2; exit 1; }
