"""One file per question, each a command: `python -m bench.NAME`."""
