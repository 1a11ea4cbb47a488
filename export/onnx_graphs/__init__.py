"""A torch module to the variants of a bundle: written, packed, quantised, measured."""
