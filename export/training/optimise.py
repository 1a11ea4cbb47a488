"""Full-precision master weights of a network that computes in bf16: AdamW or Muon, gradient clipping and the moving average.

On a CPU with bf16 units plain bf16 is 1.3 to 5 times faster than autocast, which casts every weight again at each step; but bf16 weights
lose small updates. So the optimiser and the moving average work on fp32 masters, and the network gets a copy.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from snoopi_rt.export.training.processes import Processes

Network = TypeVar("Network", bound=nn.Module)


class MasterWeights:
    """The trainable parameters of `network` in fp32, with their optimiser and moving average.

    ema: decay of the moving average after a ramp of (1 + step) / (10 + step); 0 keeps none. clip: the largest gradient norm. muon: step the
    weights of linear layers in transformer blocks by Muon, scaled to the RMS of an AdamW step (Liu et al. 2025), so that one learning rate
    serves both; in a network without such blocks, those of all convolutions but the first and the last.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        ema: float = 0.999,
        clip: float = 1.0,
        muon: bool = False,
        processes: Processes | None = None,
    ):
        self.names, self.live = zip(*((name, p) for name, p in network.named_parameters() if p.requires_grad), strict=True)
        # Contiguous, since fused optimisers read a gradient's memory in order, and that of a channels-last parameter in the wrong one.
        self.masters = [p.detach().float().clone(memory_format=torch.contiguous_format) for p in self.live]
        self.averages = [p.clone() for p in self.masters] if ema else []
        self.ema, self.clip, self.steps, self.processes = ema, clip, 0, processes
        # In parts, so that fp32 gradients exist for one part at a time.
        matrices = {self.names.index(name) for name in _matrices(network) if name in self.names} if muon else set()
        self.adams: list[tuple[list[int], torch.optim.Optimizer]] = [
            (part, torch.optim.AdamW([self.masters[i] for i in part], lr=0.0, betas=betas, weight_decay=weight_decay, fused=True))
            for part in _parts([i for i in range(len(self.live)) if i not in matrices], [p.numel() for p in self.live])
        ]
        self.muons: list[tuple[list[int], torch.optim.Optimizer]] = [
            # Muon takes matrices: a convolution's is that of all outputs by all inputs.
            (
                part,
                torch.optim.Muon(
                    [self.masters[i].flatten(1) for i in part], lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                ),
            )
            for part in _parts(sorted(matrices), [p.numel() for p in self.live])
        ]
        self.sums: list[Tensor] | None = None

    def accumulate(self) -> None:
        """Adds the network's gradients to a sum in fp32, which `step` takes in their place, and clears them."""
        if self.sums is None:
            self.sums = [torch.zeros_like(master) for master in self.masters]
        for total, parameter in zip(self.sums, self.live, strict=True):
            # A parameter on which the loss does not depend has no gradient.
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None

    def step(self, lr: float) -> float:
        """One optimiser step with the network's gradients, or those accumulated, averaged over all processes; then clears them.

        Returns the gradient norm before clipping. If that is not finite, nothing changes.
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
        for part, optimiser in [*self.adams, *self.muons]:
            for i, stepped in zip(part, optimiser.param_groups[0]["params"], strict=True):
                grad = grads[i]
                scaled = torch.zeros_like(self.masters[i]) if grad is None else (grad.float() * shrink).contiguous()
                stepped.grad = scaled.view_as(stepped)
            optimiser.param_groups[0]["lr"] = lr
            optimiser.step()
            optimiser.zero_grad()
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
        """Copies the masters, or their moving averages if there are any, into the network."""
        torch._foreach_copy_(list(self.live), self.averages if averaged and self.averages else self.masters)

    def averaged(self, copy: Network) -> Network:
        """`copy`, of the trained network, with the moving average (the masters if none is kept) in what was trained, for evaluation.

        Raises ValueError for a network that lacks a trained parameter.
        """
        average = dict(zip(self.names, self.averages or self.masters, strict=True))
        if unknown := copy.load_state_dict(average, strict=False).unexpected_keys:
            raise ValueError(f"{type(copy).__name__} has no {', '.join(unknown)}")
        return copy.eval()

    def end(self) -> None:
        """Lets go of the optimisers' memory. No step can follow."""
        self.adams.clear()
        self.muons.clear()

    def state(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs, as named tensors."""
        tensors = {"steps": torch.tensor(self.steps)}
        for i, name in enumerate(self.names):
            tensors[f"master.{name}"] = self.masters[i]
            if self.ema:
                tensors[f"average.{name}"] = self.averages[i]
        for optimisers, moments in ((self.adams, ADAM_MOMENTS), (self.muons, MUON_MOMENTS)):
            for part, optimiser in optimisers:
                for i, stepped in zip(part, optimiser.param_groups[0]["params"], strict=True):
                    for prefix, key in moments.items():
                        moment = optimiser.state[stepped][key] if self.steps else torch.zeros_like(stepped)
                        tensors[f"{prefix}.{self.names[i]}"] = moment.view_as(self.masters[i])
        return tensors

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned. Raises KeyError for a missing tensor."""
        self.steps = int(state["steps"])
        for i, name in enumerate(self.names):
            self.masters[i].copy_(state[f"master.{name}"])
            if self.ema:
                self.averages[i].copy_(state[f"average.{name}"])
        for optimisers, moments in ((self.adams, ADAM_MOMENTS), (self.muons, MUON_MOMENTS)):
            for part, optimiser in optimisers:
                for i, stepped in zip(part, optimiser.param_groups[0]["params"], strict=True):
                    values = {
                        key: state[f"{prefix}.{self.names[i]}"].to(stepped, copy=True).view_as(stepped) for prefix, key in moments.items()
                    }
                    if optimisers is self.adams:
                        values["step"] = torch.tensor(float(self.steps), device=stepped.device)
                    optimiser.state[stepped] = values
        self.publish()


ADAM_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
MUON_MOMENTS = {"momentum": "momentum_buffer"}
"""What an optimiser keeps of each parameter: its name in a checkpoint, and torch's own."""
PART = 64 * 2**20
"""Parameters whose fp32 gradients exist at the same time: 256 MB."""


def _matrices(network: nn.Module) -> list[str]:
    """The weights that Muon steps: of linear layers in diffusers' transformer blocks, neither tables of vectors nor a UNet's embedding of
    the timestep; in a network without such blocks, of convolutions that neither read its input nor write its output."""
    layers = dict(network.named_modules())
    if any("transformer_blocks." in name for name in layers):
        return [f"{name}.weight" for name, module in layers.items() if "transformer_blocks." in name and isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name, module in layers.items() if isinstance(module, nn.Conv2d)][1:-1]


def _parts(numbers: list[int], sizes: list[int]) -> list[list[int]]:
    """The numbers of some parameters, in groups of about PART elements; no group for no numbers."""
    parts: list[list[int]] = []
    room = 0
    for i in numbers:
        if not parts or sizes[i] > room:
            parts.append([])
            room = PART
        parts[-1].append(i)
        room -= sizes[i]
    return parts


def learning_rate(peak: float, step: int, steps: int, *, warmup: int = 100, decay_from: float = 0.6) -> float:
    """The learning rate of a step: linear warm-up, constant, then a cosine decay to zero from that share of the run on."""
    start = int(steps * decay_from)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < start:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))
