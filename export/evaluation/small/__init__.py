"""`eval small`: the embedded model, its teacher and its rivals, by a judge of their small domain."""
