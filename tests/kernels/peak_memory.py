"""Print the peak memory in MiB of a policy loss of some rows, without its gradients. Runs in a process of its own."""

import sys
from pathlib import Path

import torch

from alignpro_kernels import cpp_head, policy_loss


def resident(field: str) -> float:
    """Return the resident memory of this process in MiB: now (VmRSS), or the peak since its last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def one(logprob, entropy, kl, rows):
    """Return the coefficients of the negative log-likelihood."""
    return -logprob, -torch.ones_like(logprob), None, None


def main(rows: int, width: int = 16, vocabulary: int = 40_000) -> None:
    """Measure one loss with a trained head."""
    weight = torch.randn(vocabulary, width, requires_grad=True)
    hidden = torch.randn(rows, width, requires_grad=True)
    target = torch.randint(vocabulary, (rows,))
    policy_loss(hidden[:8], weight, target[:8], one, backend="cpp").loss.backward()  # loads libraries
    hidden.grad = weight.grad = None
    cpp_head.release_workspace()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    policy_loss(hidden, weight, target, one, backend="cpp").loss.backward()
    gradients = 4 * (weight.numel() + hidden.numel()) / 2**20
    print(round(resident("VmHWM") - before - gradients))


main(int(sys.argv[1]))
