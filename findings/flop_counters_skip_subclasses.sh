#!/usr/bin/env bash
# thop 0.1.1.post2209072238 and ptflops 0.7.5 (backend "pytorch") count a module by its exact class. A convolution of a
# subclass of nn.Conv2d that changes nothing counts as 0 multiply-adds, without a warning; thop counts 0 parameters too.
# Seen with torch 2.14.1:
#     Conv2d thop 147456 multiply-adds, 576 parameters; ptflops 147456
#     Own thop 0 multiply-adds, 0 parameters; ptflops 0
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q torch==2.14.1 numpy setuptools==84.2.1 \
    thop==0.1.1.post2209072238 ptflops==0.7.5
cd "$folder"
cat > count.py <<'PROGRAM'
import torch
from ptflops import get_model_complexity_info
from thop import profile
from torch import nn


class Own(nn.Conv2d):
    pass


for kind in (nn.Conv2d, Own):
    networks = [nn.Sequential(kind(8, 8, 3, padding=1, bias=False)) for _ in range(2)]
    macs, parameters = profile(networks[0], (torch.zeros(1, 8, 16, 16),), verbose=False)
    theirs, _ = get_model_complexity_info(networks[1], (8, 16, 16), as_strings=False, print_per_layer_stat=False,
                                          backend="pytorch")
    print(f"{kind.__name__} thop {macs:.0f} multiply-adds, {parameters:.0f} parameters; ptflops {theirs:.0f}")
PROGRAM
venv/bin/python -W ignore count.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
grep -E '^(Conv2d|Own) thop' seen.txt | diff - <(printf '%s\n' \
    'Conv2d thop 147456 multiply-adds, 576 parameters; ptflops 147456' \
    'Own thop 0 multiply-adds, 0 parameters; ptflops 0')
