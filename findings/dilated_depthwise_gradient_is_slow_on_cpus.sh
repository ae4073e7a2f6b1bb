#!/usr/bin/env bash
# torch 2.14.1 on x86-64, images channels last: a depthwise 3x3 convolution of dilation 2 is as many multiplications as
# one of dilation 1 and takes no longer, but its gradient w.r.t. the weights takes several times as long (seen on one
# thread of an AMD EPYC with AVX-512: 6.0 and 5.3 times; on one without, it took 24 to 42 times as long as the
# convolution, where that of dilation 1 took two to three times as long). Seen:
#     dilation 2: convolution less than twice as long: True
#     dilation 2: gradient more than three times as long: True
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


found = []
for dilation in (1, 2):
    conv = nn.Conv2d(64, 64, 3, padding=dilation, dilation=dilation, groups=64, bias=False)
    x = torch.randn(32, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    y = conv(x)
    ones = torch.ones_like(y)
    with torch.no_grad():
        forward = seconds(lambda: conv(x), 10)
    backward = seconds(lambda: torch.autograd.grad(y, conv.weight, ones, retain_graph=True), 3)
    print(f"dilation {dilation}: {1e3 * forward:.2f} ms, gradient {1e3 * backward:.2f} ms")
    found.append((forward, backward))
(forward, backward), (forward2, backward2) = found
print(f"dilation 2: convolution less than twice as long: {forward2 < 2 * forward}")
print(f"dilation 2: gradient more than three times as long: {backward2 > 3 * backward}")
PROGRAM
venv/bin/python -W ignore gradient.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep 'as long' seen.txt | diff - <(printf '%s\n' \
    'dilation 2: convolution less than twice as long: True' \
    'dilation 2: gradient more than three times as long: True') || { cat seen.txt >&2; exit 1; }
