"""Measures the resident memory of one swap or load in a process of its own; prints JSON. Started by test_models.py.

The model: five layers of 64 MiB and one of 256 MiB, the largest first, as float32.
"""

import json
import sys

import torch
from torch import nn

import tersor
from tersor.nn import QuantLinear

MIB = 1 << 20


def resident(what):
    """VmRSS or VmHWM (the peak so far), in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(what))


def make(device):
    with torch.device(device):
        wide = [nn.Linear(4096, 16384, bias=False), nn.Linear(16384, 1024, bias=False)]
        model = nn.Sequential(*wide, nn.Linear(1024, 16384, bias=False), *(nn.Linear(4096, 4096, bias=False) for _ in range(3)))
    for p in model.parameters():
        if device == "cpu":
            p.data.fill_(0.01)  # written, so resident
    return model


def main(task, path):
    tersor.quantize_(nn.Sequential(nn.Linear(64, 64)), tersor.Int8Dynamic())(torch.zeros(1, 64))  # libraries are loaded
    model = make("meta" if "meta" in task else "cpu")
    start, seen = resident("VmRSS"), []
    if task == "swap":
        original = QuantLinear.from_linear.__func__

        def spy(cls, linear, fmt=None):
            seen.append(resident("VmRSS"))
            return original(cls, linear, fmt)

        QuantLinear.from_linear = classmethod(spy)
        tersor.quantize_(model, tersor.Int8Dynamic())
    else:
        tersor.load_(model, path, mmap=task != "load_meta_copied")
    peak = resident("VmHWM")
    touched = [int(m.weight_packed.view(-1)[::1024].sum()) for m in model]  # every page
    end = resident("VmRSS")
    if task == "swap":
        tersor.save(model, path)
    print(json.dumps({"start": start, "peak": peak, "end": end, "seen": seen, "used_peak": resident("VmHWM"), "touched": touched}))


if __name__ == "__main__":
    main(*sys.argv[1:])
