"""The parts of a pipeline: inputs, lazily opened engines, deadlines, tiling, and the choice of engine and precision."""
