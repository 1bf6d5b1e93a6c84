"""Self-distillation: the cross-entropy of iBOT and DINO, the teacher's centre, what tells of a collapse."""
