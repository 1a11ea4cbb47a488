"""The embedded model: its pictures and captions, its stages of training, its judge."""
