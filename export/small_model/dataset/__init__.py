"""Captioned pictures composed of emoji drawings: every word of a caption is true, and a caption determines its picture."""
