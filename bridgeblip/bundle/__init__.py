"""The one file that answers anywhere: trace, prove parity, pack, load, answer."""
