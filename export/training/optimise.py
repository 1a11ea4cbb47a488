"""Full-precision master weights for a network that computes in bf16: AdamW, gradient clipping and the moving average.

A network in plain bf16 runs 1.3 to 5 times faster on a CPU with bf16 units than under autocast, which casts every weight again at each
step; but bf16 weights lose small updates. So the masters are fp32, AdamW and the moving average work on them, and the network gets a copy.
"""

import math

import torch
from torch import Tensor, nn

from snoopi_rt.export.training.processes import Processes


class MasterWeights:
    """The trainable parameters of `network` in fp32, with their AdamW and moving average.

    `ema` is the decay of the moving average after warm-up (Karras-style ramp (1 + step) / (10 + step)); 0 keeps none.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        ema: float = 0.999,
        clip: float = 1.0,
        processes: Processes | None = None,
    ):
        self.names, self.live = zip(*((name, p) for name, p in network.named_parameters() if p.requires_grad), strict=True)
        self.masters = [p.detach().float().clone() for p in self.live]
        self.averages = [p.clone() for p in self.masters] if ema else []
        self.ema, self.clip, self.steps, self.processes = ema, clip, 0, processes
        # In parts, so that the gradients of one part at a time are widened to fp32.
        self.adams = [
            (part, torch.optim.AdamW([self.masters[i] for i in part], lr=0.0, betas=betas, weight_decay=weight_decay, fused=True))
            for part in _parts([p.numel() for p in self.live])
        ]
        self.sums: list[Tensor] | None = None

    def accumulate(self) -> None:
        """Adds the network's gradients to a sum in fp32, which `step` takes instead of them, and clears them."""
        if self.sums is None:
            self.sums = [torch.zeros_like(master) for master in self.masters]
        for total, parameter in zip(self.sums, self.live, strict=True):
            # A parameter outside the loss (a norm that the network does not reach) has no gradient.
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None

    def step(self, lr: float) -> float:
        """One AdamW step with the gradients that the network holds, or that were accumulated, meant over all processes; clears them.

        Returns the gradient norm before clipping. Where that is not finite, nothing is changed.
        """
        if self.processes is not None and self.processes.count > 1:
            if self.sums is None:
                self.accumulate()
            assert self.sums is not None and self.processes is not None
            self.processes.mean(self.sums)
        grads = self.sums or [p.grad for p in self.live]
        norm = torch.stack([g.norm(dtype=torch.float32) for g in grads if g is not None]).norm().item()
        if not math.isfinite(norm):
            return norm
        shrink = min(1.0, self.clip / max(norm, 1e-12))
        for part, adam in self.adams:
            for i in part:
                grad = grads[i]
                self.masters[i].grad = torch.zeros_like(self.masters[i]) if grad is None else grad.float() * shrink
            adam.param_groups[0]["lr"] = lr
            adam.step()
            adam.zero_grad()
        self.sums = None
        self.steps += 1
        if self.ema:
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        self.publish()
        for parameter in self.live:
            parameter.grad = None
        return norm

    @torch.no_grad()
    def publish(self, averaged: bool = False) -> None:
        """Copies the masters, or their moving averages where there are any, into the network."""
        torch._foreach_copy_(list(self.live), self.averages if averaged and self.averages else self.masters)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average as a state dict, fp32; the masters where none is kept."""
        return dict(zip(self.names, self.averages or self.masters, strict=True))

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs, as flat named tensors."""
        found = {"steps": torch.tensor(self.steps)}
        for part, adam in self.adams:
            for i in part:
                name, master = self.names[i], self.masters[i]
                zeros = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
                moments = adam.state[master] if self.steps else zeros
                found[f"master.{name}"] = master
                found[f"first.{name}"], found[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
                if self.ema:
                    found[f"average.{name}"] = self.averages[i]
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave. Raises KeyError where a tensor is missing."""
        self.steps = int(state["steps"])
        for part, adam in self.adams:
            for i in part:
                name, master = self.names[i], self.masters[i]
                master.copy_(state[f"master.{name}"])
                if self.ema:
                    self.averages[i].copy_(state[f"average.{name}"])
                adam.state[master] = {
                    "step": torch.tensor(float(self.steps), device=master.device),
                    "exp_avg": state[f"first.{name}"].to(master, copy=True),
                    "exp_avg_sq": state[f"second.{name}"].to(master, copy=True),
                }
        self.publish()


PART = 64 * 2**20
"""Parameters whose fp32 gradients exist at one time: 256 MB."""


def _parts(sizes: list[int]) -> list[list[int]]:
    """The numbers of the parameters, in groups of about PART."""
    parts: list[list[int]] = [[]]
    room = PART
    for i, size in enumerate(sizes):
        if parts[-1] and size > room:
            parts.append([])
            room = PART
        parts[-1].append(i)
        room -= size
    return parts


def learning_rate(peak: float, step: int, steps: int, *, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Linear warm-up, flat, then a cosine fall to zero over the last part of the run."""
    start = int(steps * decay_from)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < start:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))
