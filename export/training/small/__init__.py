"""The small domain: emoji-like pictures with captions, their autoencoder and teacher, and the judges of what a student makes of them."""
