"""The PyTorch side: backbones, guidance, graphs, parity and training."""
