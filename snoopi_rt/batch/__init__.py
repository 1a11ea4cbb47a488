"""A file of prompts to a folder of images, here or on a Ray cluster."""
