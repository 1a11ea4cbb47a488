"""Captioned pictures composed from emoji drawings: every word of a caption is true, and a caption determines its picture."""
