"""The embedded model: its pictures and captions, and the stages that train it before its student."""
