"""Training the small model: pictures, autoencoder, teacher, PG-SB student, and the pixel metrics that judge them."""
