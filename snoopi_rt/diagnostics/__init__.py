"""What a bundle does on this machine: how fast it is, and how far engines are apart."""
