"""The PyTorch side: backbones, guidance, graphs, parity and training. `run.export` is the door."""
