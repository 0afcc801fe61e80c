"""The default that runs anywhere: a tiny base, questions about scanned digits, the demo."""
