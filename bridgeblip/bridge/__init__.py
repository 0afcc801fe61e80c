"""LoRA-Bridge on InstructBLIP: slice the decoder, bridge the cut, read the answer from a head over
the letters."""
