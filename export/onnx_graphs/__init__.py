"""A torch module to the builds of a bundle: written, packed, quantised, measured."""
