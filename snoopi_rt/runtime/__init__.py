"""What a pipeline is made of: inputs, engines opened when needed, deadlines, tiles, and the choice of engine and precision."""
